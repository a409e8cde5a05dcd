"""A machine that is going to be taken away: its group saves in time, and goes on elsewhere."""

import subprocess
import sys
from pathlib import Path

DRAINED = """
import os, sys, threading, time
from pathlib import Path
os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.5"
import ray, torch
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from safetensors.torch import load_file

sys.path.insert(0, sys.argv[2])
import test_killed_saves as runs
from pear_ray.config.run import validate_run
from pear_ray.distributed.in_process import become_host
from pear_ray.distributed.sft_loop import sft_loop
from pear_ray.telemetry.metrics_log import MetricRecord, read_metrics

NOTICE_S = 7
folder = Path(sys.argv[1])

def slow_loop(job):
    # The embedded model's steps are over before anybody hears of a node.
    import time
    from pear_ray.distributed.sft_loop import SftWorker, sft_loop
    whole = SftWorker.step
    def slow(self, step):
        time.sleep(0.25)
        return whole(self, step)
    SftWorker.step = slow
    sft_loop(job)

tree = runs.run_config(folder).model_dump(mode="json")
# Nothing is saved but for the notice, and no failure is forgiven.
tree["sft"] |= {"num_epochs": 24, "checkpoint_every": 1000}
tree["cluster"] |= {"num_trainers": 1, "cpus_per_worker": 1.0, "max_failures": 0}
runs.run_config = lambda folder: validate_run(tree, origin="test")

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
node = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)
results = []

def train():
    results.append(runs.train(slow_loop, folder / "drained"))

training = threading.Thread(target=train)
training.start()
while not (folder / "drained" / "metrics.jsonl").exists():
    time.sleep(0.1)
time.sleep(1)
deadline = time.time() + NOTICE_S
ray._private.worker.global_worker.gcs_client.drain_node(
    node.node_id, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot", int(deadline * 1000))
noticed = time.time()
# The autoscaler's part: another node, and the end of this one at its deadline. In the main thread,
# as Ray wants it.
cluster.add_node(num_cpus=1)
time.sleep(max(0.0, deadline - time.time()))
cluster.remove_node(node, allow_graceful=False)
training.join()
drained, same = results[0]
records = read_metrics(folder / "drained" / "metrics.jsonl")
steps = [r.step for r in records if isinstance(r, MetricRecord)]
times = [r.time for r in records if isinstance(r, MetricRecord)]
gaps = [(b - a, n) for a, b, n in zip(times, times[1:], steps)]
print("steps", len(steps), "the longest took", max(gaps)[0], "after step", max(gaps)[1])
ray.shutdown()
cluster.shutdown()
become_host("cpu")  # here, which is sooner than another group
undisturbed, weights = runs.train(sft_loop, folder / "undisturbed")
assert steps == list(range(1, len(undisturbed) + 1)), "a step was lost, or done twice"
for step, metrics in undisturbed.items():
    assert drained[step]["sft/weighted_loss"] == metrics["sft/weighted_loss"], step
assert all(torch.equal(weights[name], same[name]) for name in weights)
restart_s, saved = max(gaps)
assert restart_s > 2, "the group was not started again"
# It trained on after the notice; and it was the last save that it took up.
assert noticed + 1 < max(t for t, s in zip(times, steps) if s <= saved) < deadline
"""


def test_a_drained_node_loses_no_step(tmp_path: Path) -> None:
    """In a process of its own: this session's Ray is another cluster."""
    done = subprocess.run(
        [sys.executable, "-c", DRAINED, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
