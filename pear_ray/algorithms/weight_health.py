"""Diagnostics of a step's weights, as sums that add over microbatches and ranks.

`weight_sums` of every microbatch and rank, `merge`d in any order, then `finalise`d once: a mean of
per-microbatch means would not be the batch's. Keys starting `min/` and `max/` merge by min and max,
all others by addition.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pear_ray.algorithms.loss_tokens import LossTokens, select_loss_tokens
from pear_ray.algorithms.pear import LOG_RATIO_CLIP, LOG_WEIGHT_CLIP, PearWeights

NUM_DECILES = 10
# Edges for approximate quantiles: log-ratios finest around PEAR's clip, where they live;
# log-weights in steps of a half over PEAR's range.
LOG_RATIO_EDGES = (
    *(-8.0, -4.0, -2.0, -1.0, -0.5, -0.25, -0.15, -0.08, -0.04, -0.02, -0.01),
    *(0.0, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.5, 1.0, 2.0, 4.0, 8.0),
)
LOG_WEIGHT_EDGES = tuple(-10.0 + 0.5 * step for step in range(31))
QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}


def weight_sums(
    pear: PearWeights,
    policy_logprobs: Float[Tensor, " token"],
    sequence_ids: Int[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    log_ratio_clip: tuple[float, float] = LOG_RATIO_CLIP,
    log_weight_clip: tuple[float, float] = LOG_WEIGHT_CLIP,
) -> dict[str, float]:
    """One microbatch's sums and counts over loss tokens, for `merge` and `finalise`.

    Args:
        pear: The weights and log-ratios of the microbatch.
        policy_logprobs: Target policy, nats; gives both NLLs.
        sequence_ids: The sequence of each position, non-decreasing.
        loss_mask: True where a token trains.
        log_ratio_clip: The bounds that the weights were made with.
        log_weight_clip: The bounds that the weights were made with.

    Raises:
        ValueError: `sequence_ids` decrease (see `select_loss_tokens`).
    """
    loss_tokens = select_loss_tokens(sequence_ids, loss_mask)
    at = loss_tokens.positions
    weights, log_weights = pear.weights[at].double(), pear.log_weights[at].double()
    log_ratios = pear.log_ratios[at]
    losses = -policy_logprobs.detach()[at].double()
    # Compared in the dtype they were stored in: float64's -0.08 is not float32's.
    low, high = log_ratios.new_tensor(log_ratio_clip)
    sums = {
        "tokens": torch.ones_like(weights).sum(),
        "sequences": torch.ones_like(loss_tokens.ends).sum().double(),
        "weight": weights.sum(),
        "weight_squared": weights.square().sum(),
        "sequence_ess_fraction": _sequence_ess_fractions(weights, loss_tokens).sum(),
        "log_ratio": log_ratios.double().sum(),
        "log_ratio_squared": log_ratios.double().square().sum(),
        "log_ratio_clip_low": (log_ratios < low).double().sum(),
        "log_ratio_clip_high": (log_ratios > high).double().sum(),
        "log_weight_floor": (log_weights < log_weight_clip[0]).double().sum(),
        "log_weight_ceiling": (log_weights > log_weight_clip[1]).double().sum(),
        "nll": losses.sum(),
        "weighted_nll": (weights * losses).sum(),
        **_position_sums(weights, loss_tokens),
        **_histogram("log_ratio_bin", log_ratios.double(), LOG_RATIO_EDGES),
        **_histogram("log_weight_bin", log_weights.clamp(*log_weight_clip), LOG_WEIGHT_EDGES),
        **_extremes("log_ratio", log_ratios),
        **_extremes("log_weight", log_weights),
    }
    # One transfer for all: a float() per key would wait for the device sixty times.
    values = torch.stack([value.double() for value in sums.values()]).tolist()
    return dict(zip(sums, values, strict=True))


def merge(left: Mapping[str, float], right: Mapping[str, float]) -> dict[str, float]:
    """Sums of both: `min/` keys by min, `max/` keys by max, all others added.

    Associative and commutative up to rounding; a key that one side lacks is taken from the other.
    """
    merged = dict(left)
    for key, value in right.items():
        if key not in merged:
            merged[key] = value
        elif key.startswith("min/"):
            merged[key] = min(merged[key], value)
        elif key.startswith("max/"):
            merged[key] = max(merged[key], value)
        else:
            merged[key] += value
    return merged


def finalise(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a step from its merged `weight_sums`; fractions in [0, 1], NLLs in nats per token.

    `effective_sample_size` is `(sum w)^2 / sum w^2` over the step's tokens, `ess_fraction` that
    over their number, `sequence_ess_fraction` the mean over sequences of the same. Quantiles
    (`log_ratio/p05`, ...) are read off a fixed histogram, straight lines within a bin; log-weights
    enter it clipped. `last_tenth_weight_share` is over each sequence's last `ceil(T / 10)` tokens;
    `decile_k_weight_share` over those with `floor(10 (t-1) / T) = k`; a sum of 1 over k. Where all
    weights are 0, effective sample sizes and shares are 0.

    Raises:
        ValueError: There was no loss token.
    """
    tokens = sums.get("tokens", 0.0)
    if tokens == 0.0:
        raise ValueError(
            "no loss token in this step, so its weights have no metrics; look at how loss_mask "
            "is made, or skip the step"
        )
    mean = sums["log_ratio"] / tokens
    variance = max(sums["log_ratio_squared"] / tokens - mean**2, 0.0)
    effective_sample_size = effective_size(sums["weight"], sums["weight_squared"])
    weight = sums["weight"] or 1.0  # of 0, every share is 0
    metrics = {
        "num_tokens": tokens,
        "num_sequences": sums["sequences"],
        "effective_sample_size": effective_sample_size,
        "ess_fraction": effective_sample_size / tokens,
        "sequence_ess_fraction": sums["sequence_ess_fraction"] / sums["sequences"],
        "weight/mean": sums["weight"] / tokens,
        "log_ratio/mean": mean,
        "log_ratio/std": variance**0.5,
        "log_ratio_clip_low_fraction": sums["log_ratio_clip_low"] / tokens,
        "log_ratio_clip_high_fraction": sums["log_ratio_clip_high"] / tokens,
        "log_weight_floor_fraction": sums["log_weight_floor"] / tokens,
        "log_weight_ceiling_fraction": sums["log_weight_ceiling"] / tokens,
        "nll": sums["nll"] / tokens,
        "weighted_nll": sums["weighted_nll"] / tokens,
        "last_tenth_weight_share": sums["last_tenth_weight"] / weight,
    }
    for decile in range(NUM_DECILES):
        metrics[f"decile_{decile}_weight_share"] = sums[f"decile_{decile}_weight"] / weight
    for name, edges in (("log_ratio", LOG_RATIO_EDGES), ("log_weight", LOG_WEIGHT_EDGES)):
        low, high = sums[f"min/{name}"], sums[f"max/{name}"]
        counts = [sums[f"{name}_bin_{index:02d}"] for index in range(len(edges) + 1)]
        metrics |= {f"{name}/min": low, f"{name}/max": high}
        for label, quantile in QUANTILES.items():
            metrics[f"{name}/{label}"] = _quantile(counts, (low, *edges, high), quantile)
    return metrics


def effective_size(weight_sum: float, weight_square_sum: float) -> float:
    """`(sum w)^2 / sum w^2`; 0 of weights that are all 0."""
    return weight_sum**2 / weight_square_sum if weight_square_sum else 0.0


def position_deciles(loss_tokens: LossTokens) -> Int[Tensor, " loss_token"]:
    """`floor(10 (t-1) / T)`: which tenth of its sequence each loss token is in, from 0."""
    index = loss_tokens.sequence_index
    place = torch.arange(index.numel(), device=index.device) - loss_tokens.starts[index]
    return torch.div(place * NUM_DECILES, loss_tokens.counts[index], rounding_mode="floor")


def _sequence_ess_fractions(
    weights: Float[Tensor, " loss_token"], loss_tokens: LossTokens
) -> Float[Tensor, " sequence"]:
    """`(sum w)^2 / sum w^2 / T` of each sequence; 0 where its weights are all 0."""
    empty = weights.new_zeros(loss_tokens.ends.numel())
    sums = empty.index_add(0, loss_tokens.sequence_index, weights)
    squares = empty.index_add(0, loss_tokens.sequence_index, weights.square())
    return torch.where(squares > 0, sums.square() / squares, 0.0) / loss_tokens.counts


def _position_sums(
    weights: Float[Tensor, " loss_token"], loss_tokens: LossTokens
) -> dict[str, Float[Tensor, ""]]:
    """Weight in each position decile, and in the last tenth, of the sequences."""
    index = loss_tokens.sequence_index
    counts = loss_tokens.counts[index]
    place = torch.arange(weights.numel(), device=weights.device) - loss_tokens.starts[index]
    masses = weights.new_zeros(NUM_DECILES).index_add_(0, position_deciles(loss_tokens), weights)
    # ceil(T / 10): a sequence of six tokens still has a last one.
    last = torch.div(counts + NUM_DECILES - 1, NUM_DECILES, rounding_mode="floor")
    sums = {f"decile_{decile}_weight": mass for decile, mass in enumerate(masses)}
    return sums | {"last_tenth_weight": weights[counts - place <= last].sum()}


def _histogram(
    name: str, values: Float[Tensor, " loss_token"], edges: tuple[float, ...]
) -> dict[str, Float[Tensor, ""]]:
    """Counts below the first edge, between edges, and from the last edge up."""
    bins = torch.bucketize(values, values.new_tensor(edges), right=True)
    counts = torch.bincount(bins, minlength=len(edges) + 1).double()
    return {f"{name}_{index:02d}": count for index, count in enumerate(counts)}


def _extremes(name: str, values: Float[Tensor, " loss_token"]) -> dict[str, Float[Tensor, ""]]:
    """The smallest and largest value; absent for none, so that merging ignores them."""
    if values.numel() == 0:
        return {}
    low, high = torch.aminmax(values)
    return {f"min/{name}": low, f"max/{name}": high}


def _quantile(counts: list[float], bounds: tuple[float, ...], quantile: float) -> float:
    """Quantile of a histogram whose bin k spans bounds[k] to bounds[k + 1], linear within a bin."""
    low, high = bounds[0], bounds[-1]
    target, passed = quantile * sum(counts), 0.0
    for count, left, right in zip(counts, bounds[:-1], bounds[1:], strict=True):
        if count > 0.0 and passed + count >= target:
            # The outermost bins, and any bin holding an extreme, end at a value that was seen.
            start, stop = max(left, low), min(right, high)
            return min(max(start + (stop - start) * (target - passed) / count, low), high)
        passed += count
    return high
