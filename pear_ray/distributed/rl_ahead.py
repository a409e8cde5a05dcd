"""Rollouts sampled a step before they train: verifiers work while the policy trains."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue

from pear_ray.artifacts.rollouts import read_groups, saved_steps
from pear_ray.distributed.rl_endings import check_endings
from pear_ray.distributed.rl_rollouts import RolloutMaker
from pear_ray.distributed.rl_sampling import StepBatch
from pear_ray.distributed.rl_saving import save_rollouts
from pear_ray.distributed.train_worker import Laps
from pear_ray.records import RolloutGroup

FOLDER = "ahead"  # within a checkpoint

Groups = list[RolloutGroup]


class AheadMaker:
    """Makes the rollouts of one step after the other, each sampled before the step before trains.

    Trainer and engine share a device and cannot work at once; verifiers have processes of their
    own, and do. In the place of a `BatchMaker`; all its methods but `close` are collectives.
    """

    def __init__(self, maker: RolloutMaker, *, enter: Callable[[str], None]) -> None:
        self._maker, self._enter = maker, enter
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # One thread for all: a verifier process that it replaces dies with the thread.
        threading.Thread(target=_work_off, args=(self._calls,), name="rewards", daemon=True).start()
        self._upcoming: tuple[int, Future[Groups]] | None = None

    def close(self) -> None:
        """End the thread. A pool that is still verifying for it is closed, and of no more use."""
        if self._upcoming is not None and not self._upcoming[1].done():
            self._maker.pool.close()
        self._calls.put(None)

    def make(self, step: int, *, policy_version: int, laps: Laps) -> StepBatch:
        """The step's groups, with their rewards; the next step's are being verified from here on.

        Raises:
            RewardError: Too large a share of the rewards could not be computed.
            HandoverError: It is the first step, and the policy does not end its completions.
        """
        maker = self._maker
        # The first step has none before it, nor has one after a checkpoint that holds none.
        _, rewarded = self._upcoming or self._sample(step, policy_version=policy_version)
        self._upcoming = None
        if step + 1 < maker.config.num_steps:
            self._upcoming = self._sample(step + 1, policy_version=policy_version)
        laps.lap("sample")
        self._enter("reward")
        groups = rewarded.result()
        maker.check_rewards(groups)
        laps.lap("reward")
        return StepBatch(groups, groups)

    def save(self, folder: Path) -> None:
        """Write what is ahead, with its rewards: a verifier need not say the same twice."""
        if self._upcoming is not None:
            step, rewarded = self._upcoming
            save_rollouts(
                rewarded.result(),
                folder / FOLDER,
                step=step,
                temperature=self._maker.config.temperature,
            )

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote, on any number of ranks."""
        for step, file in saved_steps(folder / FOLDER).items():
            done: Future[Groups] = Future()
            # Dealt as when they were sampled.
            done.set_result(read_groups(file)[self._maker.rank :: self._maker.world_size])
            self._upcoming = (step - 1, done)  # files count from 1

    def _sample(self, step: int, *, policy_version: int) -> tuple[int, Future[Groups]]:
        """The step's completions, whose rewards are under way."""
        self._enter("sample")
        sampled = self._maker.sample(step)
        if step == 0:
            check_endings(self._maker, sampled)
        rewarded: Future[Groups] = Future()

        def reward() -> None:
            try:
                rewarded.set_result(self._maker.reward(sampled, policy_version=policy_version))
            except BaseException as error:  # noqa: BLE001 - raised again where they are wanted
                rewarded.set_exception(error)

        self._calls.put(reward)
        return step, rewarded


def _work_off(calls: SimpleQueue[Callable[[], None] | None]) -> None:
    """Call one after the other, until there is None."""
    while (call := calls.get()) is not None:
        call()
        del call  # what it holds on to is not this thread's to keep
