"""A user's function as a verifier."""

import importlib
import math
from collections.abc import Callable
from typing import Any, SupportsFloat

from pear_ray.config.rewards import FunctionVerifier
from pear_ray.errors import ConfigError
from pear_ray.records import Problem, Reward, RewardStatus

_KEYS = frozenset({"value", "correct", "detail", "answer"})


def load_function(spec: str) -> Callable[..., Any]:
    """The function that `module:function` names.

    Raises:
        ConfigError: When it cannot be imported or is not callable.
    """
    module_name, _, function_name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # whatever the user's module raises on import
        raise ConfigError(
            f"verifier `{spec}` cannot be loaded: {type(error).__name__}: {error}; "
            "the module must be importable on every node (PYTHONPATH or the job's working_dir)"
        ) from error
    if not callable(function):
        raise ConfigError(f"verifier `{spec}` is a {type(function).__name__}; name a function")
    return function


def verify_function(
    config: FunctionVerifier, function: Callable[..., Any], problem: Problem, completion_text: str
) -> Reward:
    """What the function says: a bool, a float, or a dict.

    A dict has `value`, and may have `correct`, `detail` and `answer`, what was extracted.

    Raises:
        TypeError: It says something else.
        ValueError: Its value is not a finite number.
    """
    said = function(problem, completion_text, **config.params)
    correct, detail, answer, value = None, "", None, said
    if isinstance(said, dict):
        if "value" not in said or not _KEYS.issuperset(said):
            raise TypeError(
                f"{config.function} returned a dict with {', '.join(map(str, said)) or 'nothing'}; "
                "it must have `value`, and may have `correct`, `detail` and `answer`"
            )
        value, correct, detail = said["value"], said.get("correct"), str(said.get("detail", ""))
        answer = None if said.get("answer") is None else str(said["answer"])
    if not isinstance(value, SupportsFloat):  # bools and numpy's numbers are among them
        raise TypeError(
            f"{config.function} returned {said!r:.100}; it must return a float, a bool or a dict"
        )
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{config.function} returned {number}; it must be a finite number")
    is_correct = number >= config.correct_at if correct is None else bool(correct)
    status = RewardStatus.OK if is_correct else RewardStatus.FAILED
    return Reward(status, number, detail, answer=answer)
