"""What a driver sees of a cluster that grows, as JSON; `python growing.py ADDRESS FILE`.

A process of its own: the tests' Ray is another cluster.
"""

import json
import sys
import time
from pathlib import Path

import ray
from small_run import small_run

from pear_ray.config.run import RunConfig
from pear_ray.distributed.autoscaler import HEAD, alive_nodes
from pear_ray.distributed.waiting import devices_for, require_feasible
from pear_ray.errors import CapacityError


def refused(config: RunConfig) -> tuple[str, float]:
    """What is said of `sft` before anything starts, and after how long."""
    began = time.monotonic()
    try:
        require_feasible(config, ["sft"])
    except CapacityError as error:
        return str(error), time.monotonic() - began
    return "", 0.0


def waited(config: RunConfig) -> tuple[list[str], list[float]]:
    """What is said while `sft` waits for its devices, and the GPUs of the nodes that it finds."""
    said: list[str] = []
    with devices_for(config, "sft", say=lambda kind, words: said.append(f"{kind}: {words}")):
        nodes = [each.resources for each in alive_nodes() if HEAD not in each.resources]
        return said, [each.get("GPU", 0.0) for each in nodes]


def main() -> None:
    ray.init(address=sys.argv[1], log_to_driver=False)
    found = {
        "too many": refused(small_run(num_trainers=4)),
        "too large": refused(small_run(device="cuda", cpus_per_worker=2)),
        # A spot node would fit better: it has no GPU that would be idle.
        "the first": waited(small_run(num_trainers=1)),
        "the second": waited(small_run(device="cuda", num_trainers=2)),
    }
    # Not to standard output, where Ray speaks as well.
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
