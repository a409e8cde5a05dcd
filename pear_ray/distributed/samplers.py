"""A pool of engine actors for collecting and evaluating: prompts in, completions out, in order."""

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import ray

from pear_ray.config.run import RunConfig
from pear_ray.distributed import in_process
from pear_ray.distributed.engine_actors import Engine, start_engine
from pear_ray.distributed.failures import engine_errors
from pear_ray.engines.vllm.spec import EngineSpec, Sampling
from pear_ray.records import Completion

PROMPTS_PER_CALL = (
    64  # enough sequences to keep an engine's batch full, few enough to show progress
)
LOST_S = 5.0  # that an engine's other actors get to say that one of them is gone


class Samplers(Protocol):
    """Engines that answer as one, and take weights."""

    def load(self, folder: Path, *, max_gap: float) -> float:
        """Put the checkpoint in `folder` into every engine; the largest log-prob gap found."""

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sequence[Sampling],
        *,
        progress: Callable[[int, int], None],
        prompts_per_call: int | None = None,
    ) -> list[list[Completion]]:
        """Completions of each prompt, in the order of `prompts`."""


@contextlib.contextmanager
def open_samplers(config: RunConfig, spec: EngineSpec, *, stage: str) -> Iterator[Samplers]:
    """The run's engines on `spec`: actors, or the one of a process that is its own group."""
    if in_process.is_host():
        yield HostSampler(spec)
        return
    with SamplerPool(config, spec, stage=stage) as pool:
        yield pool


class HostSampler:
    """The engine of this process; it gets the same calls as an engine of a pool of one."""

    def __init__(self, spec: EngineSpec) -> None:
        self._engine = in_process.open_engine(spec)

    def load(self, folder: Path, *, max_gap: float) -> float:
        """As in `Samplers`."""
        from pear_ray.engines.weights import load_checkpoint  # noqa: PLC0415

        return load_checkpoint(self._engine, folder, max_gap=max_gap)

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sequence[Sampling],
        *,
        progress: Callable[[int, int], None],
        prompts_per_call: int | None = None,
    ) -> list[list[Completion]]:
        """As in `Samplers`."""
        size = prompts_per_call or PROMPTS_PER_CALL
        done: list[list[Completion]] = []
        num_tokens = 0
        for begin in range(0, len(prompts), size):
            call = slice(begin, begin + size)
            part = self._engine.generate(prompts[call], sampling[call])
            done += part
            num_tokens += sum(len(one.token_ids) for group in part for one in group)
            progress(len(done), num_tokens)
        return done


@dataclass(eq=False, slots=True)
class _Call:
    """Something that an engine was asked, of all its actors alike.

    Attributes:
        engine: The engine.
        refs: What is still to be answered, by its actors.
        first: Whose answer counts.
        place: Of the prompts that it is about; None for a start, or a checkpoint to load.
        answer: That of `first`.
        is_lost: Whether the engine went before it answered.
    """

    engine: Engine
    refs: list[Any]
    first: Any
    place: int | None = None
    answer: Any = None
    is_lost: bool = False


class SamplerPool:
    """`cluster.num_samplers` engines on one model; `load` gives them all another checkpoint.

    Work begins with the engines that are there, and the others take their share when they come. One
    whose process or host is lost is replaced, at most `cluster.max_failures` times, and another one
    makes its call again.
    """

    def __init__(self, config: RunConfig, spec: EngineSpec, *, stage: str) -> None:
        self._config, self._spec, self._stage = config, spec, stage
        self._count = itertools.count()
        self._num_lost = 0
        self._loaded: tuple[str, float] | None = None
        self._idle: list[Engine] = []
        self._under_way: dict[Any, _Call] = {}  # by each ref
        self._all: list[Engine] = []
        for _ in range(config.cluster.num_samplers):
            self._start()

    def __enter__(self) -> "SamplerPool":
        """The pool; its actors end with the `with` block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the actors, so that their devices are free for the next stage."""
        for engine in self._all:
            engine.end()

    def load(self, folder: Path, *, max_gap: float) -> float:
        """Put the checkpoint in `folder` into every engine; the largest log-prob gap found.

        Engines that are still to come take it, checked alike, before they are asked for anything.
        """
        self._loaded = (str(folder), max_gap)
        first, later = self._idle, {id(call): call.engine for call in self._under_way.values()}
        self._idle, self._under_way = [], {}
        waited = [self._ask(engine, "load", *self._loaded) for engine in first]
        for engine in later.values():
            self._ask(engine, "load", *self._loaded)
        gaps: list[float] = []
        with engine_errors("loading a checkpoint"):
            while not gaps or any(call.refs and not call.is_lost for call in waited):
                call = self._next_done()
                if not call.is_lost:
                    self._idle.append(call.engine)
                    gaps.append(call.answer)
        return max(gaps)

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sequence[Sampling],
        *,
        progress: Callable[[int, int], None],
        prompts_per_call: int | None = None,
    ) -> list[list[Completion]]:
        """Completions of each prompt, in the order of `prompts`.

        Args:
            prompts: Token ids per prompt.
            sampling: One per prompt.
            progress: Called with the prompts done and the tokens sampled so far.
            prompts_per_call: What an engine gets at once. None: as suits the number of engines.
        """
        calls = [
            (list(prompts[begin : begin + size]), list(sampling[begin : begin + size]))
            for size in [prompts_per_call or self._prompts_per_call(len(prompts))]
            for begin in range(0, len(prompts), size)
        ]
        parts: dict[int, list[list[Completion]]] = {}
        num_tokens = 0
        with engine_errors("sampling"):
            for place, part in self._answers(calls):
                parts[place] = part
                num_tokens += sum(len(each.token_ids) for group in part for each in group)
                progress(sum(map(len, parts.values())), num_tokens)
        return [group for place in sorted(parts) for group in parts[place]]

    def _answers(
        self, calls: Sequence[tuple[list[list[int]], list[Any]]]
    ) -> Iterator[tuple[int, list[list[Completion]]]]:
        """The place of each call and its answer, as they come."""
        left, num_done = deque(range(len(calls))), 0
        while num_done < len(calls):
            while left and self._idle:
                place = left.popleft()
                self._ask(self._idle.pop(0), "generate", *calls[place], place=place)
            call = self._next_done()
            if not call.is_lost:
                self._idle.append(call.engine)
            if call.place is None:
                continue
            if call.is_lost:
                left.appendleft(call.place)
                continue
            num_done += 1
            yield call.place, call.answer

    def _start(self) -> None:
        name = f"{self._config.name}/{self._stage}/sampler-{next(self._count)}-{os.getpid()}"
        engine = start_engine(self._spec, self._config.cluster, name=name)
        self._all.append(engine)
        if self._loaded:
            self._ask(engine, "load", *self._loaded)
        else:
            self._ask(engine, "__ray_ready__")

    def _ask(self, engine: Engine, method: str, *given: Any, place: int | None = None) -> _Call:
        """Have all actors of `engine` do the same."""
        refs = [getattr(actor, method).remote(*given) for actor in engine.actors]
        call = _Call(engine, refs, refs[0], place)
        self._under_way |= dict.fromkeys(refs, call)
        return call

    def _next_done(self) -> _Call:
        """The next call that all actors of its engine have answered, or whose engine is lost.

        A lost engine is replaced.
        """
        while True:
            [ref], _ = ray.wait(list(self._under_way), num_returns=1)
            call = self._under_way.pop(ref)
            call.refs.remove(ref)
            try:
                answer = ray.get(ref)
            except ray.exceptions.RayActorError as error:
                self._lose(call, error)
                return call
            except ray.exceptions.RayTaskError as error:
                self._lose(call, _loss_behind(error, call.refs))
                return call
            if ref == call.first:
                call.answer = answer
            if not call.refs:
                return call

    def _lose(self, call: _Call, error: ray.exceptions.RayActorError) -> None:
        """Start another engine for that of `call`, which is lost.

        Raises:
            RayActorError: `error`, where the engine could not start: it would not again; or too
                many are lost.
        """
        for ref in call.refs:
            del self._under_way[ref]
        call.is_lost = True
        self._num_lost += not error.preempted  # where a host goes as was announced, nothing failed
        cannot_start = "creation task" in str(error)
        if cannot_start or self._num_lost > self._config.cluster.max_failures:
            raise error
        call.engine.end()
        self._all.remove(call.engine)
        self._start()

    def _prompts_per_call(self, num_prompts: int) -> int:
        share = -(-num_prompts // self._config.cluster.num_samplers)
        return max(1, min(PROMPTS_PER_CALL, share))


def _loss_behind(
    error: ray.exceptions.RayTaskError, others: list[Any]
) -> ray.exceptions.RayActorError:
    """What the other actors of an engine say when one raises `error`: that one of them is gone.

    Raises:
        RayTaskError: `error`, where all of them are there: it is what it says.
    """
    answered, _ = ray.wait(others, num_returns=len(others), timeout=LOST_S) if others else ([], [])
    for ref in answered:
        try:
            ray.get(ref)
        except ray.exceptions.RayActorError as lost:
            return lost
        except ray.exceptions.RayTaskError:
            continue
    raise error
