"""A worker group meets on the interface that has the node's address."""

import subprocess
import sys
from types import SimpleNamespace

from pear_ray.distributed.addresses import interface_of


def test_the_interface_of_an_address() -> None:
    interfaces = {
        "lo": [SimpleNamespace(address="127.0.0.1")],
        "eth0": [
            SimpleNamespace(address="02:42:0a:4d:00:01"),
            SimpleNamespace(address="10.77.0.1"),
        ],
    }
    assert interface_of("10.77.0.1", interfaces) == "eth0"
    assert interface_of("127.0.0.1", interfaces) == "lo"
    assert interface_of("10.77.0.2", interfaces) is None


def test_who_only_names_an_engines_actor_loads_neither_torch_nor_vllm() -> None:
    """Their import is seconds: an actor makes it once, with the collector paused."""
    code = (
        "import sys, pear_ray.distributed.samplers; "
        "sys.exit(bool({'torch', 'vllm', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
