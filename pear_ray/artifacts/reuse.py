"""Complete artifacts of other runs taken over instead of made again, where they are the same."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from pear_ray.artifacts import manifest
from pear_ray.artifacts.manifest import MANIFEST_FILE, Manifest
from pear_ray.artifacts.run_dir import IDENTITY_FILE, versions
from pear_ray.errors import ArtifactError, InputError

# Another disk, a file system without hard links, too many of them: then bytes are copied.
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


def check_runs(folders: Sequence[Path]) -> None:
    """See that stages can be looked for in `folders`.

    Raises:
        InputError: One is no run's folder.
    """
    for folder in folders:
        if not (folder / IDENTITY_FILE).is_file():
            raise InputError(
                f"--reuse {folder}: no run's folder (it has no {IDENTITY_FILE}); give one that "
                "`pear run` made, such as outputs/demo"
            )


def holder(folders: Sequence[Path], stage: str, expected: str) -> Path | None:
    """The first run of `folders` whose artifact of `stage` is complete and is `expected`."""
    for folder in folders:
        if manifest.is_current(folder / stage, expected):
            return folder
    return None


def take(source: Path, stage_dir: Path, *, expected: str) -> Manifest:
    """Make `stage_dir` the same artifact as `source`, by hard links, or copies where links fail.

    An artifact's files are never written again once it is complete, so two runs may share them. The
    manifest comes last, and the folder appears under its name only when all of it is there.

    Args:
        source: The stage's folder in another run.
        stage_dir: Where the artifact goes; what is there and is not `expected` is removed.
        expected: Fingerprint that the artifact must have.

    Raises:
        ArtifactError: `source` is not `expected`, or was changed meanwhile.
    """
    partial = stage_dir.with_name(f".{stage_dir.name}.taking")
    shutil.rmtree(partial, ignore_errors=True)  # of a take() that was killed
    with contextlib.suppress(FileNotFoundError):  # one that vanishes is caught by what is there
        for file in [*_files(source), source / MANIFEST_FILE]:
            _link(file, partial / file.relative_to(source))
    # Read from what was taken: `source` may be another artifact by now.
    taken = manifest.read_manifest(partial)
    if taken is None or taken.fingerprint != expected:
        shutil.rmtree(partial, ignore_errors=True)
        raise ArtifactError(
            f"{source}: changed while it was taken over; wait for the run that makes it, or leave "
            "--reuse out"
        )
    manifest.remove(stage_dir)
    partial.rename(stage_dir)
    return taken


def other_versions(made: Manifest) -> list[str]:
    """In words, the packages that made the artifact and are of another version here."""
    here = versions()
    return [
        f"{package} {version} (here {here.get(package, 'none')})"
        for package, version in sorted(made.versions.items())
        if here.get(package) != version
    ]


def _files(folder: Path) -> Iterator[Path]:
    """Every file of an artifact but its manifest."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST_FILE:
            yield path


def _link(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copy2(file, target)
