"""The objects of one run folder on a store, by their names within it."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from pear_ray.artifacts.partial import partial_of
from pear_ray.artifacts.stored.location import KEY, without_query
from pear_ray.errors import InputError
from pear_ray.stores import MAX_ATTEMPTS, because, open_filesystem

CHUNK_BYTES = 8 * 2**20
READS = 4
# An object that another driver writes anew between the look at its size and the reading.
_CHANGED = "INTERNAL_FAILURE during GetObject"
_GONE = "NO_SUCH_KEY"  # how S3's client says it where pyarrow makes no FileNotFoundError of it
# All that pyarrow raises when a store does not answer, or says no.
FAILURES = (OSError, pa.ArrowException)


@dataclass(frozen=True, slots=True)
class Stored:
    """An object: its size, and the store's time of writing it (S3 keeps whole seconds)."""

    num_bytes: int
    time_ns: int


@dataclass(frozen=True, slots=True)
class LocalState:
    """By what a file is known to be the same: its size and its time of writing."""

    num_bytes: int
    time_ns: int


def local_state(path: Path) -> LocalState:
    """Of a file that is there.

    Raises:
        FileNotFoundError: It is not.
    """
    stat = path.stat()
    return LocalState(stat.st_size, stat.st_mtime_ns)


class ObjectFolder:
    """A folder of a store. Every method raises one of `FAILURES` when the store does."""

    def __init__(self, uri: str) -> None:
        """Of the folder at `uri`; nothing is asked of the store, but for an S3 bucket's region.

        Raises:
            InputError: The URI cannot mean anything, or its bucket's region cannot be found out.
        """
        self.uri = uri
        self._system, self._root = open_filesystem(uri, key=KEY, max_attempts=MAX_ATTEMPTS)

    def check_reachable(self) -> None:
        """See, once and soon, that the store answers and has the bucket.

        Raises:
            InputError: It does not.
        """
        bucket = self._root.partition("/")[0]
        try:
            system, _ = open_filesystem(self.uri, key=KEY, max_attempts=1)
            if system.get_file_info(pafs.FileSelector(self._root, allow_not_found=True)):
                return
        except FAILURES as error:
            raise InputError(
                f"{KEY}={self.uri}: the store cannot be used{because(self.uri, error)}"
            ) from error
        # Nothing is there yet, or no bucket is: who may only see the folder cannot ask which.
        with contextlib.suppress(*FAILURES):
            if system.get_file_info(bucket).type is pafs.FileType.NotFound:
                raise InputError(
                    f"{KEY}={self.uri}: the store has no bucket {bucket!r}; make it, or name "
                    "another"
                )

    def list(self, under: str = "") -> dict[str, Stored]:
        """Every object by its name, which keeps `under`."""
        folder = f"{self._root}/{under}" if under else self._root
        found = self._system.get_file_info(
            pafs.FileSelector(folder, recursive=True, allow_not_found=True)
        )
        return {
            each.path.removeprefix(f"{self._root}/"): Stored(each.size, each.mtime_ns)
            for each in found
            if each.type is pafs.FileType.File
        }

    def read(self, name: str) -> bytes | None:
        """The content of a small object, or None where there is no such object."""
        for left in reversed(range(READS)):
            try:
                with self._system.open_input_stream(self._place(name)) as stream:
                    return stream.read()
            except FileNotFoundError:
                return None
            except OSError as error:
                if _GONE in str(error):  # between looking for it and reading it
                    return None
                if _CHANGED not in str(error) or not left:
                    raise
        raise AssertionError("the last read returns or raises")

    def write(self, name: str, content: bytes) -> None:
        """Put `content` there, whole or not at all."""
        with self._system.open_output_stream(self._place(name)) as stream:
            stream.write(content)

    def put(self, path: Path, name: str) -> LocalState:
        """Put a file there; the state in which it was read.

        Raises:
            FileNotFoundError: The file has gone. What was put of it then is no whole object.
        """
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            with self._system.open_output_stream(self._place(name)) as stream:
                left = stat.st_size  # a log may grow meanwhile
                while left and (chunk := file.read(min(left, CHUNK_BYTES))):
                    stream.write(chunk)
                    left -= len(chunk)
        return LocalState(stat.st_size, stat.st_mtime_ns)

    def get(self, name: str, path: Path) -> LocalState:
        """Bring an object to `path`, whole or not at all; the state of the file.

        Raises:
            FileNotFoundError: There is no such object.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_of(path)
        try:
            with (
                self._system.open_input_stream(self._place(name)) as stream,
                partial.open("wb") as file,
            ):
                while chunk := stream.read(CHUNK_BYTES):
                    file.write(chunk)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return local_state(path)

    def delete(self, name: str) -> None:
        """Remove an object; one that is not there is no error."""
        try:
            self._system.delete_file(self._place(name))
        except FileNotFoundError:
            return

    def __str__(self) -> str:
        return without_query(self.uri)

    def _place(self, name: str) -> str:
        return f"{self._root}/{name}"
