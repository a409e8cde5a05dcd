"""What is sent, and under which name, decided without a cluster."""

from pathlib import Path

import pytest

from pear_ray.errors import ConfigError, InputError
from pear_ray.submission.target import load_target

ROOT = Path(__file__).parents[3]
RUNS = ROOT / "jobs" / "runs"
OUT = "output_dir=/shared/outputs"


def own_tree(folder: Path, *, corpus: str) -> Path:
    """A working tree with a run file and a corpus, and none of our job scripts."""
    (folder / "pyproject.toml").touch()
    text = (RUNS / "suffix.yaml").read_text(encoding="utf-8")
    text = text.replace("path: embedded:automaton/corpus.parquet", f"path: {corpus}", 1)
    (folder / "own").mkdir()
    (folder / "own" / "suffix.yaml").write_text(text, encoding="utf-8")
    return folder / "own" / "suffix.yaml"


def test_the_entry_script_runs_the_file_as_it_was_given():
    target = load_target(RUNS / "demo.yaml", [OUT, "sft.weights={kind: pear}"], stage="sft")
    assert target.root == ROOT
    assert target.entrypoint == (
        "python jobs/sft.py jobs/runs/demo.yaml output_dir=/shared/outputs "
        "'sft.weights={kind: pear}'"
    )
    assert target.metadata == {
        "job_name": "demo",
        "run": "demo",
        "stage": "sft",
        "config": target.config_hash,
    }


def test_a_study_has_its_own_script_and_name():
    target = load_target(RUNS / "study_small.yaml", [OUT], is_study=True)
    assert (target.name, target.stage) == ("study_small", "study")
    assert target.entrypoint.startswith("python jobs/study.py jobs/runs/study_small.yaml ")


def test_the_hash_is_the_configs_and_not_the_way_it_was_written():
    written = load_target(RUNS / "demo.yaml", [OUT]).config_hash
    assert load_target(RUNS / "demo.yaml", [OUT, "sft.num_epochs=2"]).config_hash == written
    assert load_target(RUNS / "demo.yaml", [OUT, "sft.num_epochs=3"]).config_hash != written


def test_a_tree_without_our_scripts_runs_the_package(tmp_path):
    file = own_tree(tmp_path, corpus="rows/corpus.jsonl")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "corpus.jsonl").touch()
    target = load_target(file, [OUT])
    assert target.entrypoint.startswith("python -m pear_ray run own/suffix.yaml ")
    assert target.reads == ("rows/corpus.jsonl",)


def test_a_relative_output_folder_is_refused():
    with pytest.raises(ConfigError, match=r"output_dir='outputs' is relative.*/shared/outputs"):
        load_target(RUNS / "demo.yaml", [])


def test_a_file_outside_of_any_tree_is_refused(tmp_path):
    file = own_tree(tmp_path, corpus="x")
    (tmp_path / "pyproject.toml").unlink()
    with pytest.raises(InputError, match=r"no folder around it has a \.git or a pyproject\.toml"):
        load_target(file, [OUT])
