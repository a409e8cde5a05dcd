"""A pool of engine actors for collecting and evaluating: prompts in, completions out, in order."""

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import ray

from pear_ray.config.run import RunConfig
from pear_ray.distributed import in_process
from pear_ray.distributed.capacity import num_threads, worker_environment, worker_resources
from pear_ray.distributed.failures import engine_errors
from pear_ray.engines.importing import collector_paused
from pear_ray.engines.vllm.spec import EngineSpec, Sampling
from pear_ray.records import Completion

PROMPTS_PER_CALL = (
    64  # enough sequences to keep an engine's batch full, few enough to show progress
)


class EngineActor:
    """One engine in an actor process of its own."""

    def __init__(self, spec: EngineSpec, num_threads: int) -> None:
        self._name = Path(spec.model).name  # first: Ray asks for it when what follows fails
        with collector_paused():
            import torch  # noqa: PLC0415 - the driver that names this class needs no torch

            from pear_ray.engines.vllm.engine import VllmEngine  # noqa: PLC0415 - nor vLLM

        torch.set_num_threads(num_threads)
        self._engine = VllmEngine(spec, takes_weights=True)

    def __repr__(self) -> str:
        """What the Ray dashboard calls this actor."""
        return f"Sampler({self._name})"

    def generate(
        self, prompts: list[list[int]], sampling: list[Sampling]
    ) -> list[list[Completion]]:
        """Completions of each prompt; see `VllmEngine.generate`."""
        return self._engine.generate(prompts, sampling)

    def load(self, folder: str, max_gap: float) -> float:
        """Take the weights of `folder`, checked; see `engines.weights.load_checkpoint`."""
        from pear_ray.engines.weights import load_checkpoint  # noqa: PLC0415

        gap = load_checkpoint(self._engine, Path(folder), max_gap=max_gap)
        self._name = "/".join(Path(folder).parts[-2:])
        return gap


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
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}  # by what tells that the actor can be called
        self._all: list[Any] = []
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
        for actor in self._all:
            ray.kill(actor)

    def load(self, folder: Path, *, max_gap: float) -> float:
        """Put the checkpoint in `folder` into every engine; the largest log-prob gap found.

        Engines that are still to come take it, checked alike, before they are asked for anything.
        """
        self._loaded = (str(folder), max_gap)
        first, later = self._idle, list(self._starting.values())
        self._idle, self._starting = [], {}
        waited = {actor.load.remote(*self._loaded): actor for actor in first}
        self._starting = waited | {actor.load.remote(*self._loaded): actor for actor in later}
        gaps: list[float] = []
        with engine_errors("loading a checkpoint"):
            while not gaps or any(ref in self._starting for ref in waited):
                [ref], _ = ray.wait(list(self._starting), num_returns=1)
                gap = self._settle(ref)
                if gap is not None:
                    gaps.append(gap)
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
        left = deque(range(len(calls)))
        running: dict[Any, tuple[Any, int]] = {}
        while left or running:
            while left and self._idle:
                actor, place = self._idle.pop(0), left.popleft()
                running[actor.generate.remote(*calls[place])] = (actor, place)
            [ref], _ = ray.wait([*running, *self._starting], num_returns=1)
            if ref in self._starting:
                self._settle(ref)
                continue
            actor, place = running.pop(ref)
            try:
                answer = ray.get(ref)
            except ray.exceptions.RayActorError as error:
                self._replace(actor, error)
                left.appendleft(place)
                continue
            self._idle.append(actor)
            yield place, answer

    def _start(self) -> None:
        wanted = worker_resources(self._config.cluster)
        make = ray.remote(EngineActor).options  # type: ignore[attr-defined] - built by ray.remote
        actor = make(
            name=f"{self._config.name}/{self._stage}/sampler-{next(self._count)}-{os.getpid()}",
            num_cpus=wanted["CPU"],
            num_gpus=wanted.get("GPU", 0),
            runtime_env={"env_vars": worker_environment(self._config.cluster)},
        ).remote(self._spec, num_threads(self._config.cluster))
        ready = actor.load.remote(*self._loaded) if self._loaded else actor.__ray_ready__.remote()
        self._all.append(actor)
        self._starting[ready] = actor

    def _settle(self, ref: Any) -> float | None:
        """The engine behind `ref` can be called; what its loading found. None where it is lost."""
        actor = self._starting.pop(ref)
        try:
            found = ray.get(ref)
        except ray.exceptions.RayActorError as error:
            self._replace(actor, error)
            return None
        self._idle.append(actor)
        return found if isinstance(found, float) else None

    def _replace(self, actor: Any, error: ray.exceptions.RayActorError) -> None:
        """Start another engine for one that is lost.

        Raises:
            RayActorError: `error`, where the engine could not start: it would not again; or too
                many are lost.
        """
        self._num_lost += not error.preempted  # where a host goes as was announced, nothing failed
        cannot_start = "creation task" in str(error)
        if cannot_start or self._num_lost > self._config.cluster.max_failures:
            raise error
        self._all.remove(actor)
        self._start()

    def _prompts_per_call(self, num_prompts: int) -> int:
        share = -(-num_prompts // self._config.cluster.num_samplers)
        return max(1, min(PROMPTS_PER_CALL, share))
