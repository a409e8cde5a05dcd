"""What many rewards sum up to, and when too many of them are no verdict."""

import math
from collections.abc import Iterable, Mapping, Sequence

from pear_ray.errors import RewardError
from pear_ray.records import Reward, RewardStatus

_COMPONENT = "component/"


def check_errored(*, errored: float, total: float, limit: float, key: str, first: str) -> None:
    """See that enough rewards are verdicts.

    Args:
        errored: How many rewards could not be computed.
        total: Of how many.
        limit: The share that may; where nothing was computed, no limit allows it.
        key: The section that sets the limit, such as `rl.rewards`.
        first: What the first of them says.

    Raises:
        RewardError: They are not.
    """
    if errored and (errored > limit * total or errored >= total):
        raise RewardError(
            f"{errored:g} of {total:g} rewards could not be computed "
            f"({key}.max_errored_fraction={limit:g}); the first: {first}"
        )


def reward_sums(groups: Sequence[Sequence[Reward]]) -> dict[str, float]:
    """Sums over the rewards of groups; those of several ranks add up. Errored ones are left out.

    A group is degenerate where all its outcomes agree: what a shaped sum adds is no outcome.
    """
    judged = [one for group in groups for one in group if is_verdict(one)]
    outcomes = [found for group in groups if (found := outcomes_of(group))]
    sums = {
        "rewards": sum(map(len, groups)),
        "judged": len(judged),
        "reward": sum(one.value for one in judged),
        "reward_squared": sum(one.value**2 for one in judged),
        "correct": sum(one.status is RewardStatus.OK for one in judged),
        "judged_groups": len(outcomes),
        "degenerate": sum(len(each) == 1 for each in outcomes),
    }
    for name in {name for one in judged for name in one.components}:
        sums[_COMPONENT + name] = sum(one.components[name] for one in judged)
    return {key: float(value) for key, value in sums.items()}


def reward_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a step from its summed `reward_sums`; the names lack their stage."""
    judged = max(1.0, sums["judged"])
    mean = sums["reward"] / judged
    return {
        "reward/mean": mean,
        "reward/std": deviation(mean, sums["reward_squared"] / judged),
        "correct_fraction": sums["correct"] / judged,
        "errored_fraction": 1 - sums["judged"] / sums["rewards"],
        "degenerate_group_fraction": sums["degenerate"] / max(1.0, sums["judged_groups"]),
    } | {
        f"reward/{key.removeprefix(_COMPONENT)}/mean": value / judged
        for key, value in sums.items()
        if key.startswith(_COMPONENT)
    }


def deviation(mean: float, mean_square: float) -> float:
    """The standard deviation of all values, from their mean and that of their squares."""
    return math.sqrt(max(0.0, mean_square - mean**2))  # rounding must not make it imaginary


def outcomes_of(group: Iterable[Reward]) -> set[RewardStatus]:
    """The outcomes that occur in a group: one where it is degenerate, none without a verdict."""
    return {one.status for one in group if is_verdict(one)}


def first_error(rewards: Iterable[Reward]) -> str:
    """What the first errored reward says; of another rank's, that it is there."""
    return next((one.detail for one in rewards if not is_verdict(one)), "on another rank")


def is_verdict(reward: Reward) -> bool:
    """Whether the verifier said something of the answer."""
    return reward.status is not RewardStatus.ERRORED
