"""What a training loop is asked to do from outside: to stop, or to save since its machine goes.

A spot machine gets a notice some time before it is taken away (AWS two minutes, the others 30 s).
Whoever gets it drains the node: an autoscaler, or `ray drain-node` with a deadline. Ray Train 2.60
then tells the group's workers, lets them run to the deadline, and starts the group again on other
nodes from its last checkpoint; that does not count to `cluster.max_failures`.

So a loop saves at once, in case the machine goes early; trains on, since another machine is hardly
there yet; saves once more when there is no time for another step; and waits to be ended. A loop
that returned would tell Ray Train that the training is done.
"""

import time
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path

from ray.train.v2._internal.constants import DEFAULT_PREEMPTION_DEADLINE_S
from ray.train.v2._internal.execution.context import get_train_context

from pear_ray.distributed.train_group import stop_wished

SAFETY = 2.0  # a next step with its save may take so many times the longest one before it
LEAST_LEFT_S = 3.0
# So long after the deadline the group should be gone; if it is not, the notice was called off.
CALLED_OFF_S = 60.0
POLL_S = 0.2


class Notice(IntEnum):
    """What the news of a node mean after a step; the largest of all ranks holds."""

    NONE = 0
    SAVE = 1
    SAVE_AND_WAIT = 2


class Wishes:
    """What one rank of a group is asked to do, and what all ranks agreed on in the last step.

    Attributes:
        stop: Whether to save and return.
        notice: Whether a node of the group goes, and what to do about it.
    """

    def __init__(self, stage_dir: Path) -> None:
        self.stop, self.notice = False, Notice.NONE
        self._stage_dir = stage_dir
        self._noticed: float | None = None  # Unix time of the first news of a node
        self._answered: float | None = None  # the deadline that this rank has saved for
        self._step_began: float | None = None
        self._longest_s = 0.0

    def mine(self) -> dict[str, float]:
        """This rank's, to go round with a step's sums; it may be asked more than once a step."""
        return {
            "max/stop": float(stop_wished(self._stage_dir)),
            "max/notice": float(self._notice()),
        }

    def agree(self, sums: Mapping[str, float]) -> None:
        """Take over what all ranks said, from the sums over them."""
        self.stop = bool(sums["max/stop"])
        self.notice = Notice(int(sums["max/notice"]))

    @property
    def save(self) -> bool:
        """Whether this step is to be saved, whatever the config says."""
        return self.stop or self.notice is not Notice.NONE

    def end_step(self, *, is_last: bool) -> None:
        """The step is over, and saved if `save` was true; waits for the end where there is one."""
        now = time.monotonic()
        if self._step_began is not None:
            self._longest_s = max(self._longest_s, now - self._step_began)
        self._step_began = now
        if self.notice is not Notice.NONE:
            self._answered = self._deadline()
        if self.notice is Notice.SAVE_AND_WAIT and not is_last:
            self._wait()

    def _notice(self) -> Notice:
        deadline = self._deadline()
        if deadline is None:
            return Notice.NONE
        left_s = deadline - time.time()
        if -CALLED_OFF_S < left_s < max(LEAST_LEFT_S, SAFETY * self._longest_s):
            return Notice.SAVE_AND_WAIT
        return Notice.NONE if deadline == self._answered else Notice.SAVE

    def _wait(self) -> None:
        """Wait for Ray Train to end this worker; return if it does not, and the node stays."""
        deadline = self._deadline() or time.time()
        while time.time() < deadline + CALLED_OFF_S:
            time.sleep(POLL_S)
        self._answered = deadline

    def _deadline(self) -> float | None:
        """Unix time at which a node of the group goes; None as long as none is to.

        Ray's public `get_preemption_info` makes all ranks agree by way of an actor, in each call;
        the loops' sums go round anyway.
        """
        try:
            context = get_train_context()
        except RuntimeError:  # a host, or a process of its own: Ray Train would end neither
            return None
        info = context.preemption_context.preemption_info
        if info is None:
            return None
        if info.deadline_ms is not None:
            return info.deadline_ms / 1000
        self._noticed = self._noticed or time.time()
        return self._noticed + DEFAULT_PREEMPTION_DEADLINE_S
