"""A copy of a run on this machine: what the store holds is brought here, file by file."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from pear_ray.artifacts.run_dir import IDENTITY_FILE, LOCK_FILE
from pear_ray.artifacts.stored.ledger import Entry, Ledger
from pear_ray.artifacts.stored.objects import ObjectFolder, Stored

NUM_THREADS = 8  # a store is slow per request and fast in all
SMALL_BYTES = 2**20
SMALL_DEPTH = 2  # a run's own files, and those right in a stage's folder
METRICS_FILE = "metrics.jsonl"
LOGS = "logs"
TRAIN = "train"  # where Ray Train keeps a stage's checkpoints
WEIGHTS_SUFFIX = ".safetensors"
Item = TypeVar("Item")
Made = TypeVar("Made")


class RunCopy:
    """A run's folder here, and what the store has of it.

    Attributes:
        path: The folder.
        objects: The run on the store.
        ledger: Which files of both are the same.
        listing: What the store has, as far as this process knows.
    """

    def __init__(self, objects: ObjectFolder, path: Path) -> None:
        """Nothing is asked or written yet."""
        self.objects, self.path = objects, path
        self.ledger = Ledger.of(path)
        self.listing: dict[str, Stored] = {}

    def look(self) -> None:
        """List what the store has."""
        listing = self.objects.list()
        self.listing = {name: each for name, each in listing.items() if is_carried(name)}

    def drop_what_differs(self) -> None:
        """Remove what is here and is not what the store has under that name, as last listed."""
        for name in list(local_files(self.path)):
            entry = self.ledger.entries.get(name)
            stored = self.listing.get(name)
            if stored is None or entry is None or entry.stored != stored:
                (self.path / name).unlink()
                self.ledger.entries.pop(name, None)

    def unpushed(self) -> list[str]:
        """Files here that the store has never had, or not as they are now."""
        return [name for name in local_files(self.path) if not self.ledger.is_same(self.path, name)]

    def set_aside(self) -> Path:
        """Move the folder away, with all that is in it; where it is now."""
        place = self.path.with_name(f"{self.path.name}.aside-{time.time_ns()}")
        self.path.rename(place)
        self.ledger.entries.clear()
        return place

    def bring(self, wanted: Callable[[str, Stored], bool]) -> int:
        """Bring every object that is `wanted` and of which no file is here; the bytes that came."""
        names = [
            name
            for name, stored in self.listing.items()
            if wanted(name, stored) and not (self.path / name).exists()
        ]
        num_bytes = 0
        for name, entry in zip(names, in_parallel(self._get, names), strict=True):
            self.ledger.entries[name] = entry
            num_bytes += entry.local.num_bytes
        if names:
            self.ledger.save()
        return num_bytes

    def _get(self, name: str) -> Entry:
        return Entry(self.objects.get(name, self.path / name), self.listing[name])


def in_parallel(work: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """`work` of each item, in their order, several at a time."""
    pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="pear-store")
    try:
        yield from pool.map(work, items)
    finally:  # after a failure nothing more is begun: each would wait for the same store
        pool.shutdown(cancel_futures=True)


def is_carried(name: str) -> bool:
    """Whether a file of a run goes to the store: not what is half written, or of one machine."""
    return name != LOCK_FILE and not any(part.startswith(".") for part in name.split("/"))


def local_files(folder: Path) -> Iterator[str]:
    """The names of all files under `folder` that are carried."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for file in sorted(files):
            name = (Path(parent) / file).relative_to(folder).as_posix()
            if is_carried(name):
                yield name


def is_small(name: str, stored: Stored) -> bool:
    """What every reader of a run wants: who it is, how far it is, what is complete."""
    depth = name.count("/") + 1
    if name in {METRICS_FILE, IDENTITY_FILE} or name.startswith(f"{LOGS}/"):
        return True
    return depth <= SMALL_DEPTH and stored.num_bytes <= SMALL_BYTES


def is_shown(name: str, stored: Stored) -> bool:
    """What a report of a run reads: all but weights and checkpoints."""
    return is_small(name, stored) or not (name.endswith(WEIGHTS_SUFFIX) or f"/{TRAIN}/" in name)
