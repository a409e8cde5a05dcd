"""A missing prerequisite is one line with its mend, before anything is made."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HASHED = ("requirements/cpu.txt", "pyproject.toml", "scripts/bootstrap.sh")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files that the script reads, without a .venv."""
    for name in HASHED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def fake_python(folder: Path, body: str) -> str:
    path = folder / "fake-python"
    path.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def bootstrap(clone: Path, *, python: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [clone / "scripts" / "bootstrap.sh"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": python},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_no_such_python(clone: Path) -> None:
    done = bootstrap(clone, python="python-that-is-not-there")
    assert done.returncode == 2
    assert done.stderr == (
        "pear-ray: PYTHON=python-that-is-not-there: no such program; "
        "give the path of a Python 3.11, 3.12 or 3.13\n"
    )


def test_python_too_old(clone: Path) -> None:
    old = fake_python(clone, '[[ $1 == -V ]] && echo "Python 3.9.2" && exit 0; exit 1')
    done = bootstrap(clone, python=old)
    assert done.returncode == 2
    assert done.stderr == f"pear-ray: PYTHON={old} is Python 3.9.2; wanted 3.11, 3.12 or 3.13\n"


def test_python_without_ensurepip_names_the_package(clone: Path) -> None:
    bare = fake_python(clone, f'[[ $2 == *ensurepip* ]] && exit 1; exec {sys.executable} "$@"')
    done = bootstrap(clone, python=bare)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"mend: apt-get install {version}-venv" in done.stderr
    assert not (clone / ".venv").exists()


def test_a_current_venv_is_left_alone_and_a_stale_one_is_not(clone: Path) -> None:
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").symlink_to(sys.executable)
    contents = b"".join((clone / name).read_bytes() for name in HASHED)
    stamp = clone / ".venv" / ".pear-ray"
    stamp.write_text(hashlib.sha256(contents).hexdigest() + "\n", encoding="utf-8")
    done = bootstrap(clone, python="python-that-is-not-there")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    with (clone / "requirements" / "cpu.txt").open("a", encoding="utf-8") as lock:
        lock.write("another==1.0\n")
    assert bootstrap(clone, python="python-that-is-not-there").returncode == 2
