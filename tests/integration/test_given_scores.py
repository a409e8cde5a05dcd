"""A corpus that brings its log-probs needs no behavior model: the suffix game's, for one."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_ray.artifacts import manifest
from pear_ray.artifacts.tables import SCORED, read_table
from pear_ray.config.run import load_run
from pear_ray.errors import InputError
from pear_ray.shipped import local_path
from pear_ray.stages import collect, score

SUFFIX = Path(__file__).parents[2] / "jobs" / "runs" / "suffix.yaml"
CORPUS = "embedded:automaton/corpus.parquet"


def scored(folder: Path, *overrides: str) -> list[dict]:
    """Rows of the run's score stage."""
    config = load_run(SUFFIX, [f"output_dir={folder}", *overrides])
    for stage in (collect, score):
        manifest.begin(folder / stage.__name__.rpartition(".")[2], "test")
        stage.run(config, folder, attempt=1)
    files = sorted((folder / "score" / "scored").glob("*.parquet"))
    return [row for file in files for row in read_table(file, SCORED).to_pylist()]


def test_they_are_kept_as_they_are(local_ray: None, tmp_path: Path) -> None:
    given = pq.read_table(local_path(CORPUS)).to_pylist()
    found = scored(tmp_path)
    assert len(found) == len(given) == 512
    for row, wanted in zip(found, given, strict=True):
        assert (row["example_id"], row["source"]) == (wanted["id"], wanted["source"])
        pairs = zip(row["behavior_logprobs"], row["loss_mask"], strict=True)
        assert [logprob for logprob, trains in pairs if trains] == wanted["behavior_logprobs"]
    details = manifest.require_manifest(tmp_path / "score").details
    assert (details["given_logprobs"], details["sources"]) == ("keep", {})


def test_a_row_without_them_is_refused(local_ray: None, tmp_path: Path) -> None:
    rows = pq.read_table(local_path(CORPUS)).to_pylist()[:8]
    table = pq.read_table(local_path(CORPUS)).slice(0, 8)
    values = [None if place == 3 else row["behavior_logprobs"] for place, row in enumerate(rows)]
    name = "behavior_logprobs"
    kind = table.schema.field(name).type
    place = table.schema.get_field_index(name)
    table = table.set_column(place, pa.field(name, kind), pa.array(values, kind))
    pq.write_table(table, tmp_path / "gap.parquet")
    source = rows[3]["source"]
    with pytest.raises(InputError, match=rf"no model for source '{source}' of the corpus .*none"):
        scored(tmp_path, f"corpus.path={tmp_path}/gap.parquet")
