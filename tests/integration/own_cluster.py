"""A Ray cluster of several nodes, in a process of its own: the tests' Ray is another cluster."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

HERE = Path(__file__).parent
SPOT, ON_DEMAND = ({"ray.io/market-type": name} for name in ("spot", "on-demand"))


def run_script(script: str, folder: Path) -> None:
    """Run it, with `folder` for its argument; modules of this folder can be imported there."""
    places = [str(each) for each in (HERE.parents[1], HERE.parent, HERE)]
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@contextlib.contextmanager
def own_cluster(*, head_cpus: int) -> Iterator[Cluster]:
    """A head that this driver is connected to; `add_node` gives it others, in the main thread."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": head_cpus})
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def announce_end(node_id: str, *, notice_s: float) -> float:
    """Say, as of a spot machine, that the node will go; the Unix time at which it will."""
    deadline = time.time() + notice_s
    ray._private.worker.global_worker.gcs_client.drain_node(
        node_id,
        DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
        "spot",
        int(deadline * 1000),
    )
    return deadline


def end_node(cluster: Cluster, node: object, *, at: float) -> None:
    """End it at that Unix time, without grace; in the main thread, as Ray wants it."""
    time.sleep(max(0.0, at - time.time()))
    cluster.remove_node(node, allow_graceful=False)
