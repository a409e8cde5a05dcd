"""What a copy of a run holds of what the store holds: written beside the copy, not in it."""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from pear_ray.artifacts.run_dir import write_json
from pear_ray.artifacts.stored.objects import LocalState, Stored, local_state


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that is the same here and there.

    Attributes:
        local: As it was here then.
        stored: As it was there then; None from a push until the store is listed again.
    """

    local: LocalState
    stored: Stored | None


@dataclass(slots=True)
class Ledger:
    """Which files of a copy are those of the store.

    Attributes:
        path: Where it is kept.
        identity: Of the copy: the store notes which copy was driven last.
        entries: By the file's name in the run.
    """

    path: Path
    identity: str
    entries: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def of(cls, copy: Path) -> Self:
        """That of the folder `copy`; an empty one where there is no copy, or none can be read."""
        path = copy.with_name(f"{copy.name}.ledger.json")
        if not copy.exists():
            return cls(path, uuid.uuid4().hex)
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            entries = {
                name: Entry(LocalState(*local), stored and Stored(*stored))
                for name, (local, stored) in tree["files"].items()
            }
            return cls(path, tree["identity"], entries)
        except (OSError, ValueError, KeyError, TypeError):
            return cls(path, uuid.uuid4().hex)

    def save(self) -> None:
        """Write it, whole or not at all."""
        files = {
            name: [
                [entry.local.num_bytes, entry.local.time_ns],
                entry.stored and [entry.stored.num_bytes, entry.stored.time_ns],
            ]
            for name, entry in self.entries.items()
        }
        write_json(self.path, {"identity": self.identity, "files": files})

    def is_same(self, copy: Path, name: str) -> bool:
        """Whether the file is here, as it was when it was the store's."""
        entry = self.entries.get(name)
        try:
            return entry is not None and local_state(copy / name) == entry.local
        except FileNotFoundError:
            return False

    def note_listing(self, listing: Mapping[str, Stored]) -> None:
        """After pushes: how the store names them now."""
        for name, entry in self.entries.items():
            if name in listing:
                self.entries[name] = Entry(entry.local, listing[name])
