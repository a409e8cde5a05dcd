"""`embedded:` names files of the package, wherever it is installed."""

import shutil
from pathlib import Path

import pytest

from pear_ray.config.corpus import DatasetCorpus
from pear_ray.config.problems import FileProblems
from pear_ray.corpus.files import corpus_fingerprint, list_files
from pear_ray.errors import InputError
from pear_ray.shipped import local_path
from pear_ray.tasks.problem_files import read_problems
from pear_ray.tasks.problem_sets import content_of

CORPUS = "embedded:automaton/corpus.parquet"
PROBLEMS = "embedded:automaton/heldout_a.jsonl"


def test_other_locations_stay_as_they_are() -> None:
    for location in ("a/b.jsonl", "s3://bucket/x", "hub:user/name", "~/x", "/embedded:x"):
        assert local_path(location) == location


def test_a_corpus_is_found_and_is_the_same_elsewhere(tmp_path: Path) -> None:
    (file,) = list_files(DatasetCorpus(kind="dataset", path=CORPUS))
    assert (file.name, file.format) == ("corpus.parquet", "parquet")
    assert Path(file.path).is_absolute()
    copy = shutil.copy(file.path, tmp_path / "corpus.parquet")
    shipped, copied = (
        corpus_fingerprint(DatasetCorpus(kind="dataset", path=str(path))) for path in (CORPUS, copy)
    )
    assert shipped == copied


def test_problems_are_found(tmp_path: Path) -> None:
    config = FileProblems(kind="file", path=PROBLEMS)
    problems = read_problems(config)
    assert len(problems) == 80
    assert problems[0].problem_id == "heldout_a/heldout_a-000"
    copy = shutil.copy(local_path(PROBLEMS), tmp_path / "heldout_a.jsonl")
    assert content_of(config) == content_of(config.model_copy(update={"path": str(copy)}))


@pytest.mark.parametrize(
    "name", ["automaton/nothing.jsonl", "../shipped.py", "student/config.json"]
)
def test_what_is_not_shipped_is_refused_with_what_is(name: str) -> None:
    with pytest.raises(InputError, match=f"no file '{name}' comes with the package") as caught:
        local_path(f"embedded:{name}")
    assert CORPUS in str(caught.value)
    assert PROBLEMS in str(caught.value)
