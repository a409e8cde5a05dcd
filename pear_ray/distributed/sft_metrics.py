"""What an SFT step leaves to look at: its metrics, and samples of its weights for the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pear_ray.algorithms import weight_health
from pear_ray.algorithms.pear import PearWeights
from pear_ray.artifacts.tables import WEIGHT_SAMPLES, write_rows
from pear_ray.config.sft import SftConfig
from pear_ray.distributed.sft_sources import Sources
from pear_ray.engines.batches import TokenBatch

NUM_SAMPLED_STEPS = 5
SAMPLED_TOKENS = 4000  # of such a step, whose weights are kept for the report


def step_metrics(sums: Mapping[str, float], sources: Sources) -> dict[str, float]:
    """Metrics of a step from its sums; the negatives' apart from the positives'."""
    metrics: dict[str, float] = {}
    if sums["tokens"]:
        health = weight_health.finalise(sums)
        metrics = {f"sft/{name}": value for name, value in health.items()}
        metrics["sft/weight_mass_last_tenth"] = health["last_tenth_weight_share"]
        metrics |= sources.metrics(sums)
    wrong = sums.get("negative_tokens", 0.0)
    if wrong:
        metrics |= {
            "sft/negatives/num_tokens": wrong,
            "sft/negatives/below_floor_fraction": sums["negative_below_floor"] / wrong,
            "sft/negatives/weighted_loss": sums["negative_weighted_loss"] / wrong,
        }
    return metrics


def denominator_of(sums: Mapping[str, float], settings: SftConfig) -> float:
    """The step's denominator, with the factor that gives its weights a mean of 1 if that is wanted.

    Weights enter the gradient linearly, so dividing them all by their mean is the same as
    multiplying the denominator by it; `weight_norm` has divided by them already.

    Where all of a step's rows are of sources of weight 0, the sum of the weights is no denominator;
    nor is one needed, for there is no gradient.
    """
    weights = settings.weights
    if (
        weights.kind == "pear"
        and weights.rescale == "batch_mean_one"
        and settings.reduction != "weight_norm"
    ):
        return sums["denominator"] * (sums["weight"] / sums["tokens"])
    if weights.kind == "by_source" and not sums["denominator"] and sums["tokens"]:
        return 1.0
    return sums["denominator"]


def is_sampled(step: int, *, num_steps: int) -> bool:
    """Whether the weights of step `step` (from 0) are kept for the report."""
    last = num_steps - 1
    return step in {round(last * k / (NUM_SAMPLED_STEPS - 1)) for k in range(NUM_SAMPLED_STEPS)}


def weight_samples(
    step: int, rows: Sequence[dict[str, Any]], batch: TokenBatch, weights: PearWeights
) -> list[dict[str, Any]]:
    """Log-ratio and weight of each loss token of a microbatch, for the report."""
    counts = torch.bincount(batch.sequence_ids, minlength=len(rows))
    left = torch.cat([torch.arange(int(count) - 1, -1, -1) for count in counts])
    columns = zip(
        batch.sequence_ids.tolist(),
        left.tolist(),
        weights.log_ratios.tolist(),
        weights.weights.tolist(),
        strict=True,
    )
    return [
        {
            "step": step + 1,
            "example_id": rows[row]["example_id"],
            "tokens_left": tokens_left,
            "log_ratio": log_ratio,
            "weight": weight,
        }
        for row, tokens_left, log_ratio, weight in columns
    ]


def write_weight_samples(stage_dir: Path, samples: Sequence[dict[str, Any]]) -> None:
    """Write one step's `weight_samples` into the stage's folder."""
    folder = stage_dir / "weight_samples"
    folder.mkdir(exist_ok=True)
    write_rows(folder / f"step-{samples[0]['step']:06d}.parquet", samples, WEIGHT_SAMPLES)
