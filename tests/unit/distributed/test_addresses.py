"""A worker group meets on the interface that has the node's address."""

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
