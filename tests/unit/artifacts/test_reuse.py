"""What another run made is taken over whole and unchanged, or not at all."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from pear_ray.artifacts import manifest, reuse
from pear_ray.errors import ArtifactError, InputError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A complete artifact of another run."""
    stage_dir = tmp_path / "other" / "collect"
    manifest.begin(stage_dir, "abc")
    (stage_dir / "corpus").mkdir()
    (stage_dir / "corpus" / "part-0.parquet").write_bytes(b"rows")
    (stage_dir / "quarantine.parquet").write_bytes(b"bad rows")
    manifest.complete(stage_dir, counts={"rows": 3})
    return stage_dir


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "mine" / "collect"


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_artifact_is_the_same_one_on_the_same_bytes_of_the_disk(
    source: Path, target: Path
) -> None:
    reuse.take(source, target, expected="abc")
    assert contents(target) == contents(source)
    assert manifest.is_current(target, "abc")
    part = Path("corpus") / "part-0.parquet"
    assert (target / part).samefile(source / part)
    shutil.rmtree(source.parent)  # the other run may go
    assert (target / part).read_bytes() == b"rows"


def test_where_links_fail_bytes_are_copied(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another_disk(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", another_disk)
    reuse.take(source, target, expected="abc")
    assert contents(target) == contents(source)
    part = Path("corpus") / "part-0.parquet"
    assert not (target / part).samefile(source / part)


def test_what_was_there_goes_and_leftovers_of_a_killed_attempt_do_not_come_along(
    source: Path, target: Path
) -> None:
    manifest.begin(target, "of another config")
    (target / "old.parquet").write_bytes(b"old")
    leftover = target.with_name(".collect.taking")
    leftover.mkdir()
    (leftover / "half.parquet").write_bytes(b"half")
    reuse.take(source, target, expected="abc")
    assert contents(target) == contents(source)
    assert [path.name for path in target.parent.iterdir()] == ["collect"]


def test_an_artifact_of_another_identity_is_refused_and_nothing_is_touched(
    source: Path, target: Path
) -> None:
    manifest.begin(target, "def")
    (target / "mine.parquet").write_bytes(b"mine")
    before = contents(target)
    with pytest.raises(ArtifactError, match="changed while it was taken over"):
        reuse.take(source, target, expected="def")
    assert contents(target) == before
    assert [path.name for path in target.parent.iterdir()] == ["collect"]


def test_an_unfinished_artifact_is_refused(source: Path, target: Path) -> None:
    (source / manifest.MANIFEST_FILE).unlink()
    with pytest.raises(ArtifactError, match="changed while it was taken over"):
        reuse.take(source, target, expected="abc")
    assert not target.exists()


def test_the_holder_is_the_first_run_whose_artifact_is_complete_and_the_same(
    source: Path, tmp_path: Path
) -> None:
    empty, other = tmp_path / "empty", source.parent
    again = Path(shutil.copytree(other, tmp_path / "again"))
    assert reuse.holder([empty, other, again], "collect", "abc") == other
    assert reuse.holder([again, other], "collect", "abc") == again
    assert reuse.holder([other], "collect", "abd") is None
    assert reuse.holder([other], "score", "abc") is None
    (other / "collect" / manifest.MANIFEST_FILE).unlink()
    assert reuse.holder([other, again], "collect", "abc") == again


def test_a_folder_that_is_no_run_is_refused(source: Path) -> None:
    with pytest.raises(InputError, match=r"other: no run's folder \(it has no run.json\)"):
        reuse.check_runs([source.parent])
    (source.parent / "run.json").write_text("{}", encoding="utf-8")
    reuse.check_runs([source.parent])


def test_versions_that_differ_are_named(source: Path) -> None:
    made = manifest.require_manifest(source)
    assert reuse.other_versions(made) == []
    here = made.versions["python"]
    made.versions["python"] = "2.7.18"
    made.versions["gone"] = "1.0"
    assert reuse.other_versions(made) == ["gone 1.0 (here none)", f"python 2.7.18 (here {here})"]
