"""One driver per run, whatever machine it is on: claims in the run's folder on the store.

pyarrow knows no conditional write, so nothing is decided by who writes first. A driver puts a claim
of its own, then lists all claims. It holds the run only if that list, made after its put, shows no
other claim that is alive: of two drivers at least one sees the other, as stores list what was put
before. Times are the store's own, since clocks of machines differ.
"""

import contextlib
import json
import os
import platform
import random
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pear_ray.artifacts.stored.objects import FAILURES, ObjectFolder, Stored
from pear_ray.errors import InputError

CLAIMS = ".claims"
RENEW_S = 5.0
LEASE_S = 60.0  # a claim that was not renewed for so long is of a driver that is gone
FENCE_SHARE = 0.75  # of it without renewing, and a holder asks whether the run is still its own
_NS = 10**9


@dataclass(frozen=True, slots=True)
class Claim:
    """What one driver says of itself.

    Attributes:
        identity: Of the claim.
        host: The machine's name.
        space: Which process ids are comparable: those of one boot's process namespace.
        pid: The driver's process.
        holds: Whether it drives the run, or asks to.
        stored: When it was put, and its size.
    """

    identity: str
    host: str
    space: str
    pid: int
    holds: bool
    stored: Stored

    @property
    def is_dead(self) -> bool:
        """Whether it is of a process of this machine that has ended."""
        return (self.host, self.space) == _this_machine() and not _is_running(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lease:
    """This driver's claim; once `take` has returned, renewed by a thread until `give_back`."""

    def __init__(
        self,
        objects: ObjectFolder,
        *,
        lease_s: float = LEASE_S,
        renew_s: float = RENEW_S,
        machine: tuple[str, str] | None = None,
    ) -> None:
        """For the run at `objects`; `machine`: name and process namespace, if not this one's."""
        self._objects, self._lease_s, self._renew_s = objects, lease_s, renew_s
        self.identity = uuid.uuid4().hex
        self._host, self._space = machine or _this_machine()
        self._renewed = 0.0
        self._told = False
        self._given_back = threading.Event()
        self.lost: str | None = None  # once it is, who has the run, in words

    def take(self, say: Callable[[str], None]) -> None:
        """Hold the run; a driver that is not alive loses it, which takes up to `lease_s` to see.

        Raises:
            InputError: Another driver holds it, and is alive.
        """
        self._put(holds=False)
        try:
            self._wait_until_alone(say)
            self._put(holds=True)
        except BaseException:
            self._remove()
            raise
        threading.Thread(target=self._keep, name="pear-lease", daemon=True).start()

    def _wait_until_alone(self, say: Callable[[str], None]) -> None:
        seen: dict[str, Stored] = {}  # each other claim as it was first
        while others := self._others_alive():
            for other in others:
                if seen.setdefault(other.identity, other.stored) != other.stored and other.holds:
                    raise InputError(
                        f"{self._objects}: {other} is already driving this run; wait for it, or "
                        f"end it and start again (`pear status {self._objects.uri}` shows where "
                        "it is)"
                    )
            if holder := next((other for other in others if other.holds), None):
                if not self._told:
                    say(f"{holder} drove {self._objects}: looking whether it still does")
                self._told = True
            self._step_aside(others)
            self._put(holds=False)

    def give_back(self) -> None:
        """Let others have the run; harmless when the store does not answer."""
        self._given_back.set()
        self._remove()

    def renew(self) -> None:
        """Say that this driver lives; sets `lost` where another has taken the run over.

        Raises:
            OSError: The store does not answer.
        """
        if self.lost is None and time.monotonic() - self._renewed > self._lease_s * FENCE_SHARE:
            self.lost = self._who_has_it()
        if self.lost is None:
            self._put(holds=True)

    def _who_has_it(self) -> str | None:
        """After a silence: who took the run over, which removes this claim; None if nobody did."""
        claims = read_claims(self._objects)
        if any(claim.identity == self.identity for claim in claims):
            return None
        holder = next((claim for claim in claims if claim.holds), None)
        return f"{holder or 'another driver'} has taken it over"

    def _keep(self) -> None:
        while not self._given_back.wait(self._renew_s):
            with contextlib.suppress(*FAILURES):  # the next time asks again; pushing says it aloud
                self.renew()
            if self.lost is not None:
                return
        self._remove()  # a renewal that was under way when it was given back

    def _step_aside(self, others: list[Claim]) -> None:
        """Wait a moment; of two that ask, one takes its claim back, or both would wait for ever."""
        asking = [other for other in others if not other.holds]
        if any(other.identity < self.identity for other in asking):
            self._objects.delete(self._name(self.identity))
            time.sleep(random.uniform(0.5, 1.5))  # noqa: S311 - so that two do not meet again
        else:
            time.sleep(min(1.0, self._renew_s))

    def _others_alive(self) -> list[Claim]:
        """All other claims; those whose driver is gone are removed."""
        found = read_claims(self._objects)
        now = max((each.stored.time_ns for each in found), default=0)
        alive = []
        for claim in found:
            if claim.identity == self.identity:
                continue
            silent_s = (now - claim.stored.time_ns) / _NS
            if claim.is_dead or silent_s > self._lease_s:
                self._objects.delete(self._name(claim.identity))
            else:
                alive.append(claim)
        return alive

    def _put(self, *, holds: bool) -> None:
        content = {"host": self._host, "space": self._space, "pid": os.getpid(), "holds": holds}
        self._objects.write(self._name(self.identity), json.dumps(content).encode())
        self._renewed = time.monotonic()

    def _remove(self) -> None:
        with contextlib.suppress(*FAILURES):
            self._objects.delete(self._name(self.identity))

    def _name(self, identity: str) -> str:
        return f"{CLAIMS}/{identity}.json"


def read_claims(objects: ObjectFolder) -> list[Claim]:
    """All claims on the run at `objects`."""
    found = []
    for name, stored in objects.list(CLAIMS).items():
        content = objects.read(name)
        if content is not None:  # it was given back between the list and now
            tree: dict[str, Any] = json.loads(content)
            identity = name.removeprefix(f"{CLAIMS}/").removesuffix(".json")
            found.append(Claim(identity=identity, stored=stored, **tree))
    return found


def is_driven(objects: ObjectFolder) -> bool | None:
    """Whether a driver holds the run; None where one was silent for long, on another machine."""
    holders = [claim for claim in read_claims(objects) if claim.holds]
    if not holders or all(claim.is_dead for claim in holders):
        return False
    silent_s = time.time() - max(claim.stored.time_ns for claim in holders) / _NS
    return True if silent_s < LEASE_S else None


def _this_machine() -> tuple[str, str]:
    return platform.node(), str(Path("/proc/self/ns/pid").readlink())


def _is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
