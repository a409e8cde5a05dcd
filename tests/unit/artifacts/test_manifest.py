"""An artifact counts when its manifest is there and current, whenever the process was killed."""

import json
from pathlib import Path

import pytest

from pear_ray.artifacts import manifest
from pear_ray.errors import ArtifactError


@pytest.fixture
def stage_dir(tmp_path: Path) -> Path:
    return tmp_path / "collect"


def test_fingerprint_depends_on_stage_config_and_inputs_but_not_on_key_order() -> None:
    base = manifest.fingerprint(stage="a", config={"x": 1, "y": 2}, inputs={"p": "1", "q": "2"})
    assert base == manifest.fingerprint(
        stage="a", config={"y": 2, "x": 1}, inputs={"q": "2", "p": "1"}
    )
    others = [
        manifest.fingerprint(stage="b", config={"x": 1, "y": 2}, inputs={"p": "1", "q": "2"}),
        manifest.fingerprint(stage="a", config={"x": 1, "y": 3}, inputs={"p": "1", "q": "2"}),
        manifest.fingerprint(stage="a", config={"x": 1, "y": 2}, inputs={"p": "1", "q": "3"}),
        manifest.fingerprint(stage="a", config={"x": 1, "y": 2}, inputs={"p": "2", "q": "1"}),
    ]
    assert len({base, *others}) == 5


def test_folder_fingerprint_sees_contents_and_names_of_what_makes_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = manifest.folder_fingerprint(tmp_path)
    (tmp_path / "notes.md").write_text("unread", encoding="utf-8")
    assert manifest.folder_fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert manifest.folder_fingerprint(tmp_path) != first
    (tmp_path / "model.safetensors").write_bytes(b"one")
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    assert manifest.folder_fingerprint(tmp_path) != first


def test_begin_complete_is_current(stage_dir: Path) -> None:
    assert manifest.begin(stage_dir, "aaa") is False
    assert not manifest.is_current(stage_dir, "aaa")
    made = manifest.complete(stage_dir, counts={"rows": 3}, details={"gap": 0.5})
    assert manifest.is_current(stage_dir, "aaa")
    assert not manifest.is_current(stage_dir, "bbb")
    assert manifest.require_manifest(stage_dir) == made
    assert (made.stage, made.fingerprint) == ("collect", "aaa")
    assert (made.counts, made.details) == ({"rows": 3}, {"gap": 0.5})
    assert made.started <= made.finished
    assert sorted(path.name for path in stage_dir.iterdir()) == ["manifest.json"]


def test_the_same_identity_goes_on_and_keeps_its_work(stage_dir: Path) -> None:
    manifest.begin(stage_dir, "aaa")
    (stage_dir / "part").write_text("work", encoding="utf-8")
    assert manifest.begin(stage_dir, "aaa") is True
    assert (stage_dir / "part").read_text(encoding="utf-8") == "work"


def test_another_identity_wipes_unfinished_work(stage_dir: Path) -> None:
    manifest.begin(stage_dir, "aaa")
    (stage_dir / "part").write_text("work", encoding="utf-8")
    assert manifest.begin(stage_dir, "bbb") is False
    assert [path.name for path in stage_dir.iterdir()] == [manifest.UNFINISHED_FILE]
    assert manifest.complete(stage_dir, counts={}).fingerprint == "bbb"


def test_another_identity_wipes_a_complete_artifact(stage_dir: Path) -> None:
    manifest.begin(stage_dir, "aaa")
    (stage_dir / "rows").write_text("old", encoding="utf-8")
    manifest.complete(stage_dir, counts={})
    assert manifest.begin(stage_dir, "bbb") is False
    assert not (stage_dir / "rows").exists()
    assert not manifest.is_current(stage_dir, "aaa")


def test_half_done_work_is_no_input(stage_dir: Path) -> None:
    with pytest.raises(ArtifactError, match=r"run `pear collect RUN\.yaml` first"):
        manifest.require_manifest(stage_dir)
    manifest.begin(stage_dir, "aaa")
    with pytest.raises(ArtifactError, match="no complete artifact of stage 'collect'"):
        manifest.require_manifest(stage_dir)


def test_killed_before_the_folder_was_marked(stage_dir: Path) -> None:
    """A folder without any marker could hold anything, so none of it is kept."""
    stage_dir.mkdir()
    (stage_dir / "part").write_text("whose?", encoding="utf-8")
    assert manifest.begin(stage_dir, "aaa") is False
    assert not (stage_dir / "part").exists()


def test_killed_between_manifest_and_end_of_marker(stage_dir: Path) -> None:
    manifest.begin(stage_dir, "aaa")
    marker = (stage_dir / manifest.UNFINISHED_FILE).read_bytes()
    manifest.complete(stage_dir, counts={})
    (stage_dir / manifest.UNFINISHED_FILE).write_bytes(marker)
    assert manifest.is_current(stage_dir, "aaa")
    assert manifest.begin(stage_dir, "aaa") is False  # complete work is not resumed, only remade


def test_killed_while_removing_leaves_nothing_behind(stage_dir: Path) -> None:
    """The killed begin() had renamed the folder: the next one starts clean and clears it away."""
    doomed = stage_dir.with_name(".collect.removing")
    doomed.mkdir(parents=True)
    (doomed / manifest.UNFINISHED_FILE).write_text(
        json.dumps({"fingerprint": "aaa", "started": 0.0}), encoding="utf-8"
    )
    assert manifest.begin(stage_dir, "aaa") is False
    assert [path.name for path in stage_dir.parent.iterdir()] == ["collect"]
