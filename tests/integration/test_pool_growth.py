"""Scoring begins with the engines that there is room for, and takes more as nodes come."""

from pathlib import Path

import pytest
from own_cluster import run_script

GROWING = """
import dataclasses, sys, threading
from pathlib import Path
import psutil
import test_scoring
from own_cluster import own_cluster
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

with own_cluster(head_cpus=1) as cluster:
    scoring = threading.Thread(target=score)
    scoring.start()
    begun.wait()
    before = len(raylets())
    cluster.add_node(num_cpus=1)
    scoring.join()
print("nodes with an engine before", before, "and at most after", max(seen), errors)
assert not errors and before == 1 and max(seen) == 2
"""


@pytest.mark.slow
def test_the_pool_grows_onto_a_node_that_joins(tmp_path: Path) -> None:
    run_script(GROWING, tmp_path)
