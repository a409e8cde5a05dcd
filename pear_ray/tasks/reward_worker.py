"""The process a verifier runs in: reads chunks of items, answers each, and may be killed anytime.

Started by the reward pool as `python -m pear_ray.tasks.reward_worker REWARDS PARENT_PID`, where
REWARDS is the rewards section as JSON. One JSON line in is a chunk
`[[problem_id, task, question, entry, completion_text], ...]`; one JSON line out per item is
`[status, value, detail, components, answer]`, written as soon as it is known, so that the parent
always knows which item is in flight.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import IO

from pear_ray.config.rewards import RewardConfig
from pear_ray.errors import ConfigError
from pear_ray.records import Problem, Reward, RewardStatus
from pear_ray.tasks.components import ComponentError, load_verifier
from pear_ray.tasks.verifiers import Verifier

MAX_DETAIL_CHARS = 1000
SHOWN_FRAMES = 3
"""The innermost ones: where a verifier broke is in its own code or just below."""
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def main(rewards: str, parent_pid: int) -> None:
    """Answers chunks until the parent closes its end."""
    _die_with(parent_pid)
    config = RewardConfig.model_validate_json(rewards)
    resource.setrlimit(resource.RLIMIT_AS, (config.memory_bytes, config.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = _take_over_stdio()
    try:
        verifier = load_verifier(config)
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
            detail = reward.detail[:MAX_DETAIL_CHARS]
            said = [str(reward.status), reward.value, detail, dict(reward.components)]
            _send(answers, [*said, reward.answer])


def _reward_of(verifier: Verifier, problem: Problem, completion_text: str) -> Reward:
    # The process boundary: what a verifier raises becomes an ERRORED reward, never a zero.
    try:
        return verifier(problem, completion_text)
    except ComponentError as error:
        cause = error.__cause__ or error
        return Reward(RewardStatus.ERRORED, 0.0, f"component `{error}`: {_raised(cause)}")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a verifier raises
        return Reward(RewardStatus.ERRORED, 0.0, _raised(error))


def _raised(error: BaseException) -> str:
    """What was raised, then the last lines of its traceback."""
    frames = traceback.extract_tb(error.__traceback__)[-SHOWN_FRAMES:]
    # The end of a long message, such as sympy's, is cut, and never the frames.
    said = f"{type(error).__name__}: {error}"[: MAX_DETAIL_CHARS // 2].rstrip()
    lines = [f"  {Path(f.filename).name}:{f.lineno} in {f.name}: {f.line}" for f in frames]
    return "\n".join([said, *lines])


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
