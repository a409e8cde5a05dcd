"""Runs on a store as others than their driver see them: copies that nothing is written to."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pear_ray.artifacts.run_dir import IDENTITY_FILE
from pear_ray.artifacts.stored.copy import RunCopy, is_shown, is_small
from pear_ray.artifacts.stored.lease import is_driven
from pear_ray.artifacts.stored.location import (
    check_location,
    copy_path,
    inside,
    is_uri,
    parent,
    without_query,
)
from pear_ray.artifacts.stored.objects import FAILURES, ObjectFolder, Stored
from pear_ray.artifacts.stored.run import check_stored_owner
from pear_ray.errors import InputError, StorageError
from pear_ray.stores import because

PARENTS = 4  # how deep within a run an artifact's file is looked for


@dataclass(frozen=True, slots=True)
class SeenRun:
    """A run as it is now.

    Attributes:
        path: Its folder here.
        is_driven: Of a run on a store, whether a driver holds it; None where nobody can tell.
    """

    path: Path
    is_driven: bool | None


def see_run(location: str) -> SeenRun:
    """The run at a path or URI, with what its condition is told from.

    Raises:
        InputError: The store cannot be used, or has no run there.
    """
    if not is_uri(location):
        return SeenRun(Path(location), None)
    copy = _open(location)
    with _naming(location):
        if not _is_run(copy):
            raise InputError(_no_run(location))
        _bring(copy, is_small)
        return SeenRun(copy.path, is_driven(copy.objects))


def see_artifact(location: str) -> Path:
    """The run, stage's folder or file at a path or URI, with all of the run but its weights.

    Raises:
        InputError: The store cannot be used, or has no run there.
    """
    if not is_uri(location):
        return Path(location)
    uri, within = location, ""
    for _ in range(PARENTS):
        copy = _open(uri)
        with _naming(uri):
            if _is_run(copy):
                _bring(copy, functools.partial(_is_read_with, within.partition("/")[0]))
                return copy.path / within
        uri, name = parent(uri)
        within = f"{name}/{within}" if within else name
        if without_query(uri).endswith(":/"):
            break
    raise InputError(_no_run(location))


def seen_as_planned(output_dir: str, name: str) -> Path:
    """The folder of run `name` as a dry run looks at it: nothing is written to its store.

    Raises:
        InputError: The store cannot be used, or the folder is not this run's.
        ConfigError: `output_dir` is a URI of no store.
    """
    uri = inside(output_dir, name)
    copy = _open(uri)
    with _naming(uri):
        check_stored_owner(copy, name=name)
        _bring(copy, is_small)
    return copy.path


def _open(uri: str) -> RunCopy:
    check_location(uri)
    objects = ObjectFolder(uri)
    objects.check_reachable()
    return RunCopy(objects, copy_path(uri, kind="read"))


def _is_run(copy: RunCopy) -> bool:
    return copy.objects.read(IDENTITY_FILE) is not None


def _bring(copy: RunCopy, wanted: Callable[[str, Stored], bool]) -> None:
    copy.look()
    copy.drop_what_differs()
    copy.path.mkdir(parents=True, exist_ok=True)
    copy.bring(wanted)


def _is_read_with(stage: str, name: str, stored: Stored) -> bool:
    """What is shown of a stage, or of all: with a stage's rows go those that it was made of."""
    if not is_shown(name, stored):
        return False
    return is_small(name, stored) or not stage or name.partition("/")[0] in {stage, "score"}


def _no_run(location: str) -> str:
    return (
        f"{location}: the store has no run there (no {IDENTITY_FILE}); give a run's folder, such "
        "as s3://BUCKET/FOLDER/NAME?endpoint_override=..., or what is in one"
    )


@contextlib.contextmanager
def _naming(uri: str) -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        raise StorageError(
            f"{uri}: the store does not answer as it should{because(uri, error)}"
        ) from error
