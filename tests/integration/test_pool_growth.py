"""Scoring begins with the engines that there is room for, and takes more as nodes come."""

import subprocess
import sys
from pathlib import Path

import pytest

GROWING = """
import dataclasses, sys, threading
from pathlib import Path
import psutil
import ray
from ray.cluster_utils import Cluster

sys.path.insert(0, sys.argv[2])
import test_scoring
from pear_ray.artifacts.tables import CORPUS, write_rows
from pear_ray.config.run import validate_run
from pear_ray.distributed.scoring import ScoringJob, score_corpus
from pear_ray.embedded.paths import embedded_path

folder = Path(sys.argv[1])
rows = [r | {"example_id": f"{r['example_id']}-{n}"} for n in range(400)
        for r in test_scoring.corpus_rows()]
(folder / "corpus").mkdir()
write_rows(folder / "corpus" / "part-000000.parquet", rows, CORPUS)
tree = test_scoring.scoring_config().model_dump(mode="json")
# Half of the CPUs of a worker are an engine actor's: one CPU, which is all that a node has.
tree["cluster"] |= {"num_samplers": 2, "min_samplers": 1, "cpus_per_worker": 2}
tree["score"] |= {"rows_per_block": 16}
job = ScoringJob(config=validate_run(tree, origin="test"), corpus=folder / "corpus",
                 folder=folder / "stage", models={"*": embedded_path("teacher")},
                 keep_given=False, align="refuse")

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
ray.init(address=cluster.address, log_to_driver=False)
raylets = lambda: {
    p.ppid() for p in psutil.Process().children(recursive=True)
    if "BehaviorScorer" in " ".join(p.cmdline())
}
begun, seen, errors = threading.Event(), [], []

def progress(done):
    if done > 200:
        seen.append(len(raylets()))
        begun.set()

def score():
    try:
        score_corpus(job, progress=progress)
    except BaseException as error:
        errors.append(error)
    begun.set()

scoring = threading.Thread(target=score)
scoring.start()
begun.wait()
before = len(raylets())
cluster.add_node(num_cpus=1)  # in the main thread, as Ray wants it
scoring.join()
print("nodes with an engine before", before, "and at most after", max(seen), errors)
ray.shutdown()
cluster.shutdown()
assert not errors and before == 1 and max(seen) == 2
"""


@pytest.mark.slow
def test_the_pool_grows_onto_a_node_that_joins(tmp_path: Path) -> None:
    """In a process of its own: this session's Ray is another cluster."""
    done = subprocess.run(
        [sys.executable, "-c", GROWING, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
