"""From a completion to a three-state reward, by the game's own rule."""

import functools
import importlib
import json
import math
import re
from collections.abc import Callable
from typing import Any

from pear_ray.errors import ConfigError
from pear_ray.records import Problem, Reward, RewardStatus
from pear_ray.tasks.games import open_game

Verifier = Callable[[Problem, str], Reward]

GAME_VERIFIER = "pear_ray.tasks.verifiers:verify"
"""The verifier of reasoning-gym problems, as the reward pool names it."""

# Innermost pairs only, so that a stray open tag earlier in the text does not swallow the answer.
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)


def extract_answer(completion_text: str) -> str | None:
    """What stands between the last `<answer>` and `</answer>`, stripped; None without a pair."""
    answers = _ANSWER.findall(completion_text)
    return answers[-1].strip() if answers else None


def verify(problem: Problem, completion_text: str) -> Reward:
    """1.0 and OK when the game scores the answer as exactly right, else 0.0 and FAILED.

    The reward is the task's outcome and is not shaped: partial credit only shows in `detail`.
    Whatever the game's verifier raises passes through; the reward pool reports it as ERRORED.
    """
    answer = extract_answer(completion_text)
    if answer is None:
        return Reward(RewardStatus.FAILED, 0.0, "no answer")
    dataset, item = _game_and_item(problem.task, problem.entry)
    score = float(dataset.score_answer(answer, item))
    if not math.isfinite(score):
        raise ValueError(f"{problem.problem_id}: the game's score is {score}, not a finite number")
    if score == 1.0:
        return Reward(RewardStatus.OK, 1.0)
    return Reward(RewardStatus.FAILED, 0.0, f"partial score {score:.3g}" if score > 0 else "")


@functools.lru_cache(maxsize=4096)
def _game_and_item(task: str, entry: str) -> tuple[Any, dict[str, Any]]:
    """The open game and the problem's record; a group's completions share one entry."""
    record = json.loads(entry)
    params = json.dumps(record["params"], sort_keys=True)
    dataset = open_game(task, params, record["seed"])
    return dataset, record["item"] or dataset[record["index"]]


def load_verifier(spec: str) -> Verifier:
    """The function that `module:function` names.

    Raises:
        ConfigError: When it cannot be imported or is not callable.
    """
    module_name, separator, function_name = spec.partition(":")
    if not separator or not module_name or not function_name:
        raise ConfigError(f"verifier is `{spec}`; write it as `module:function`")
    try:
        verifier = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"verifier `{spec}` cannot be loaded: {type(error).__name__}: {error}; "
            "the module must be importable on every node (PYTHONPATH or the job's working_dir)"
        ) from error
    if not callable(verifier):
        raise ConfigError(f"verifier `{spec}` is a {type(verifier).__name__}; name a function")
    return verifier
