"""What the judged samples of each problem say of a checkpoint, one value per problem and metric."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pear_ray.algorithms.pass_at_k import maj_at_n, majority, mean_at_n, pass_at_k
from pear_ray.config.rewards import RewardConfig, extracts_answer, is_format_term, name_of, outcomes
from pear_ray.records import Reward, RewardStatus
from pear_ray.tasks.reward_totals import is_verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What counts of one sample: little enough to gather over ranks.

    Attributes:
        num_tokens: Of the completion, its end token included.
        is_truncated: Whether the token limit ended it.
        logprob_sum: Natural log-probs of its tokens at the sampling temperature, added up.
        reward: What its verifiers say.
    """

    num_tokens: int
    is_truncated: bool
    logprob_sum: float
    reward: Reward


def problem_values(
    groups: Sequence[Sequence[Judged]],
    rewards: RewardConfig,
    *,
    k: Sequence[int],
    num_samples: int,
) -> dict[str, list[float]]:
    """Every metric's value for each problem: a checkpoint's is their mean.

    pass@k, mean@n, maj@n, the reward, its components and their form are over the samples with a
    verdict; length, truncation and entropy are over all.

    Args:
        groups: The samples of each problem, each problem with at least `max(k)` verdicts.
        rewards: What judged them.
        k: Which pass@k.
        num_samples: The n that names mean@n and maj@n.
    """
    verdicts = [[one.reward for one in group if is_verdict(one.reward)] for group in groups]
    counts = [(len(each), _num_right(each)) for each in verdicts]
    values = {f"pass_at_{size}": [pass_at_k(*count, size) for count in counts] for size in k}
    values[f"mean_at_{num_samples}"] = [mean_at_n(*count) for count in counts]
    return (
        values
        | _votes(verdicts, rewards, num_samples=num_samples)
        | _lengths(groups)
        | _rewards(verdicts, rewards)
        | {"errored_fraction": [_mean(not is_verdict(s.reward) for s in g) for g in groups]}
    )


def _votes(
    verdicts: Sequence[Sequence[Reward]], rewards: RewardConfig, *, num_samples: int
) -> dict[str, list[float]]:
    """maj@n, and whether its majority is tied; nothing where no verifier extracts answers."""
    decides = zip(rewards.components, outcomes(rewards), strict=True)
    extracts = any(is_outcome and extracts_answer(each) for each, is_outcome in decides)
    answers = [[one.answer for one in each] for each in verdicts]
    if not extracts and all(answer is None for each in answers for answer in each):
        return {}
    return {
        f"maj_at_{num_samples}": [
            maj_at_n(given, [one.status is RewardStatus.OK for one in each])
            for given, each in zip(answers, verdicts, strict=True)
        ],
        "tied_fraction": [float(len(majority(given)) > 1) for given in answers],
    }


def _lengths(groups: Sequence[Sequence[Judged]]) -> dict[str, list[float]]:
    """Length, truncation, and mean surprise: an estimate of the entropy, per token of a problem."""
    return {
        "mean_length": [_mean(one.num_tokens for one in group) for group in groups],
        "truncated_fraction": [_mean(one.is_truncated for one in group) for group in groups],
        "entropy": [
            -sum(one.logprob_sum for one in group) / max(1, sum(one.num_tokens for one in group))
            for group in groups
        ],
    }


def _rewards(verdicts: Sequence[Sequence[Reward]], rewards: RewardConfig) -> dict[str, list[float]]:
    """The reward that is learned from; of several components each one's, and the share in form."""
    values = {"reward/mean": [_mean(one.value for one in each) for each in verdicts]}
    if len(rewards.components) > 1:
        values |= {
            f"reward/{name}/mean": [
                _mean(one.components[name] for one in each) for each in verdicts
            ]
            for name in map(name_of, rewards.components)
        }
    terms = [name_of(each) for each in rewards.components if is_format_term(each)]
    if terms:
        values["format_fraction"] = [
            _mean(all(one.components[name] == 1.0 for name in terms) for one in each)
            for each in verdicts
        ]
    return values


def _num_right(verdicts: Iterable[Reward]) -> int:
    return sum(one.status is RewardStatus.OK for one in verdicts)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
