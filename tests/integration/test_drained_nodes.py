"""A machine that is going to be taken away: what is on it goes on elsewhere.

A group saves in time, and never trains on a machine that is known for being taken away.
"""

from pathlib import Path

import pytest
from own_cluster import run_script

DRAINED = """
import os, sys, threading, time
from pathlib import Path
os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.5"
import torch
import test_killed_saves as runs
from own_cluster import ON_DEMAND, SPOT, announce_end, end_node, own_cluster
from pear_ray.config.run import validate_run
from pear_ray.distributed.in_process import become_host
from pear_ray.distributed.sft_loop import sft_loop
from pear_ray.distributed.waiting import require_feasible
from pear_ray.errors import CapacityError
from pear_ray.telemetry.metrics_log import MetricRecord, read_metrics

NOTICE_S = 7
folder = Path(sys.argv[1])

def slow_loop(job):
    # The embedded model's steps are over before anybody hears of a node.
    import time
    import ray
    from pear_ray.distributed.sft_loop import SftWorker, sft_loop
    with (job["run_dir"] / "nodes").open("a") as nodes:
        print(ray.get_runtime_context().get_node_id(), file=nodes)
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
tree["cluster"] |= {"num_samplers": 1}
config = validate_run(tree, origin="test")
runs.run_config = lambda folder: config

results = []

def train():
    results.append(runs.train(slow_loop, folder / "drained"))

with own_cluster(head_cpus=0) as cluster:
    cluster.add_node(num_cpus=1, labels=SPOT)  # free all the time, and not for training
    require_feasible(config, ["score"])
    try:
        require_feasible(config, ["sft"])
    except CapacityError as error:
        refusal = str(error)
    node = cluster.add_node(num_cpus=1, labels=ON_DEMAND)
    training = threading.Thread(target=train)
    training.start()
    while not (folder / "drained" / "metrics.jsonl").exists():
        time.sleep(0.1)
    time.sleep(1)
    deadline = announce_end(node.node_id, notice_s=NOTICE_S)
    noticed = time.time()
    # The autoscaler's part: another node, and the end of this one at its deadline.
    other = cluster.add_node(num_cpus=1)  # without a label it will do
    end_node(cluster, node, at=deadline)
    training.join()
assert "after waiting for 1 CPU on on-demand nodes: cluster has 0; lower" in refusal
assert refusal.endswith("or let it train on spot nodes with cluster.training_nodes=any")
drained, same = results[0]
records = read_metrics(folder / "drained" / "metrics.jsonl")
steps = [r.step for r in records if isinstance(r, MetricRecord)]
times = [r.time for r in records if isinstance(r, MetricRecord)]
gaps = [(b - a, n) for a, b, n in zip(times, times[1:], steps)]
print("steps", len(steps), "the longest took", max(gaps)[0], "after step", max(gaps)[1])
assert (folder / "drained" / "nodes").read_text().split() == [node.node_id, other.node_id]
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


SAMPLING = """
import sys, threading, time
from pathlib import Path
import ray
import test_sampler_pool as pools
from own_cluster import SPOT, announce_end, end_node, own_cluster
from pear_ray.config.run import validate_run
from pear_ray.distributed.samplers import SamplerPool

tree = pools.run_config(Path(sys.argv[1])).model_dump(mode="json")
tree["cluster"] |= {"num_samplers": 1, "max_failures": 0}
config = validate_run(tree, origin="test")
found = []

def sample():
    with SamplerPool(config, pools.engine_spec(config, pools.STUDENT), stage="test") as pool:
        found.append(pools.sample(pool, kill=False))
        undisturbed.set()
        drained.wait()
        found.append(pools.sample(pool, kill=False))

undisturbed, drained = threading.Event(), threading.Event()
with own_cluster(head_cpus=0) as cluster:
    node = cluster.add_node(num_cpus=1, labels=SPOT)
    sampling = threading.Thread(target=sample)
    sampling.start()
    undisturbed.wait()
    end_node(cluster, node, at=announce_end(node.node_id, notice_s=2) + 1)
    cluster.add_node(num_cpus=1, labels=SPOT)
    drained.set()
    sampling.join()
assert len(found) == 2 and found[0] == found[1]
"""


RL_DRAINED = """
import os, sys, threading, time
from pathlib import Path
os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.5"
import test_killed_rl as runs
from own_cluster import announce_end, end_node, own_cluster
from pear_ray.telemetry.metrics_log import MetricRecord, read_metrics

NUM_STEPS = 60
folder = Path(sys.argv[1])

def train(name):
    # Nothing is saved but for the notice, and no failure is forgiven.
    settings = {"num_steps": NUM_STEPS, "checkpoint_every": 1000}
    runs.train({}, folder / name, max_failures=0, **settings)

def started(name):
    thread = threading.Thread(target=train, args=[name])
    thread.start()
    return thread

def logged(name):
    file = folder / name / "metrics.jsonl"
    records = read_metrics(file) if file.exists() else []
    return [r for r in records if isinstance(r, MetricRecord) and r.stage == "rl" and r.step]

with own_cluster(head_cpus=0) as cluster:
    node = cluster.add_node(num_cpus=1)
    training = started("drained")
    while not logged("drained"):
        time.sleep(0.1)
    deadline = announce_end(node.node_id, notice_s=7)
    cluster.add_node(num_cpus=1)
    end_node(cluster, node, at=deadline)
    training.join()
    started("undisturbed").join()
found = logged("drained")
times = [record.time for record in found]
gaps = [(b - a, record.step) for a, b, record in zip(times, times[1:], found)]
print("the longest step took", max(gaps)[0], "after step", max(gaps)[1])
assert [record.step for record in found] == list(range(1, NUM_STEPS + 1)), "lost, or done twice"
assert max(gaps)[0] > 2, "the group was not started again"
runs.check_same(folder / "undisturbed", folder / "drained", num_steps=NUM_STEPS)
"""


def test_a_drained_node_loses_no_step(tmp_path: Path) -> None:
    run_script(DRAINED, tmp_path)


@pytest.mark.slow
def test_an_engine_that_goes_with_notice_is_replaced_without_being_counted(tmp_path: Path) -> None:
    run_script(SAMPLING, tmp_path)


@pytest.mark.slow
def test_rl_on_a_drained_node_loses_no_step(tmp_path: Path) -> None:
    run_script(RL_DRAINED, tmp_path)
