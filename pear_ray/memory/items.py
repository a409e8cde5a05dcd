"""What a device holds: items, moments at which they are held together, phases made of moments."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

GIB = 2**30


class Verdict(StrEnum):
    """Whether a phase fits; `TIGHT` does if the slack is not needed."""

    FITS = "fits"
    TIGHT = "tight"
    TOO_LARGE = "does not fit"
    UNKNOWN = "not judged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One thing on a device.

    Attributes:
        name: What it is.
        num_bytes: How much memory it takes.
        formula: How that came about, in words.
        setting: Dotted key of the setting that changes it most, where there is one.
    """

    name: str
    num_bytes: int
    formula: str
    setting: str | None = None


@dataclass(frozen=True, slots=True)
class Moment:
    """What is held at the same time."""

    name: str
    items: tuple[Item, ...]

    @property
    def num_bytes(self) -> int:
        """All items together."""
        return sum(item.num_bytes for item in self.items)

    @property
    def largest(self) -> Item:
        """The item that takes the most."""
        return max(self.items, key=lambda item: item.num_bytes)


@dataclass(frozen=True, slots=True)
class Shortage:
    """A setting that leaves an engine too little to start with, however much there is."""

    setting: str
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """The memory of one stage, per device (on CPU: per worker).

    Attributes:
        name: The stage's name.
        num_workers: Workers that it has at once.
        moments: At which its memory may be at its highest.
        available_bytes: What one worker has; None where that is not known.
        shortage: What an engine of the phase lacks, if it does.
        slack_bytes: By how much measured peaks were above such a plan, at most; 0 where nothing was
            measured.
        on_host: What one worker holds in the host's memory beside that; not judged.
        notes: What the numbers leave out or only estimate.
    """

    name: str
    num_workers: int
    moments: tuple[Moment, ...]
    available_bytes: int | None
    shortage: Shortage | None = None
    slack_bytes: int = 0
    on_host: tuple[Item, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> Moment:
        """The moment that takes the most."""
        return max(self.moments, key=lambda moment: moment.num_bytes)

    @property
    def verdict(self) -> Verdict:
        """Whether the peak fits into what there is, and an engine can start."""
        if self.shortage:
            return Verdict.TOO_LARGE
        if self.available_bytes is None:
            return Verdict.UNKNOWN
        if self.peak.num_bytes > self.available_bytes:
            return Verdict.TOO_LARGE
        is_tight = self.peak.num_bytes + self.slack_bytes > self.available_bytes
        return Verdict.TIGHT if is_tight else Verdict.FITS


def moment(name: str, *groups: Iterable[Item]) -> Moment:
    """A moment that holds all items of `groups`; those of no bytes are left out."""
    return Moment(name, tuple(item for group in groups for item in group if item.num_bytes))


def summary(phase: Phase) -> str:
    """A phase in one line: the verdict, what it takes, what there is, and when."""
    had = "" if phase.available_bytes is None else f" of {size(phase.available_bytes)}"
    workers = f"{phase.num_workers} worker{'s' if phase.num_workers > 1 else ''}"
    return (
        f"{phase.verdict}: {size(phase.peak.num_bytes)}{had} for each of {workers}, "
        f"most at {phase.peak.name}"
    )


def beside(moments: Sequence[Moment], resident: Sequence[Item]) -> tuple[Moment, ...]:
    """Each of `moments` with `resident` held as well."""
    return tuple(moment(each.name, resident, each.items) for each in moments)


def size(num_bytes: int) -> str:
    """A size for people: GiB, or MiB below a tenth of one."""
    if num_bytes < GIB // 10:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / GIB:.2f} GiB"
