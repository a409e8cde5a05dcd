"""What PEAR would do to a corpus, before anything is trained: numbers per source, streamed.

The ratios are those of the initial target policy, so the weights are those of the first SFT steps;
a live ratio policy moves on from there. Memory grows with the number of sources and of distinct
lengths, not with the corpus.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pear_ray.algorithms.discount import perfect_ratio_mean_weights
from pear_ray.algorithms.loss_tokens import select_loss_tokens
from pear_ray.algorithms.pear import PearWeights
from pear_ray.algorithms.weight_health import (
    NUM_DECILES,
    finalise,
    merge,
    position_deciles,
    weight_sums,
)
from pear_ray.config import sft as sft_config
from pear_ray.errors import ArtifactError
from pear_ray.reporting.diagnosis.rows import ScoredRow
from pear_ray.weighting import clips, pear_weights

ALL_SOURCES = "all sources"
LENGTH_QUANTILES = {"min": 0.0, "p05": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}
# Bins of the drawn histogram: fifty to a nat put an edge on both of PEAR's clip bounds.
LOG_RATIO_BINS = np.arange(-100, 101) / 50


@dataclasses.dataclass(frozen=True, slots=True)
class SourceDiagnosis:
    """One source's numbers, or those of all together.

    Attributes:
        source: Its name, or `ALL_SOURCES`.
        num_rows: Positive rows; negatives are counted in `Diagnosis.num_negative_rows`.
        num_loss_tokens: Their loss tokens.
        token_share: Its share of all loss tokens.
        weight_share: Its share of all weight.
        mean_completion_length: Loss tokens per row.
        completion_lengths: By the names of `LENGTH_QUANTILES`, exact.
        perfect_ratio_mean_weights: Mean weight at those lengths when every ratio is 1.
        even_last_tenth_share: Share of the loss tokens in the last tenths of completions: what
            `last_tenth_weight_share` would be if all tokens weighed the same.
        log_ratio_absolute_mean: Mean of |log-ratio|, before clipping.
        clipped_log_ratio_mean: What a token adds to the log-weight of those before it.
        health: `weight_health.finalise` of all its tokens: the names that SFT logs under `sft/`.
        decile_weight_means: Mean weight by tenth of the completion; None where there is no token.
        log_ratio_shares: Shares of tokens below, in, and above `LOG_RATIO_BINS`.
    """

    source: str
    num_rows: int
    num_loss_tokens: int
    token_share: float
    weight_share: float
    mean_completion_length: float
    completion_lengths: dict[str, int]
    perfect_ratio_mean_weights: dict[str, float]
    even_last_tenth_share: float
    log_ratio_absolute_mean: float
    clipped_log_ratio_mean: float
    health: dict[str, float]
    decile_weight_means: list[float | None]
    log_ratio_shares: list[float]


@dataclasses.dataclass(frozen=True, slots=True)
class Diagnosis:
    """What PEAR would do to a corpus.

    Attributes:
        weights: The settings that the numbers are for.
        is_assumed: The run's weights are not made of ratios, and `weights` are PEAR's defaults.
        overall: All positive rows together.
        sources: By name.
        num_negative_rows: By source: left out of everything else, for they take the sequence weight
            with its sign turned.
        proxy_sources: Those whose behavior log-probs are not of the model that wrote them.
    """

    weights: sft_config.PearWeights
    is_assumed: bool
    overall: SourceDiagnosis
    sources: list[SourceDiagnosis]
    num_negative_rows: dict[str, int]
    proxy_sources: list[str]


def diagnose(
    batches: Iterable[Sequence[ScoredRow]],
    *,
    weights: sft_config.WeightsConfig,
    proxy_sources: Collection[str] = (),
) -> Diagnosis:
    """The diagnosis of all rows; `weights` is the run's `sft.weights`.

    Raises:
        ArtifactError: There is no positive row, one has no loss token, or a loss token's log-prob
            is not finite.
    """
    settings = weights if weights.kind == "pear" else sft_config.PearWeights()
    tallies: dict[str, _Tally] = {}
    negatives: Counter[str] = Counter()
    for batch in batches:
        positives: defaultdict[str, list[ScoredRow]] = defaultdict(list)
        for row in batch:
            if row.is_negative:
                negatives[row.source] += 1
            else:
                positives[row.source].append(row)
        for source, rows in positives.items():
            part = _tally(rows, settings)
            tallies[source] = tallies[source].plus(part) if source in tallies else part
    if not tallies:
        raise ArtifactError(
            f"found {negatives.total()} negative rows and no other to diagnose; look at what "
            "`collect` and `score` left, and run them again"
        )
    first, *others = tallies.values()
    whole = first
    for other in others:
        whole = whole.plus(other)
    return Diagnosis(
        weights=settings,
        is_assumed=weights.kind != "pear",
        overall=_finish(ALL_SOURCES, whole, whole, settings),
        sources=[_finish(name, tallies[name], whole, settings) for name in sorted(tallies)],
        num_negative_rows=dict(sorted(negatives.items())),
        proxy_sources=sorted(set(proxy_sources).intersection(tallies)),
    )


def row_weights(rows: Sequence[ScoredRow], settings: sft_config.PearWeights) -> PearWeights:
    """The PEAR weights of `rows`, one after the other, under the initial target policy."""
    return _weights_of(_flatten(rows), settings)


def discounted_block_size(settings: sft_config.PearWeights) -> int | None:
    """Tokens that share a discount; None at sequence level, which has none.

    Spans are taken for single tokens, which most of them are.
    """
    blocks = {"token": 1, "block": settings.block_size, "span": 1, "sequence": None}
    return blocks[settings.level]


def mean_weights_at(lengths: Sequence[int], settings: sft_config.PearWeights) -> list[float]:
    """Mean weight of completions of these lengths when every ratio is 1."""
    block_size = discounted_block_size(settings)
    if block_size is None:
        return [1.0] * len(lengths)
    return perfect_ratio_mean_weights(
        torch.tensor(lengths),
        gamma=settings.gamma,
        block_size=block_size,
        log_weight_low=settings.log_weight_clip_low,
    ).tolist()


@dataclasses.dataclass(frozen=True, slots=True)
class _Tally:
    """Sums that add over batches and sources."""

    sums: dict[str, float]
    lengths: Counter[int]
    log_ratio_counts: NDArray[np.int64]  # [bin]

    def plus(self, other: "_Tally") -> "_Tally":
        return _Tally(
            merge(self.sums, other.sums),
            self.lengths + other.lengths,
            self.log_ratio_counts + other.log_ratio_counts,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _FlatRows:
    """Rows end to end, as the algorithms take them."""

    policy_logprobs: Tensor  # [token]
    behavior_logprobs: Tensor  # [token]
    sequence_ids: Tensor  # [token]
    loss_mask: Tensor  # [token]
    span_ids: Tensor | None  # [token]


def _flatten(rows: Sequence[ScoredRow]) -> _FlatRows:
    num_tokens = torch.tensor([len(row.token_ids) for row in rows])
    spans = [row.span_ids for row in rows if row.span_ids is not None]
    return _FlatRows(
        torch.from_numpy(np.concatenate([row.policy_logprobs for row in rows])),
        torch.from_numpy(np.concatenate([row.behavior_logprobs for row in rows])),
        torch.repeat_interleave(torch.arange(len(rows)), num_tokens),
        torch.from_numpy(np.concatenate([row.loss_mask for row in rows])),
        torch.from_numpy(np.concatenate(spans)).long() if spans else None,
    )


def _weights_of(flat: _FlatRows, settings: sft_config.PearWeights) -> PearWeights:
    return pear_weights(
        flat.policy_logprobs,
        flat.behavior_logprobs,
        flat.sequence_ids,
        flat.loss_mask,
        span_ids=flat.span_ids,
        config=settings,
    )


def _tally(rows: Sequence[ScoredRow], settings: sft_config.PearWeights) -> _Tally:
    """The sums of one source's rows of one batch."""
    source = rows[0].source
    lengths = [int(row.loss_mask.sum()) for row in rows]
    if not all(lengths):
        empty = rows[lengths.index(0)].example_id
        raise ArtifactError(
            f"source {source!r}: example {empty!r} has no loss token, so it cannot train; remove "
            "it from the corpus and run `collect` again"
        )
    flat = _flatten(rows)
    try:
        pear = _weights_of(flat, settings)
    except ValueError as error:  # log-probs that are not finite
        raise ArtifactError(f"source {source!r}: {error}") from error
    ratio_clip, weight_clip = clips(settings)
    sums = weight_sums(
        pear,
        flat.policy_logprobs,
        flat.sequence_ids,
        flat.loss_mask,
        log_ratio_clip=ratio_clip,
        log_weight_clip=weight_clip,
    )
    loss_tokens = select_loss_tokens(flat.sequence_ids, flat.loss_mask)
    log_ratios = pear.log_ratios[loss_tokens.positions].double().numpy()
    clipped = pear.clipped_log_ratios[loss_tokens.positions].double()
    sums |= {"absolute": float(np.abs(log_ratios).sum()), "clipped": clipped.sum().item()}
    tokens = torch.bincount(position_deciles(loss_tokens), minlength=NUM_DECILES).tolist()
    sums |= {f"decile_{decile}_tokens": count for decile, count in enumerate(tokens)}
    bins = np.digitize(log_ratios, LOG_RATIO_BINS)
    return _Tally(sums, Counter(lengths), np.bincount(bins, minlength=len(LOG_RATIO_BINS) + 1))


def _finish(
    source: str, tally: _Tally, whole: _Tally, settings: sft_config.PearWeights
) -> SourceDiagnosis:
    """Means, shares and quantiles from the sums."""
    sums, tokens = tally.sums, tally.sums["tokens"]
    lengths = {name: _quantile(tally.lengths, share) for name, share in LENGTH_QUANTILES.items()}
    mean_weights = mean_weights_at(list(lengths.values()), settings)
    in_last_tenth = sum(-(-length // NUM_DECILES) * n for length, n in tally.lengths.items())
    return SourceDiagnosis(
        source=source,
        num_rows=tally.lengths.total(),
        num_loss_tokens=round(tokens),
        token_share=tokens / whole.sums["tokens"],
        weight_share=sums["weight"] / whole.sums["weight"],
        mean_completion_length=tokens / tally.lengths.total(),
        completion_lengths=lengths,
        perfect_ratio_mean_weights=dict(zip(lengths, mean_weights, strict=True)),
        even_last_tenth_share=in_last_tenth / tokens,
        log_ratio_absolute_mean=sums["absolute"] / tokens,
        clipped_log_ratio_mean=sums["clipped"] / tokens,
        health=finalise(sums),
        decile_weight_means=[
            sums[f"decile_{k}_weight"] / count if (count := sums[f"decile_{k}_tokens"]) else None
            for k in range(NUM_DECILES)
        ],
        log_ratio_shares=(tally.log_ratio_counts / tokens).tolist(),
    )


def _quantile(counts: Mapping[int, int], share: float) -> int:
    """The smallest value with at least `share` of the counts at or below it."""
    values = sorted(counts)
    at_or_below = np.cumsum([counts[value] for value in values])
    place = np.searchsorted(at_or_below, share * at_or_below[-1])
    return values[min(int(place), len(values) - 1)]
