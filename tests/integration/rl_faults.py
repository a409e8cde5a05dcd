"""Faults in the middle of what a phase of an RL step does; workers import it by its folder."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pear_ray.distributed.rl_loop import GrpoWorker
from pear_ray.engines.native_trainer import NativeTrainer
from pear_ray.engines.vllm.engine import VllmEngine
from pear_ray.engines.vllm.weights import WeightSender
from pear_ray.tasks.reward_pool import RewardPool


class Faults:
    """Each strikes once, in its step, and leaves the time in a file."""

    def __init__(
        self, steps: dict[str, int], folder: Path, ranks: dict[str, int] | None = None
    ) -> None:
        self.steps, self.folder, self.step = steps, folder, -1
        self.ranks = ranks or {}

    def strikes(self, fault: str) -> bool:
        mark = self.folder / f"struck {fault}"
        if self.steps.get(fault) != self.step or mark.exists():
            return False
        if self.ranks.get(fault, 0) != dist.get_rank():
            return False
        mark.write_text(str(time.time()), encoding="utf-8")
        return True

    def plant(self) -> None:
        """Into this process."""
        # By the method that a phase spends its time in.
        wrap(GrpoWorker, "step", before=self._note_step)
        wrap(VllmEngine, "generate", before=self._raise, after=self._kill("killed in sample"))
        wrap(RewardPool, "verify_all", before=self._kill_pool, after=self._kill("killed in reward"))
        wrap(NativeTrainer, "step", after=self._kill("killed in train"))
        wrap(WeightSender, "publish_weights", after=self._kill("killed in sync"))
        wrap(NativeTrainer, "save", after=self._cut_save)

    def _note_step(self, worker: GrpoWorker, step: int) -> None:
        self.step = step

    def _raise(self, engine: VllmEngine, *args: Any) -> None:
        if self.strikes("engine raises"):
            steps_left = iter(range(3))
            whole = engine.llm.llm_engine.step

            def step() -> Any:
                if next(steps_left, None) is None:
                    raise RuntimeError("planted: the device was lost")
                return whole()

            engine.llm.llm_engine.step = step

    def _kill_pool(self, pool: RewardPool, *args: Any) -> None:
        if self.strikes("reward pool killed"):
            pool.wait_until_ready()
            for process in pool._processes:
                os.killpg(process._popen.pid, signal.SIGKILL)

    def _kill(self, fault: str) -> Callable[..., None]:
        def kill(*args: Any) -> None:
            if self.strikes(fault):
                os.kill(os.getpid(), signal.SIGKILL)

        return kill

    def _cut_save(self, trainer: NativeTrainer, folder: Path) -> None:
        if self.strikes("killed in checkpoint"):
            for file in folder.iterdir():
                os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)


def nothing(*args: Any) -> None:
    pass


def wrap(
    owner: Any,
    name: str,
    *,
    before: Callable[..., None] = nothing,
    after: Callable[..., None] = nothing,
) -> None:
    whole = getattr(owner, name)

    def wrapped(*args: Any) -> Any:
        before(*args)
        result = whole(*args)
        after(*args)
        return result

    setattr(owner, name, wrapped)
