"""A reward of several components: their weighted sum, and what is correct decided by some."""

import functools
import logging
import math
from importlib.util import find_spec

from pear_ray.config.rewards import ComponentConfig, RewardConfig, name_of, outcomes
from pear_ray.errors import ConfigError
from pear_ray.records import Problem, Reward, RewardStatus
from pear_ray.tasks.function_verifier import load_function, verify_function
from pear_ray.tasks.math_verifier import verify_math
from pear_ray.tasks.unit_tests import verify_unit_tests
from pear_ray.tasks.verifiers import Verifier, verify, verify_exact, verify_regex


class ComponentError(Exception):
    """A component could not judge; its cause is what it raised."""


def load_verifier(config: RewardConfig) -> Verifier:
    """The verifier of all components together, with what they import loaded.

    Raises:
        ConfigError: A function cannot be loaded, or an extra is not installed.
    """
    parts = [
        (name_of(each), each.weight, decides, _loaded(each))
        for each, decides in zip(config.components, outcomes(config), strict=True)
    ]

    def verify_all_parts(problem: Problem, completion_text: str) -> Reward:
        return _summed(parts, problem, completion_text)

    return verify_all_parts


def _summed(
    parts: list[tuple[str, float, bool, Verifier]], problem: Problem, completion_text: str
) -> Reward:
    """The weighted sum; OK where every component that decides says so, whatever the sum is."""
    total, is_correct, details, answer = 0.0, True, [], None
    values: dict[str, float] = {}
    for name, weight, decides, verifier in parts:
        try:
            reward = verifier(problem, completion_text)
        except (Exception, SystemExit) as error:
            raise ComponentError(name) from error
        values[name] = reward.value
        total += weight * reward.value
        is_correct = is_correct and (not decides or reward.status is RewardStatus.OK)
        if decides and answer is None:  # of several that decide, the first that extracts has a vote
            answer = reward.answer
        if reward.detail:
            details.append(reward.detail if len(parts) == 1 else f"{name}: {reward.detail}")
    if not math.isfinite(total):
        raise ValueError(f"the components {values} sum to {total}, not to a finite number")
    status = RewardStatus.OK if is_correct else RewardStatus.FAILED
    return Reward(status, total, "; ".join(details), values, answer)


def _loaded(component: ComponentConfig) -> Verifier:
    """One component's verifier; slow imports are paid here, so that no deadline counts them."""
    match component.kind:
        case "game":
            import reasoning_gym  # noqa: F401, PLC0415

            return verify
        case "exact":
            return functools.partial(verify_exact, component)
        case "regex":
            return functools.partial(verify_regex, component)
        case "math":
            check_math_installed()
            import math_verify  # noqa: F401, PLC0415

            # It warns that it has no time limit of its own, in every process; the pool has one.
            logging.getLogger("math_verify").setLevel(logging.ERROR)
            return functools.partial(verify_math, component)
        case "function":
            function = load_function(component.function)
            return functools.partial(verify_function, component, function)
        case "unit_tests":
            return functools.partial(verify_unit_tests, component)


def check_math_installed() -> None:
    """See that math-verify is there.

    Raises:
        ConfigError: It is not.
    """
    if find_spec("math_verify") is None:
        raise ConfigError(
            "a reward component of kind `math` wants math-verify, which is not installed; "
            "pip install 'pear-ray[math]', or use kind `exact`"
        )
