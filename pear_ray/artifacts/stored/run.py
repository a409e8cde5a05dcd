"""A driver's run folder: its files here, and the store that they are brought from and pushed to.

Stages, loops and workers know paths only. A run on an object store has a working copy on a disk;
the store is the truth. Who drives it brings what is there, and pushes what it makes.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from pear_ray.artifacts.manifest import MANIFEST_FILE
from pear_ray.artifacts.run_dir import IDENTITY_FILE, run_path
from pear_ray.artifacts.stored.copy import TRAIN, RunCopy, is_shown, is_small
from pear_ray.artifacts.stored.lease import Lease
from pear_ray.artifacts.stored.location import KEY, check_location, copy_path, inside, is_uri
from pear_ray.artifacts.stored.objects import FAILURES, ObjectFolder, Stored
from pear_ray.artifacts.stored.push import Pusher
from pear_ray.errors import InputError, StorageError
from pear_ray.stores import because

WRITER = ".writer"  # which copy of the run was driven last
PUSH_S = 5.0
PUSH_SHARE = 0.05  # of the time at most, spent in looking for changes and pushing logs
RETRY_S = 5.0
# What a stage reads of others. The report reads all but weights; a stage not named here, nothing.
READS = {
    "score": ("collect",),
    "diagnose": ("collect", "score"),
    "sft": ("collect", "score"),
    "ready": ("collect", "score", "sft"),
    "rl": ("sft",),
    "rl_rollouts": ("sft",),
    "rl_train": ("sft", "rl", "rl_rollouts"),
    "evaluate": ("sft", "rl"),
}
Say = Callable[[str], object]
_logger = logging.getLogger(__name__)


class RunFolder(Protocol):
    """A run's folder as its driver has it."""

    @property
    def path(self) -> Path:
        """Where its files are on this machine."""

    @property
    def kept(self) -> str:
        """At the end, a line on where the run is kept if not in `path`; else nothing."""

    def say_through(self, say: Say) -> None:
        """From now on tell of trouble with the store through `say`."""

    def bring(self, stage: str, *, unfinished: bool) -> None:
        """Have all that `stage` reads here, and with `unfinished` what was made of itself."""

    def quiet(self) -> contextlib.AbstractContextManager[object]:
        """Within this nothing is pushed: a folder may be replaced by another."""

    def settle(self, stage: str) -> None:
        """Return when all that is here is where the run is kept.

        Raises:
            StorageError: The store did not answer in time, or the run is another driver's now.
        """


class LocalFolder:
    """A run that is kept where it is driven."""

    def __init__(self, path: Path) -> None:
        self.path, self.kept = path, ""

    def say_through(self, say: Say) -> None:
        """Nothing can be told."""

    def bring(self, stage: str, *, unfinished: bool) -> None:
        """Everything is here."""

    def quiet(self) -> contextlib.AbstractContextManager[object]:
        """Nothing is pushed."""
        return contextlib.nullcontext()

    def settle(self, stage: str) -> None:
        """Everything is kept already."""


class StoredFolder:
    """A run that is kept on a store, held by this driver, with its working copy here."""

    def __init__(self, copy: RunCopy, lease: Lease, *, wait_s: float, waited_s: float) -> None:
        """Of a copy that is up to date, which took `waited_s`.

        `settle` waits up to `wait_s` for a silent store.
        """
        self._copy, self._lease, self._wait_s = copy, lease, wait_s
        self._num_files, self._num_bytes, self._waited_s = 0, 0, waited_s
        self._say: Say = _logger.warning
        self._pusher = Pusher(copy)
        self._one_push = threading.RLock()
        self._ended = threading.Event()
        self._silent_since: float | None = None
        self._thread = threading.Thread(target=self._keep_pushing, name="pear-push", daemon=True)

    @property
    def path(self) -> Path:
        """The working copy."""
        return self._copy.path

    @property
    def kept(self) -> str:
        """The run's place on the store, and what it cost."""
        return (
            f"kept in:    {self._copy.objects} (pushed {self._num_files} files, "
            f"{self._num_bytes / 10**6:.1f} MB; waited {self._waited_s:.1f} s for the store)\n"
        )

    def start(self) -> None:
        """Push from now on, every few seconds."""
        self._thread.start()

    def say_through(self, say: Say) -> None:
        """Tell of trouble through `say`."""
        self._say = say

    def quiet(self) -> contextlib.AbstractContextManager[object]:
        """Within this nothing is pushed."""
        return self._one_push

    def bring(self, stage: str, *, unfinished: bool) -> None:
        """Bring what `stage` reads, and with `unfinished` what was made of itself.

        Raises:
            StorageError: The store does not answer.
        """

        def wanted(name: str, stored: Stored) -> bool:
            owner = name.partition("/")[0]
            if owner == stage:
                return unfinished
            if stage == "report":
                return is_shown(name, stored)
            return owner in READS.get(stage, ()) and f"/{TRAIN}/" not in name

        with self._waiting(), self._one_push:
            try:
                self._copy.bring(wanted)
            except FAILURES as error:
                raise StorageError(
                    f"{self._copy.objects}: what {stage} needs could not be brought ({error}); the "
                    "run is safe there: run the same command again when the store answers"
                ) from error

    def settle(self, stage: str) -> None:
        """Push until the store has all that is here.

        Raises:
            StorageError: It did not answer for `wait_s`, or the run is another driver's now.
        """
        deadline = time.monotonic() + self._wait_s
        with self._waiting():
            while not self._push():
                if self._lease.lost:
                    raise StorageError(
                        f"{self._copy.objects}: {self._lease.lost}, while the store did not answer "
                        f"here; what this driver made since is in {self.path} only, and is set "
                        "aside when the run is driven here again"
                    )
                if time.monotonic() > deadline:
                    raise StorageError(self._what_is_where(stage))
                time.sleep(min(RETRY_S, self._wait_s / 10))

    def close(self) -> None:
        """Stop pushing and give the run back; what can be pushed is, once."""
        with self._waiting():
            self._ended.set()
            self._thread.join()
            if self._push():
                with contextlib.suppress(*FAILURES):
                    self._copy.ledger.note_listing(self._copy.objects.list())
                    self._copy.ledger.save()
            self._lease.give_back()

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._waited_s += time.monotonic() - began

    def _keep_pushing(self) -> None:
        took = 0.0
        while not self._ended.wait(max(PUSH_S, took / PUSH_SHARE)):
            before = time.monotonic()
            self._push()
            took = time.monotonic() - before

    def _push(self) -> bool:
        """Push once; whether all is there now. Tells when the store falls silent, and is back."""
        with self._one_push:
            if self._lease.lost:
                return False
            try:
                num_files, num_bytes = self._pusher.push()
            except FAILURES as error:
                if self._silent_since is None:
                    self._silent_since = time.monotonic()
                    words = " ".join(str(error).split())
                    self._say(
                        f"{self._copy.objects} does not answer ({words}); the run goes on, and "
                        f"what it makes stays in {self.path} until it does"
                    )
                return False
            self._num_files += num_files
            self._num_bytes += num_bytes
            if self._silent_since is not None:
                silent_s = time.monotonic() - self._silent_since
                self._silent_since = None
                self._say(f"{self._copy.objects} answers again after {silent_s:.0f} s")
            return True

    def _what_is_where(self, stage: str) -> str:
        entries = self._copy.ledger.entries
        safe = sorted(
            name.partition("/")[0] for name in entries if name.endswith(f"/{MANIFEST_FILE}")
        )
        left = self._copy.unpushed()
        return (
            f"{self._copy.objects}: the store has not answered for {self._wait_s:.0f} s at the end "
            f"of {stage}. Safe there: {', '.join(safe) or 'no stage yet'}. Only here, in "
            f"{self.path}: {len(left)} files. Run the same command on this machine when the store "
            "answers: it pushes them and goes on"
        )


@contextlib.contextmanager
def run_folder(output_dir: str, name: str, *, wait_s: float) -> Iterator[RunFolder]:
    """The folder of run `name`, for the one process that drives it.

    Of a run on a store the working copy has what every reader wants; the rest is brought by need.

    Raises:
        InputError: The store cannot be used, the folder belongs to another run or holds something
            else, or another driver holds it.
        ConfigError: `output_dir` is a URI of no store.
        StorageError: The store stopped answering.
    """
    if not is_uri(output_dir):
        yield LocalFolder(run_path(output_dir, name))
        return
    check_location(output_dir)
    uri, began = inside(output_dir, name), time.monotonic()
    objects = ObjectFolder(uri)
    objects.check_reachable()
    copy, lease = RunCopy(objects, copy_path(uri, kind="runs")), Lease(objects)
    with _naming_the_store(objects):
        check_stored_owner(copy, name=name)
        lease.take(_logger.warning)
    try:
        with _naming_the_store(objects):
            _bring_up_to_date(copy)
    except BaseException:
        lease.give_back()
        raise
    waited_s = time.monotonic() - began
    folder = StoredFolder(copy, lease, wait_s=wait_s, waited_s=waited_s)
    folder.start()
    try:
        yield folder
    finally:
        folder.close()


def check_stored_owner(copy: RunCopy, *, name: str) -> None:
    """See that run `name` may be kept at the copy's place on the store; writes nothing.

    Raises:
        InputError: The folder belongs to another run, or holds objects of something else.
    """
    copy.look()
    content = copy.objects.read(IDENTITY_FILE)
    if content is None and copy.listing:
        raise InputError(
            f"{copy.objects}: holds objects but no {IDENTITY_FILE}, so it is not a run of ours; "
            "choose another name or output_dir"
        )
    owner = name if content is None else json.loads(content).get("name")
    if owner != name:
        raise InputError(
            f"{copy.objects}: belongs to run {owner!r}, not {name!r}; choose another name or "
            "output_dir, or move the folder away"
        )


def _bring_up_to_date(copy: RunCopy) -> None:
    """Make the copy what the store has, unless it is this copy that was driven last."""
    copy.look()  # again: nobody else writes there now
    if copy.path.exists():
        if copy.objects.read(WRITER) == copy.ledger.identity.encode():
            # What was begun here anew and not told is told first, or what it replaced would come.
            Pusher(copy).push()
        elif copy.unpushed():
            _logger.warning(
                "%s was written from elsewhere, or removed: what %s had of its own is now in %s",
                copy.objects,
                copy.path,
                copy.set_aside(),
            )
        else:
            copy.drop_what_differs()
    copy.path.mkdir(parents=True, exist_ok=True)
    copy.bring(is_small)
    copy.ledger.save()
    copy.objects.write(WRITER, copy.ledger.identity.encode())


@contextlib.contextmanager
def _naming_the_store(objects: ObjectFolder) -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        raise StorageError(
            f"{KEY}={objects.uri}: the store does not answer as it should"
            f"{because(objects.uri, error)}"
        ) from error
