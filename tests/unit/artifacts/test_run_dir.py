"""A run folder has one owner and one driver; what belongs to others is never written to."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pear_ray.artifacts import run_dir as run_dirs
from pear_ray.errors import ConfigError, InputError


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def lock_of(folder: Path, **fields: object) -> None:
    (folder / run_dirs.LOCK_FILE).write_text(json.dumps(fields), encoding="utf-8")


@pytest.fixture
def other_process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def test_claim_makes_the_folder_and_may_be_repeated(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "demo"
    run_dirs.claim(folder, name="demo")
    before = tree(folder)
    assert json.loads(before["run.json"])["name"] == "demo"
    run_dirs.claim(folder, name="demo")
    assert tree(folder) == before


def test_another_runs_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    run_dirs.claim(tmp_path, name="first")
    before = tree(tmp_path)
    with pytest.raises(InputError, match="belongs to run 'first', not 'second'"):
        run_dirs.claim(tmp_path, name="second")
    assert tree(tmp_path) == before


def test_a_foreign_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=r"holds files but no run\.json"):
        run_dirs.claim(tmp_path, name="demo")
    assert tree(tmp_path) == {"thesis.tex": b"mine"}


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="a file, not a run folder"):
        run_dirs.claim(tmp_path / "demo", name="demo")


def test_an_empty_folder_and_a_killed_claim_are_taken(tmp_path: Path) -> None:
    run_dirs.claim(tmp_path, name="demo")
    (tmp_path / "run.json").unlink()
    (tmp_path / ".run.json.4242").write_text('{"na', encoding="utf-8")
    run_dirs.claim(tmp_path, name="demo")
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["name"] == "demo"


def test_an_object_store_is_refused() -> None:
    with pytest.raises(ConfigError, match="output_dir='s3://bucket/x'"):
        run_dirs.run_path("s3://bucket/x", "demo")


def test_the_lock_is_there_only_while_held(tmp_path: Path) -> None:
    with run_dirs.driver_lock(tmp_path):
        held = json.loads((tmp_path / run_dirs.LOCK_FILE).read_text(encoding="utf-8"))
        assert (held["pid"], held["host"]) == (os.getpid(), platform.node())
    assert tree(tmp_path) == {}


def test_the_lock_ends_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), run_dirs.driver_lock(tmp_path):
        raise KeyError
    assert tree(tmp_path) == {}


def test_a_live_drivers_lock_is_refused_and_kept(
    tmp_path: Path, other_process: subprocess.Popen[bytes]
) -> None:
    lock_of(tmp_path, pid=other_process.pid, host=platform.node(), started=0.0)
    before = tree(tmp_path)
    with (
        pytest.raises(InputError, match=f"process {other_process.pid} is already driving"),
        run_dirs.driver_lock(tmp_path),
    ):
        pytest.fail("took over a live driver's run")
    assert tree(tmp_path) == before


def test_a_zombie_driver_is_a_dead_driver(
    tmp_path: Path, other_process: subprocess.Popen[bytes]
) -> None:
    other_process.kill()
    os.waitid(os.P_PID, other_process.pid, os.WEXITED | os.WNOWAIT)  # ended, not yet reaped
    lock_of(tmp_path, pid=other_process.pid, host=platform.node(), started=0.0)
    with run_dirs.driver_lock(tmp_path):
        held = json.loads((tmp_path / run_dirs.LOCK_FILE).read_text(encoding="utf-8"))
        assert held["pid"] == os.getpid()


def test_a_killed_drivers_lock_is_taken_over(
    tmp_path: Path, other_process: subprocess.Popen[bytes]
) -> None:
    other_process.kill()
    other_process.wait()
    lock_of(tmp_path, pid=other_process.pid, host=platform.node(), started=0.0)
    with run_dirs.driver_lock(tmp_path):
        held = json.loads((tmp_path / run_dirs.LOCK_FILE).read_text(encoding="utf-8"))
        assert held["pid"] == os.getpid()


def test_attempts_count_up_from_what_is_there(tmp_path: Path) -> None:
    assert [run_dirs.next_attempt(tmp_path) for _ in range(3)] == [1, 2, 3]
    shutil.rmtree(tmp_path / "logs" / "attempt-2")
    (tmp_path / "logs" / "attempt-10").mkdir()
    assert run_dirs.next_attempt(tmp_path) == 11


def test_write_json_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    run_dirs.write_json(path, {"a": [1, 2]})
    with pytest.raises(TypeError):
        run_dirs.write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, 2]}


def test_of_many_drivers_at_once_one_gets_the_run(tmp_path: Path) -> None:
    """Looking for the lock and writing it are one act: no two drivers can both find none."""
    taker = (
        "import sys, time; from pathlib import Path; "
        "from pear_ray.artifacts.run_dir import driver_lock\n"
        "folder = Path(sys.argv[1])\n"
        "while not (folder / 'go').exists(): time.sleep(0.001)\n"
        "try:\n"
        "    with driver_lock(folder): print('got it', flush=True); sys.stdin.read()\n"
        "except Exception as error: print(type(error).__name__, flush=True)\n"
    )
    drivers = [
        subprocess.Popen(
            [sys.executable, "-c", taker, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    (tmp_path / "go").touch()
    said = [driver.stdout.readline().strip() for driver in drivers if driver.stdout]
    for driver in drivers:
        driver.communicate()
    assert sorted(said) == ["InputError"] * 5 + ["got it"]
