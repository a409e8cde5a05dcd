"""A checkpoint's readiness in numbers, from its rollouts on the problems of RL."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pear_ray.algorithms import advantages
from pear_ray.algorithms.mixed_groups import fit_beta, mixed_beyond, mixed_within
from pear_ray.algorithms.pass_at_k import bootstrap_interval, pass_at_k
from pear_ray.artifacts.rollouts import read_groups
from pear_ray.config.run import RunConfig
from pear_ray.errors import ArtifactError
from pear_ray.records import FinishReason, RewardStatus, Rollout, RolloutGroup
from pear_ray.reporting.load import Estimate
from pear_ray.tasks.reward_totals import is_verdict

GROUP_SIZES = (2, 4, 8, 16, 32, 64)  # beside the configured one


@dataclasses.dataclass(frozen=True, slots=True)
class Drift:
    """How far SFT has moved the policy, on samples of the checkpoint.

    Attributes:
        kl_per_token: KL(checkpoint || base), nats: a token mean of k1 over the sampled tokens.
        kl_per_completion: Its sum over a completion, a mean over completions.
        k3_per_token: The token mean by k3.
        num_completions: How many the base has scored.
    """

    kl_per_token: Estimate
    kl_per_completion: float
    k3_per_token: float
    num_completions: int


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """What a few steps of RL did to the mean reward.

    Attributes:
        rewards: Of each step, by seed.
        change: Mean over seeds of the later half's mean reward minus the earlier half's. Every step
            has other prompts: the interval is what their spread alone lets expect.
        num_rising: Seeds in which it rose.
    """

    rewards: dict[int, list[float]]
    change: Estimate
    num_rising: int


@dataclasses.dataclass(frozen=True, slots=True)
class Readiness:
    """What the rollouts say.

    A prompt is a group: one visit to a problem. Fractions of prompts leave out those without a
    verdict, fractions of completions are of all of them.

    Attributes:
        group_size: As configured.
        prompts_per_step: As configured.
        temperature: Of the rollouts.
        max_tokens: At which completions were cut.
        confidence: Level of the intervals.
        num_steps: Batches.
        num_prompts: Prompts with a verdict.
        num_completions: All completions.
        pass_at: pass@k for k from 1 to the group size, means over prompts.
        mixed: Share of prompts whose group has right and wrong completions.
        always_fail: Share of prompts none of whose completions is right.
        always_pass: Share of prompts all of whose completions are.
        mixed_at: The expected share of mixed groups at other group sizes.
        correct_counts: Prompts by the number of right completions, from 0 to the group size.
        by_task: Prompts, pass@1 and share of mixed groups of each game or set.
        entropy: Mean surprise of the sampled tokens, nats per token: a token mean.
        length_mean: Tokens of a completion.
        length_quantiles: The median, 95th percentile and longest.
        lengths: Of every completion.
        truncated: Share of completions that were cut.
        truncated_right: Of those, the share that is right.
        errored: Share of completions without a verdict.
        reward_mean: Of the judged.
        advantage: Which kind.
        advantage_abs_mean: Mean |advantage| over judged completions.
        learning_tokens: Share of sampled tokens whose advantage is not 0.
        drift: From the base; None where that was not measured.
        probe: A short RL; None where there was none.
    """

    group_size: int
    prompts_per_step: int
    temperature: float
    max_tokens: int
    confidence: float
    num_steps: int
    num_prompts: int
    num_completions: int
    pass_at: dict[int, Estimate]
    mixed: Estimate
    always_fail: Estimate
    always_pass: Estimate
    mixed_at: dict[int, float]
    correct_counts: list[int]
    by_task: dict[str, tuple[int, float, float]]
    entropy: float
    length_mean: float
    length_quantiles: tuple[float, float, float]
    lengths: NDArray[np.int64]
    truncated: float
    truncated_right: float
    errored: float
    reward_mean: float
    advantage: str
    advantage_abs_mean: float
    learning_tokens: float
    drift: Drift | None
    probe: Probe | None = None

    @property
    def groups_per_step(self) -> float:
        """Groups of a step that teach something, on average."""
        return self.mixed.value * self.prompts_per_step


def readiness(
    files: Sequence[Path], config: RunConfig, measured: Mapping[str, Any] | None = None
) -> Readiness:
    """The numbers of the rollouts in `files`, one for each step.

    Args:
        files: At least one.
        config: The run, whose `rl` made them.
        measured: What `ready_loop` left beside them.

    Raises:
        ArtifactError: A file cannot be read, or no completion has a verdict.
    """
    groups = [group for file in files for group in read_groups(file)]
    counts = [found for group in groups if (found := _counts(group))[0]]
    if not counts:
        raise ArtifactError(
            f"{files[0].parent}: none of the completions has a verdict, so nothing can be said of "
            "them; look at the verifier's errors in reward_detail"
        )
    rollouts = [one for group in groups for one in group.rollouts]
    judged = [one for one in rollouts if is_verdict(one.reward)]
    lengths = np.array([len(one.completion.token_ids) for one in rollouts], dtype=np.int64)
    cut = [one for one in rollouts if one.completion.finish_reason is FinishReason.LENGTH]
    given = _advantages(groups, config)
    return Readiness(
        group_size=config.rl.group_size,
        prompts_per_step=config.rl.prompts_per_step,
        temperature=config.rl.temperature,
        max_tokens=config.rl.max_tokens,
        confidence=config.ready.confidence,
        num_steps=len(files),
        num_prompts=len(counts),
        num_completions=len(rollouts),
        by_task=_by_task(groups),
        entropy=-float(sum(sum(one.completion.behavior_logprobs) for one in rollouts))
        / int(lengths.sum()),
        length_mean=float(lengths.mean()),
        length_quantiles=(
            float(np.median(lengths)),
            float(np.percentile(lengths, 95)),
            float(lengths.max()),
        ),
        lengths=lengths,
        truncated=len(cut) / len(rollouts),
        truncated_right=sum(map(_is_right, cut)) / max(1, len(cut)),
        errored=1 - len(judged) / len(rollouts),
        reward_mean=float(np.mean([one.reward.value for one in judged])),
        advantage=config.rl.advantage,
        advantage_abs_mean=float(np.abs(given).sum()) / len(judged),
        learning_tokens=float(lengths[given != 0].sum() / lengths.sum()),
        drift=_drift((measured or {}).get("drift"), config),
        probe=_probe((measured or {}).get("probe"), groups, config),
        **_outcomes(counts, config),
    )


def _outcomes(counts: Sequence[tuple[int, int]], config: RunConfig) -> dict[str, Any]:
    """What the judged and right completions of each prompt say, as fields of `Readiness`."""

    def over_prompts(values: Sequence[float]) -> Estimate:
        return _estimate(values, seed=config.seed, confidence=confidence)

    size, confidence = config.rl.group_size, config.ready.confidence
    return {
        # Of a prompt with errored rewards only up to as many as were judged.
        "pass_at": {
            k: over_prompts([pass_at_k(n, c, k) for n, c in counts if n >= k])
            for k in range(1, max(n for n, _ in counts) + 1)
        },
        "mixed": share([0 < c < n for n, c in counts], confidence=confidence),
        "always_fail": share([c == 0 for _, c in counts], confidence=confidence),
        "always_pass": share([c == n for n, c in counts], confidence=confidence),
        "mixed_at": {each: _mixed_at(counts, each) for each in sorted({*GROUP_SIZES, size})},
        "correct_counts": [sum(c == wanted for _, c in counts) for wanted in range(size + 1)],
    }


def _mixed_at(counts: Sequence[tuple[int, int]], group_size: int) -> float:
    """The mean over prompts: of subsets of their samples, or of what more samples would bring."""
    prior = fit_beta(counts)
    return float(
        np.mean(
            [
                mixed_within(n, c, group_size)
                if n >= group_size
                else mixed_beyond(n, c, group_size, prior=prior)
                for n, c in counts
            ]
        )
    )


def readiness_tree(found: Readiness) -> dict[str, Any]:
    """Every number, for `ready.json`."""
    tree = dataclasses.asdict(found)
    tree.pop("lengths")  # they are in the rollouts
    return tree | {"groups_per_step": found.groups_per_step}


def _counts(group: RolloutGroup) -> tuple[int, int]:
    judged = [one for one in group.rollouts if is_verdict(one.reward)]
    return len(judged), sum(map(_is_right, judged))


def _is_right(rollout: Rollout) -> bool:
    return rollout.reward.status is RewardStatus.OK


def _by_task(groups: Sequence[RolloutGroup]) -> dict[str, tuple[int, float, float]]:
    of_task: dict[str, list[tuple[int, int]]] = {}
    for group in groups:
        if (counts := _counts(group))[0]:
            of_task.setdefault(group.rollouts[0].problem.task, []).append(counts)
    return {
        task: (
            len(counts),
            float(np.mean([c / n for n, c in counts])),
            float(np.mean([0 < c < n for n, c in counts])),
        )
        for task, counts in sorted(of_task.items(), key=lambda item: (-len(item[1]), item[0]))
    }


def _advantages(groups: Sequence[RolloutGroup], config: RunConfig) -> NDArray[np.float64]:
    """[rollout], 0 where the reward errored.

    Of the reward and the length penalty, without a KL in the reward, which is 0 at the start of RL.
    REINFORCE++ is normalised over all batches together, by completion.
    """
    rl = config.rl
    rollouts = [(number, one) for number, group in enumerate(groups) for one in group.rollouts]
    rewards = torch.tensor([one.reward.value for _, one in rollouts], dtype=torch.float64)
    valid = torch.tensor([is_verdict(one.reward) for _, one in rollouts])
    ids = torch.tensor([number for number, _ in rollouts])
    if rl.overlong.buffer_tokens is not None:
        lengths = torch.tensor([len(one.completion.token_ids) for _, one in rollouts])
        rewards = rewards + rl.overlong.penalty * advantages.overlong_penalties(
            lengths, max_tokens=rl.max_tokens, buffer_tokens=rl.overlong.buffer_tokens
        )
    if rl.advantage == "grpo":
        return advantages.grpo_advantages(rewards, ids, valid).double().numpy()
    if rl.advantage == "rloo":
        return advantages.rloo_advantages(rewards, ids, valid).double().numpy()
    found = rewards
    if rl.advantage != "reinforce_pp":
        found = advantages.mean_baseline_advantages(rewards, ids, valid).double()
    if rl.advantage != "mean_baseline":
        sums = advantages.advantage_sums(found, valid)
        found = advantages.normalised_over_batch(found, valid, sums)
    return found.numpy()


def _drift(rows: Sequence[Mapping[str, float]] | None, config: RunConfig) -> Drift | None:
    if not rows:
        return None
    tokens = sum(row["tokens"] for row in rows)
    of_group: dict[float, Counter[str]] = {}
    for row in rows:
        of_group.setdefault(row["group"], Counter()).update(
            {"log_ratio": row["log_ratio"], "tokens": row["tokens"]}  # type: ignore[dict-item]
        )
    # A ratio of sums: each prompt's share of it, so that the resampled mean is near the whole.
    mean_tokens = tokens / len(of_group)
    shares = [each["log_ratio"] / mean_tokens for each in of_group.values()]
    return Drift(
        kl_per_token=_estimate(shares, seed=config.seed, confidence=config.ready.confidence),
        kl_per_completion=sum(row["log_ratio"] for row in rows) / len(rows),
        k3_per_token=sum(row["kl_k3"] for row in rows) / tokens,
        num_completions=len(rows),
    )


def _probe(
    steps: Mapping[int, Sequence[Mapping[str, float]]] | None,
    groups: Sequence[RolloutGroup],
    config: RunConfig,
) -> Probe | None:
    if not steps:
        return None
    rewards = {seed: [each["rl/reward/mean"] for each in found] for seed, found in steps.items()}
    half = min(map(len, rewards.values())) // 2
    changes = [float(np.mean(each[-half:]) - np.mean(each[:half])) for each in rewards.values()]
    of_prompts = [
        np.mean([one.reward.value for one in group.rollouts if is_verdict(one.reward)])
        for group in groups
        if _counts(group)[0]
    ]
    # Two halves of `half` steps for each seed, their prompts as different as these.
    num_prompts = half * config.rl.prompts_per_step * len(changes)
    error = float(np.std(of_prompts, ddof=min(1, len(of_prompts) - 1))) * (2 / num_prompts) ** 0.5
    reach = NormalDist().inv_cdf((1 + config.ready.confidence) / 2) * error
    mean = float(np.mean(changes))
    return Probe(rewards, Estimate(mean, mean - reach, mean + reach), sum(c > 0 for c in changes))


def share(held: Sequence[bool], *, confidence: float) -> Estimate:
    """The share that holds, with Wilson's interval: unlike the bootstrap's, no point at 0 or 1."""
    num = len(held)
    value, z = sum(held) / num, NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (value + z**2 / (2 * num)) / (1 + z**2 / num)
    reach = z / (1 + z**2 / num) * (value * (1 - value) / num + z**2 / (4 * num**2)) ** 0.5
    return Estimate(value, max(0.0, middle - reach), min(1.0, middle + reach))


def _estimate(values: Sequence[float], *, seed: int, confidence: float) -> Estimate:
    each = torch.tensor(values, dtype=torch.float64)
    low, high = bootstrap_interval(each, seed=seed, confidence=confidence)
    return Estimate(float(each.mean()), low, high)
