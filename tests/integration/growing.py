"""What a driver sees of a cluster that grows, as JSON; `python growing.py ADDRESS FILE`.

A process of its own: the tests' Ray is another cluster.
"""

import json
import sys
import time
from pathlib import Path

import ray

from pear_ray.config.run import RunConfig, validate_run
from pear_ray.distributed.autoscaler import alive_nodes
from pear_ray.distributed.waiting import devices_for, require_feasible
from pear_ray.errors import CapacityError

GAMES = {"games": [{"name": "chain_sum"}], "size": 4}


def gpu_config(**cluster: object) -> RunConfig:
    return validate_run(
        {
            "name": "t",
            "models": {"policy": "embedded:student", "behavior": "embedded:teacher"},
            "corpus": {"kind": "dataset", "path": "unused"},
            "sft": {"optimizer": {"learning_rate": 1e-3}},
            "rl": {"problems": GAMES, "optimizer": {"learning_rate": 1e-4}, "num_steps": 1},
            "evaluate": {"problems": GAMES},
            "cluster": {"device": "cuda", **cluster},
        },
        origin="test",
    )


def refused(config: RunConfig) -> tuple[str, float]:
    """What is said of `sft` before anything starts, and after how long."""
    began = time.monotonic()
    try:
        require_feasible(config, ["sft"])
    except CapacityError as error:
        return str(error), time.monotonic() - began
    return "", 0.0


def waited(config: RunConfig) -> tuple[list[str], int]:
    """What is said while `sft` waits for its devices, and the nodes that it then finds."""
    said: list[str] = []
    with devices_for(config, "sft", say=lambda kind, words: said.append(f"{kind}: {words}")):
        return said, len(alive_nodes()) - 1


def main() -> None:
    ray.init(address=sys.argv[1], log_to_driver=False)
    found = {
        "too many": refused(gpu_config(num_trainers=4)),
        "too large": refused(gpu_config(cpus_per_worker=2)),
        "the first": waited(gpu_config(num_trainers=1)),
        "the second": waited(gpu_config(num_trainers=2)),
    }
    # Not to standard output, where Ray speaks as well.
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
