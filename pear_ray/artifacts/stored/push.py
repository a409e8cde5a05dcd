"""What a driver makes of a run goes to the store, so that what is there can always be gone on with.

A reader of the store trusts three files of a stage: `unfinished.json` (this work is of that
fingerprint), Ray Train's snapshot (these checkpoints are whole) and `manifest.json` (all is there).
They are read here before what they speak of is listed, and put there after it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pear_ray.artifacts.manifest import MANIFEST_FILE, UNFINISHED_FILE
from pear_ray.artifacts.stored.copy import (
    METRICS_FILE,
    TRAIN,
    RunCopy,
    in_parallel,
    local_files,
)
from pear_ray.artifacts.stored.ledger import Entry
from pear_ray.artifacts.stored.objects import LocalState, Stored, local_state

SNAPSHOT_FILE = f"{TRAIN}/checkpoint_manager_snapshot.json"  # Ray Train's, of version 2
POINTERS = (MANIFEST_FILE, UNFINISHED_FILE, SNAPSHOT_FILE)


@dataclass(frozen=True, slots=True)
class Pointer:
    """One of the three files, read before its stage was listed."""

    content: bytes
    state: LocalState


@dataclass(frozen=True, slots=True)
class StageState:
    """What a stage's folder here says of itself.

    Attributes:
        name: The stage.
        pointers: Those that are there, by their names in the stage's folder.
        fingerprint: Of the work in it.
        checkpoints: Folders of whole checkpoints, as the snapshot has them.
    """

    name: str
    pointers: dict[str, Pointer]
    fingerprint: str
    checkpoints: frozenset[str]


class Pusher:
    """Brings the store up to what is here. One push at a time; each may be broken off anywhere."""

    def __init__(self, copy: RunCopy) -> None:
        """Of `copy`, whose store has been listed."""
        self._copy, self._objects = copy, copy.objects
        self._been_here: set[str] = set()  # what the store has and this driver had, by name
        self._fingerprints: dict[str, str | None] = {}  # of stages on the store

    def push(self) -> tuple[int, int]:
        """Bring all that has changed; how many files and bytes went.

        A file that goes away meanwhile (a checkpoint that was replaced) leaves its stage for the
        next push.

        Raises:
            OSError: The store does not answer (or another of `objects.FAILURES`).
        """
        stages = list(self._stages())
        names = [name for name in local_files(self._copy.path) if not _is_pointer(name)]
        # Ray Train writes its snapshot before it removes a checkpoint: all that it names is listed.
        settled = [stage for stage in stages if self._is_unchanged(stage)]
        of_stages = {stage.name for stage in stages}
        loose = [name for name in names if name.partition("/")[0] not in of_stages]
        loose.sort(key=lambda name: name != METRICS_FILE)
        sent = self._put_changed(loose, may_go=True)
        for stage in settled:
            sent += self._push_stage(stage, names)
        if sent:
            self._copy.ledger.save()
        return len(sent), sum(sent)

    def _push_stage(self, stage: StageState, names: list[str]) -> list[int]:
        there = self._fingerprint_there(stage.name)
        if there != stage.fingerprint:
            self._clear(stage.name)
            self._fingerprints[stage.name] = stage.fingerprint
        sent = []
        if MANIFEST_FILE not in stage.pointers:
            sent += self._put_pointer(stage, UNFINISHED_FILE)
        mine = [name for name in names if name.startswith(f"{stage.name}/")]
        mine = [name for name in mine if self._is_whole(name, stage)]
        self._been_here.update(mine)
        try:
            sent += self._put_changed(mine)
        except FileNotFoundError:
            return sent
        sent += self._put_pointer(stage, SNAPSHOT_FILE)
        sent += self._put_pointer(stage, MANIFEST_FILE)
        self._remove_gone(stage, set(mine))
        return sent

    def _is_whole(self, name: str, stage: StageState) -> bool:
        """Whether a file is not of a checkpoint that is still being written."""
        folder = f"{stage.name}/{TRAIN}/"
        if not name.startswith(folder):
            return True
        return name.removeprefix(folder).partition("/")[0] in stage.checkpoints

    def _remove_gone(self, stage: StageState, here: set[str]) -> None:
        """Remove what the store has of the stage, and the stage has no longer."""
        train = f"{stage.name}/{TRAIN}/"
        for name in list(self._copy.listing):
            if not name.startswith(f"{stage.name}/") or _is_pointer(name) or name in here:
                continue
            old_checkpoint = name.startswith(train) and SNAPSHOT_FILE in stage.pointers
            if name in self._been_here or (old_checkpoint and not self._is_whole(name, stage)):
                self._delete(name)
        if MANIFEST_FILE in stage.pointers:
            self._delete(f"{stage.name}/{UNFINISHED_FILE}")

    def _clear(self, stage: str) -> None:
        """Remove what the store has of other work in the stage, first what makes it trusted."""
        names = [name for name in self._copy.listing if name.startswith(f"{stage}/")]
        for name in sorted(names, key=lambda each: not _is_pointer(each)):
            self._delete(name)

    def _fingerprint_there(self, stage: str) -> str | None:
        if stage not in self._fingerprints:
            names = [f"{stage}/{name}" for name in (MANIFEST_FILE, UNFINISHED_FILE)]
            found = [self._objects.read(name) for name in names if name in self._copy.listing]
            told = [json.loads(content)["fingerprint"] for content in found if content]
            self._fingerprints[stage] = told[0] if told else None
        return self._fingerprints[stage]

    def _stages(self) -> Iterator[StageState]:
        """Every stage that has a folder here and says whose it is."""
        for folder in sorted(self._copy.path.iterdir()):
            if folder.name.startswith(".") or not folder.is_dir():
                continue
            pointers = {name: found for name in POINTERS if (found := _pointer(folder / name))}
            owner = pointers.get(MANIFEST_FILE) or pointers.get(UNFINISHED_FILE)
            if owner is None:
                continue
            checkpoints: frozenset[str] = frozenset()
            if SNAPSHOT_FILE in pointers:
                named = checkpoints_of(pointers[SNAPSHOT_FILE].content)
                if named is None:
                    del pointers[SNAPSHOT_FILE]  # it is being written
                checkpoints = named or checkpoints
            fingerprint = json.loads(owner.content)["fingerprint"]
            yield StageState(folder.name, pointers, fingerprint, checkpoints)

    def _is_unchanged(self, stage: StageState) -> bool:
        folder = self._copy.path / stage.name
        now = {name: found.state for name in POINTERS if (found := _pointer(folder / name))}
        return now == {name: pointer.state for name, pointer in stage.pointers.items()}

    def _put_changed(self, names: list[str], *, may_go: bool = False) -> list[int]:
        """Put those that have changed, several at a time; the bytes of each.

        Raises:
            FileNotFoundError: One went away meanwhile, unless it `may_go`.
        """
        changed = [name for name in names if not self._copy.ledger.is_same(self._copy.path, name)]
        if may_go:
            changed = [name for name in changed if (self._copy.path / name).exists()]
        return list(in_parallel(self._put, changed))

    def _put(self, name: str) -> int:
        state = self._objects.put(self._copy.path / name, name)
        self._note(name, state)
        return state.num_bytes

    def _put_pointer(self, stage: StageState, name: str) -> list[int]:
        """Put a pointer as it was when it was read, which may be no longer what is here."""
        pointer, full = stage.pointers.get(name), f"{stage.name}/{name}"
        known = self._copy.ledger.entries.get(full)
        if pointer is None or (known is not None and known.local == pointer.state):
            return []
        self._objects.write(full, pointer.content)
        self._note(full, pointer.state)
        return [pointer.state.num_bytes]

    def _note(self, name: str, state: LocalState) -> None:
        self._copy.ledger.entries[name] = Entry(state, None)
        self._copy.listing[name] = Stored(state.num_bytes, 0)

    def _delete(self, name: str) -> None:
        if name in self._copy.listing:
            self._objects.delete(name)
            del self._copy.listing[name]
        self._copy.ledger.entries.pop(name, None)


def checkpoints_of(snapshot: bytes) -> frozenset[str] | None:
    """The folders of the checkpoints that Ray Train's snapshot names; None if it is not whole."""
    try:
        tree = json.loads(snapshot)
        found = [*tree["checkpoint_results"], tree["latest_checkpoint_result"]]
        return frozenset(each["checkpoint_dir_name"] for each in found if each)
    except (ValueError, KeyError, TypeError):
        return None


def _pointer(path: Path) -> Pointer | None:
    try:
        state = local_state(path)
        return Pointer(path.read_bytes(), state)
    except FileNotFoundError:
        return None


def _is_pointer(name: str) -> bool:
    return name.partition("/")[2] in POINTERS
