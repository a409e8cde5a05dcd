"""The working tree as Ray packages it: what is left out, and whether it is small enough."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray._private.runtime_env.packaging import (
    GCS_STORAGE_MAX_SIZE,
    _dir_travel,
    _get_excludes,
)

from pear_ray.errors import InputError
from pear_ray.submission.target import Target

# Beside what a .gitignore or .rayignore names. Patterns of a .gitignore; one that begins with a
# slash is meant at the top only.
EXCLUDES = (
    "/outputs",
    "/data",
    ".git",
    ".venv",
    "venv",
    "node_modules",
    "__pycache__",
    "*.pyc",
    ".pytest_cache",
    ".ruff_cache",
    ".hypothesis",
    ".import_linter_cache",
    ".mypy_cache",
    ".ipynb_checkpoints",
    "*.egg-info",
)
# The job server takes less than the store behind it does (Ray 2.60: 100 MiB and 512 MiB).
MAX_BYTES = min(DASHBOARD_CLIENT_MAX_SIZE, GCS_STORAGE_MAX_SIZE)
SHOWN_FOLDERS = 5


def excludes_of(target: Target) -> list[str]:
    """Patterns of what is not sent: those of every tree, git's own here, the run's outputs."""
    excludes = [*EXCLUDES, *_private_excludes(target.root)]
    if "://" not in target.output_dir:
        outputs = Path(target.output_dir).expanduser().resolve()
        if outputs.is_relative_to(target.root) and outputs != target.root:
            excludes.append(f"/{outputs.relative_to(target.root).as_posix()}")
    return excludes


def _private_excludes(root: Path) -> list[str]:
    """What git leaves out in this checkout alone: Ray reads .gitignore files and no more."""
    file = root / ".git" / "info" / "exclude"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [line for line in lines if line.strip() and not line.startswith("#")]


def sent_files(root: Path, excludes: Sequence[str]) -> dict[str, int]:
    """Every file that Ray would send, by its path from the top, with its bytes."""
    found: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            found[path.relative_to(root).as_posix()] = path.stat().st_size

    quiet = logging.getLogger("pear_ray.submission.package")
    _dir_travel(
        root, [_get_excludes(root, [*excludes])], note, include_gitignore=True, logger=quiet
    )
    return found


def check_package(target: Target, files: dict[str, int]) -> None:
    """See that the tree can be sent, and holds all that the run reads from it.

    Raises:
        InputError: It is too large, or a file that the run file names is left out.
    """
    total = sum(files.values())
    if total > MAX_BYTES:
        raise InputError(
            f"{target.root}: {_mib(total)} would be sent, and the cluster takes up to "
            f"{_mib(MAX_BYTES)}; the largest folders are {largest_folders(files)}. Name what the "
            "job does not need in .gitignore or .rayignore, or move it to shared storage"
        )
    for path in target.reads:
        if path not in files and not any(name.startswith(f"{path}/") for name in files):
            raise InputError(
                f"{path}: the run file names it, and it is not sent to the cluster (outputs/, "
                "data/, caches and what .gitignore or .rayignore names stay here); put it where "
                "every machine reaches it, and give that path or URI"
            )


def largest_folders(files: dict[str, int]) -> str:
    """Where most of the bytes are, in words: folders of the first two levels."""
    sizes: Counter[str] = Counter()
    for path, size in files.items():
        sizes["/".join(path.split("/")[:-1][:2]) or "."] += size
    return ", ".join(f"{name} ({_mib(size)})" for name, size in sizes.most_common(SHOWN_FOLDERS))


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
