"""What an RL step leaves to look at."""

from collections.abc import Mapping, Sequence

from pear_ray.algorithms import mismatch
from pear_ray.distributed.train_worker import Laps
from pear_ray.records import FinishReason, RolloutGroup
from pear_ray.tasks.reward_totals import deviation, reward_metrics, reward_sums


def rollout_sums(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """What the step's metrics need of this rank's rollouts."""
    rollouts = [one for group in groups for one in group.rollouts]
    completions = [one.completion for one in rollouts]
    lengths = [len(each.token_ids) for each in completions]
    sums = {
        "rollouts": len(rollouts),
        "completion_tokens": sum(lengths),
        "max/completion_length": max(lengths),
        "min/completion_length": min(lengths),
        "truncated": sum(each.finish_reason is FinishReason.LENGTH for each in completions),
        "surprise": -sum(sum(each.behavior_logprobs) for each in completions),
    } | reward_sums([[one.reward for one in group.rollouts] for group in groups])
    return {key: float(value) for key, value in sums.items()}


def lag_sums(groups: Sequence[RolloutGroup], step_count: int) -> dict[str, float]:
    """How far this rank's rollouts are behind the policy of `step_count`, in optimizer steps."""
    versions = [one.policy_version for group in groups for one in group.rollouts]
    return {"lag": float(sum(step_count - version for version in versions))}


def lap_times(laps: Laps) -> dict[str, float]:
    """The slowest rank's time counts, for the others wait for it, and the fullest one's memory."""
    times = {f"max/time/{phase}_s": seconds for phase, seconds in laps.seconds.items()}
    return times | {f"max/memory/{phase}_gib": gib for phase, gib in laps.gib.items()}


def step_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """The step's metrics from the sums of all ranks and updates."""
    metrics = rollout_metrics(sums) | _update_metrics(sums) | _mismatch_metrics(sums)
    return metrics | ({"rl/policy_lag": sums["lag"] / sums["rollouts"]} if "lag" in sums else {})


def rollout_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """The metrics of the step's rollouts and times, from the sums of all ranks."""
    tokens, rollouts = sums["completion_tokens"], sums["rollouts"]
    times = {key.removeprefix("max/"): value for key, value in sums.items() if "max/time/" in key}
    memory = {key.removeprefix("max/"): value for key, value in sums.items() if "max/mem" in key}
    step_s = sum(times.values())
    return {
        **{f"rl/{name}": value for name, value in reward_metrics(sums).items()},
        "rl/completion_length/mean": tokens / rollouts,
        "rl/completion_length/min": sums["min/completion_length"],
        "rl/completion_length/max": sums["max/completion_length"],
        "rl/truncated_fraction": sums["truncated"] / rollouts,
        # The mean surprise of sampled tokens estimates the policy's entropy without bias.
        "rl/entropy": sums["surprise"] / tokens,
        "rl/tokens_per_s": tokens / step_s,
        **_phase_speeds(sums, times),
        **memory,
        **times,
        "time/step_s": step_s,
    }


def _phase_speeds(sums: Mapping[str, float], times: Mapping[str, float]) -> dict[str, float]:
    """Completion tokens over the seconds of sampling and of training, where the step did that."""
    sampled = sums["completion_tokens"]
    tokens = {"sample": sampled, "train": sampled - sums.get("discarded_tokens", 0.0)}
    return {
        f"rl/tokens_per_s/{phase}": count / times[f"time/{phase}_s"]
        for phase, count in tokens.items()
        if f"time/{phase}_s" in times
    }


def _update_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Of the policy loss and what is added to it; fractions and means over tokens that train."""
    trained = max(1.0, sums["trained_tokens"])
    low, high = sums["clipped_low"] / trained, sums["clipped_high"] / trained
    mean, mean_square = sums["advantage"] / trained, sums["advantage_squared"] / trained
    metrics = {
        "rl/loss": sums["loss"] / sums["updates"],
        "rl/grad_norm": sums["grad_norm"] / sums["updates"],
        "rl/advantage/mean_abs": sums["advantage_abs"] / trained,
        "rl/advantage/std": deviation(mean, mean_square),
        "rl/clip_fraction": low + high,
        "rl/clip_fraction/low": low,
        "rl/clip_fraction/high": high,
        "rl/ratio/max": sums.get("max/ratio", 1.0),
        "rl/ratio/min": sums.get("min/ratio", 1.0),
    }
    if "kl" in sums:
        metrics["rl/kl_to_init"] = sums["kl"] / trained
    if "entropy" in sums:
        metrics["rl/entropy/exact"] = sums["entropy"] / trained
    return metrics


def _mismatch_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Of sampler against trainer, over all tokens; of the correction, over those that train."""
    gaps = mismatch.finalise_mismatch(sums)
    trained = max(1.0, sums["trained_tokens"])
    squared = sums["correction_weight_squared"]
    effective = sums["correction_weight"] ** 2 / squared if squared else 0.0
    return {
        "rl/mismatch/mean_gap": gaps["abs_gap/mean"],
        "rl/mismatch/max_gap": gaps["abs_gap/max"],
        "rl/mismatch/ess_fraction": gaps["ess_fraction"],
        "rl/mismatch_kl": gaps["mismatch_kl_k3"],
        "rl/correction/masked_fraction": sums["correction_masked"] / trained,
        "rl/correction/bounded_fraction": sums["correction_bounded"] / trained,
        "rl/correction/weight/mean": sums["correction_weight"] / trained,
        "rl/correction/ess_fraction": effective / trained,
    }
