"""What of a working tree is sent."""

from pathlib import Path

import pytest

from pear_ray.errors import InputError
from pear_ray.submission.package import (
    MAX_BYTES,
    check_package,
    excludes_of,
    largest_folders,
    sent_files,
)
from pear_ray.submission.target import Target


def tree(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("12345", encoding="utf-8")
    return folder


def target_of(root: Path, *reads: str, output_dir: str = "/shared") -> Target:
    return Target(
        name="demo",
        stage="run",
        config_hash="0",
        output_dir=output_dir,
        root=root,
        entrypoint="python jobs/run.py demo.yaml",
        reads=reads,
    )


def test_outputs_data_caches_and_what_git_ignores_stay_here(tmp_path):
    root = tree(
        tmp_path,
        *("jobs/run.py", "pkg/data/rows.py", "pkg/__pycache__/a.pyc", ".venv/lib/big.so"),
        *(".git/objects/a", "outputs/demo/run.json", "data/corpus.jsonl", "notes/secret.txt"),
        "mine/wheels/large.whl",
        *("results/demo/run.json", "pkg/outputs/keep.txt"),
    )
    (root / ".gitignore").write_text("notes/\n", encoding="utf-8")
    (root / ".git" / "info").mkdir()
    (root / ".git" / "info" / "exclude").write_text("# here alone\n\nmine/\n", encoding="utf-8")
    target = target_of(root, output_dir=str(root / "results"))
    assert sent_files(root, excludes_of(target)) == {
        ".gitignore": 7,
        "jobs/run.py": 5,
        "pkg/data/rows.py": 5,
        "pkg/outputs/keep.txt": 5,
    }


def test_a_file_that_the_run_reads_must_be_sent(tmp_path):
    root = tree(tmp_path, "data/corpus.jsonl", "rows/a.jsonl")
    files = sent_files(root, excludes_of(target_of(root)))
    check_package(target_of(root, "rows", "rows/a.jsonl"), files)
    with pytest.raises(InputError, match=r"^data/corpus\.jsonl: the run file names it, and it is"):
        check_package(target_of(root, "data/corpus.jsonl"), files)


def test_too_large_a_tree_names_its_largest_folders(tmp_path):
    files = {"weights/base/a.bin": MAX_BYTES, "jobs/run.py": 2**20, "README.md": 2**19}
    assert largest_folders(files).endswith("jobs (1.0 MiB), . (0.5 MiB)")
    with pytest.raises(
        InputError, match=r"101\.5 MiB would be sent.*up to 100\.0 MiB.*weights/base"
    ):
        check_package(target_of(tmp_path), files)
    del files["jobs/run.py"], files["README.md"]
    check_package(target_of(tmp_path), files)
