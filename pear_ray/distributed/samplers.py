"""A pool of engine actors for collecting and evaluating: prompts in, completions out, in order."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import ray
from ray.util import ActorPool

from pear_ray.config.run import RunConfig
from pear_ray.distributed import in_process
from pear_ray.distributed.capacity import num_threads, worker_environment, worker_resources
from pear_ray.distributed.failures import engine_errors
from pear_ray.engines.vllm.spec import EngineSpec, Sampling
from pear_ray.records import Completion

PROMPTS_PER_CALL = (
    64  # enough sequences to keep an engine's batch full, few enough to show progress
)


class EngineActor:
    """One engine in an actor process of its own."""

    def __init__(self, spec: EngineSpec, num_threads: int) -> None:
        self._name = Path(spec.model).name  # first: Ray asks for it when what follows fails
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
    """`cluster.num_samplers` engines on one model; `load` gives them all another checkpoint."""

    def __init__(self, config: RunConfig, spec: EngineSpec, *, stage: str) -> None:
        wanted = worker_resources(config.cluster)
        make = ray.remote(EngineActor).options  # type: ignore[attr-defined] - built by ray.remote
        self._actors = [
            make(
                name=f"{config.name}/{stage}/sampler-{index}-{os.getpid()}",
                num_cpus=wanted["CPU"],
                num_gpus=wanted.get("GPU", 0),
                runtime_env={"env_vars": worker_environment(config.cluster)},
            ).remote(spec, num_threads(config.cluster))
            for index in range(config.cluster.num_samplers)
        ]

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
        for actor in self._actors:
            ray.kill(actor)

    def load(self, folder: Path, *, max_gap: float) -> float:
        """Put the checkpoint in `folder` into every engine; the largest log-prob gap found."""
        with engine_errors("loading a checkpoint"):
            return max(ray.get([actor.load.remote(str(folder), max_gap) for actor in self._actors]))

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
        pool = ActorPool(self._actors)
        done: list[list[Completion]] = []
        num_tokens = 0
        with engine_errors("sampling"):
            for part in pool.map(_call_generate, calls):
                done += part
                num_tokens += sum(len(each.token_ids) for group in part for each in group)
                progress(len(done), num_tokens)
        return done

    def _prompts_per_call(self, num_prompts: int) -> int:
        share = -(-num_prompts // len(self._actors))
        return max(1, min(PROMPTS_PER_CALL, share))


def _call_generate(actor: Any, call: tuple[list[list[int]], list[Any]]) -> Any:
    return actor.generate.remote(*call)
