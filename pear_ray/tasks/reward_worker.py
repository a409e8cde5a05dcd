"""The process a verifier runs in: reads chunks of items, answers each, and may be killed anytime.

Started by the reward pool as `python -m pear_ray.tasks.reward_worker SPEC PARENT_PID`. One JSON
line in is a chunk `[[problem_id, task, question, entry, completion_text], ...]`; one JSON line out
per item is `[status, value, detail]`, written as soon as it is known, so that the parent always
knows which item is in flight.
"""

import ctypes
import json
import math
import os
import resource
import signal
import sys
from typing import IO

from pear_ray.errors import ConfigError
from pear_ray.records import Problem, Reward, RewardStatus
from pear_ray.tasks.verifiers import GAME_VERIFIER, Verifier, load_verifier

ADDRESS_SPACE_BYTES = 8 << 30
"""Per process: thirty times what the games need; a runaway verifier ends in MemoryError."""
MAX_DETAIL_CHARS = 500
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def main(spec: str, parent_pid: int) -> None:
    """Answers chunks until the parent closes its end."""
    _die_with(parent_pid)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = _take_over_stdio()
    try:
        verifier = load_verifier(spec)
        if spec == GAME_VERIFIER:
            _load_games()
    except ConfigError as error:
        _send(answers, {"fatal": str(error)})
        return
    _send(answers, {"ready": True})
    for line in requests:
        # Until this is said, a death is not the items' doing.
        _send(answers, {"ready": True, "begun": True})
        for problem_id, task, question, entry, completion_text in json.loads(line):
            problem = Problem(problem_id, task, question, entry)
            reward = _reward_of(verifier, problem, completion_text)
            _send(answers, [str(reward.status), reward.value, reward.detail[:MAX_DETAIL_CHARS]])


def _reward_of(verifier: Verifier, problem: Problem, completion_text: str) -> Reward:
    # The process boundary: what a verifier raises becomes an ERRORED reward, never a zero.
    try:
        reward = verifier(problem, completion_text)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a verifier raises
        return Reward(RewardStatus.ERRORED, 0.0, f"{type(error).__name__}: {error}")
    if not isinstance(reward, Reward) or not math.isfinite(reward.value):
        detail = f"the verifier returned {reward!r}; it must return a Reward with a finite value"
        return Reward(RewardStatus.ERRORED, 0.0, detail)
    return reward


def _load_games() -> None:
    """Pays the slow import before the first item, so that no deadline counts it."""
    import reasoning_gym  # noqa: F401, PLC0415


def _die_with(parent_pid: int) -> None:
    """Asks the kernel to kill this process with its parent: a stuck one sees no end-of-file."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit("reward worker: the pool that started it is gone")


def _take_over_stdio() -> tuple[IO[str], IO[str]]:
    """The two pipe ends, with stdin and stdout pointed elsewhere: a verifier may print or read."""
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return requests, answers


def _send(answers: IO[str], message: object) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
