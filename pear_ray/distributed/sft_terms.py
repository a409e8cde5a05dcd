"""What one microbatch of SFT adds to a step: weights times losses, and the sums behind metrics."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import assert_never

import torch

from pear_ray.algorithms import objectives, weight_health
from pear_ray.algorithms.forward_kl import forward_kl_top_k
from pear_ray.algorithms.group_health import group_sums
from pear_ray.algorithms.negatives import above_logprob_floor, negative_sequence_weights
from pear_ray.algorithms.pear import LOG_WEIGHT_CLIP, PearWeights
from pear_ray.algorithms.reduce import loss_denominator, loss_numerator
from pear_ray.config import objectives as config
from pear_ray.config import sft as sft_config
from pear_ray.config.sft import needs_step_weights
from pear_ray.engines.batches import TokenBatch
from pear_ray.weighting import clips, pear_weights

SOURCE_WEIGHTS = "source_weights"  # aligned numbers of a batch: the weight of each token's source
# The same of the step's control: its weights, and their logarithms.
CONTROLLED = ("controlled_weights", "controlled_log_weights")


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Groups of rows whose weights are measured apart: the corpus's sources.

    Attributes:
        of_row: [row] the group of each row of the microbatch.
        num_groups: Number of groups in the run.
    """

    of_row: torch.Tensor
    num_groups: int


@dataclass(frozen=True, slots=True)
class Terms:
    """A microbatch's share of a step.

    Attributes:
        numerator: Its part of the loss before the division; differentiable.
        weights: What multiplied its tokens' losses.
        sums: For `weight_health.merge`, with `numerator` and `denominator`.
    """

    numerator: torch.Tensor
    weights: PearWeights
    sums: dict[str, float]


def microbatch_terms(
    outputs: dict[str, torch.Tensor],
    batch: TokenBatch,
    settings: sft_config.SftConfig,
    *,
    tau: float | None = None,
    groups: RowGroups | None = None,
) -> Terms:
    """Weights, losses and sums of a microbatch from what the policy gave for it.

    Args:
        outputs: As `Policy.forward` gives them, `logprobs` at least.
        batch: The microbatch.
        settings: Weights, objective, negatives, reduction.
        tau: TALR's, of the whole step's batch; None for other objectives.
        groups: Where the rows' sums are wanted per group as well.
    """
    logprobs = outputs["logprobs"]
    weights = token_weights(logprobs, batch, settings)
    losses = token_losses(outputs, batch, settings.objective, tau=tau)
    flat = (weights.weights, batch.sequence_ids, batch.loss_mask)
    numerator = loss_numerator(losses, *flat, reduction=settings.reduction)
    negative = negative_tokens(batch)
    sums = _health(weights, logprobs.detach(), batch, ~negative, settings, groups)
    sums["numerator"] = float(numerator.detach())
    sums["denominator"] = float(loss_denominator(*flat, reduction=settings.reduction))
    if settings.negatives is not None:
        sums |= _negative_sums(weights, losses.detach(), logprobs, negative, settings.negatives)
    return Terms(numerator, weights, sums)


def token_weights(
    logprobs: torch.Tensor, batch: TokenBatch, settings: sft_config.SftConfig
) -> PearWeights:
    """The weight of each loss token, with the log-ratios behind it; uniform weights are all 1.

    Those of negatives carry a minus sign, and are 0 at tokens that are unlikely enough. A control
    of the step (`sft_controls`) must be in the batch; it leaves negatives alone.
    """
    kind, negative = settings.weights, negative_tokens(batch)
    found = positive_weights(logprobs, batch, kind, ~negative)
    if needs_step_weights(kind):
        found = _controlled(found, batch)
    if settings.negatives is None:
        return found
    floor = settings.negatives.logprob_floor
    if kind.kind != "pear":
        pushed = above_logprob_floor(logprobs, negative, logprob_floor=floor)
        signed = torch.where(pushed, -settings.negatives.scale * _fixed_weights(batch, kind), 0.0)
        return dataclasses.replace(found, weights=found.weights + signed)
    ratio_clip, weight_clip = clips(kind)
    behavior = batch.aligned["behavior_logprobs"]
    wrong = negative_sequence_weights(
        _ratio_logprobs(logprobs, batch, kind),
        torch.zeros_like(behavior) if kind.control == "likelihood_only" else behavior,
        batch.sequence_ids,
        negative,
        negative_scale=settings.negatives.scale,
        logprob_floor=floor,
        log_ratio_clip=ratio_clip,
        log_weight_clip=weight_clip,
    )
    # Each is 0 outside its own rows.
    columns = (field.name for field in dataclasses.fields(PearWeights))
    return PearWeights(*(getattr(found, name) + getattr(wrong, name) for name in columns))


def token_losses(
    outputs: dict[str, torch.Tensor],
    batch: TokenBatch,
    objective: config.ObjectiveConfig,
    *,
    tau: float | None = None,
) -> torch.Tensor:
    """The loss of each token, [token], that the weights multiply."""
    if isinstance(objective, config.IwSft | config.Psft):
        return _against_initial(outputs["logprobs"], batch, objective)
    if isinstance(objective, config.Asft | config.SftKl | config.ForwardKl):
        return _over_candidates(outputs, batch, objective)
    logprobs, mask = outputs["logprobs"], batch.loss_mask
    match objective:
        case config.Nll() | config.Dft():
            plain = objectives.nll if objective.kind == "nll" else objectives.dft
            return plain(logprobs, mask)
        case config.PFamily():
            return objectives.p_family(logprobs, mask, power=objective.power)
        case config.Eaft():
            entropies, k = outputs["entropies"], objective.k
            return objectives.eaft(logprobs, entropies, mask, k=k, power=objective.power)
        case config.Talr():
            if tau is None:
                raise ValueError("TALR wants the tau of the whole step's batch")
            return objectives.talr(logprobs, mask, tau=tau, min_weight=objective.min_weight)
        case _:
            assert_never(objective)


def _against_initial(
    logprobs: torch.Tensor, batch: TokenBatch, objective: config.IwSft | config.Psft
) -> torch.Tensor:
    """Losses with a ratio to the initial policy in them."""
    initial, mask = batch.aligned["initial_logprobs"], batch.loss_mask
    if isinstance(objective, config.Psft):
        low, high = objective.clip_low, objective.clip_high
        return objectives.psft(logprobs, initial, mask, clip_low=low, clip_high=high)
    if objective.level == "token":
        clip = (objective.ratio_clip_low, objective.ratio_clip_high)
        return objectives.iw_sft_token(logprobs, initial, mask, ratio_clip=clip)
    return objectives.iw_sft_sequence(
        logprobs, initial, batch.sequence_ids, mask, weight_cap=objective.weight_cap
    )


def _over_candidates(
    outputs: dict[str, torch.Tensor],
    batch: TokenBatch,
    objective: config.Asft | config.SftKl | config.ForwardKl,
) -> torch.Tensor:
    """Losses with a KL over candidates in them: the behavior policy's, or the initial one's."""
    if isinstance(objective, config.ForwardKl):
        return _candidate_kl(outputs, batch, objective.rest)
    anchored = objectives.asft if objective.kind == "asft" else objectives.sft_kl
    return anchored(
        outputs["logprobs"],
        _candidate_kl(outputs, batch, "tail"),
        batch.loss_mask,
        kl_coefficient=objective.kl_coefficient,
    )


def positive_weights(
    logprobs: torch.Tensor,
    batch: TokenBatch,
    kind: sft_config.WeightsConfig,
    positive: torch.Tensor,
) -> PearWeights:
    """The arm's own weights of the tokens that are `positive`, before any control of the step."""
    spans = batch.aligned.get("span_ids")
    weigh = functools.partial(
        pear_weights,
        _ratio_logprobs(logprobs, batch, kind),
        batch.aligned["behavior_logprobs"],
        batch.sequence_ids,
        positive,
        span_ids=None if spans is None else spans.long(),
    )
    if kind.kind == "pear":
        return weigh(config=kind)
    # Log-ratios are still worth seeing: they tell what PEAR would have done.
    measured = weigh(config=sft_config.PearWeights(level="sequence"))
    weights = torch.where(positive, _fixed_weights(batch, kind), 0.0)
    # A weight of 0 has no logarithm: it counts as the smallest that metrics know.
    logs = torch.where(positive, weights.log().clamp(min=LOG_WEIGHT_CLIP[0]), 0.0)
    return dataclasses.replace(measured, weights=weights, log_weights=logs)


def _fixed_weights(batch: TokenBatch, kind: sft_config.WeightsConfig) -> torch.Tensor:
    """[token], what no model has a say in: 1, or the weight of the row's source."""
    if kind.kind == "by_source":
        return batch.aligned[SOURCE_WEIGHTS]
    return torch.ones_like(batch.aligned["behavior_logprobs"])


def _controlled(own: PearWeights, batch: TokenBatch) -> PearWeights:
    """`own` with the step's control in place of the weights, at tokens that are no negatives."""
    weights, logs = (batch.aligned[name] for name in CONTROLLED)
    return dataclasses.replace(own, weights=weights, log_weights=logs)


def _ratio_logprobs(
    logprobs: torch.Tensor, batch: TokenBatch, kind: sft_config.WeightsConfig
) -> torch.Tensor:
    if kind.kind == "pear" and kind.ratio_policy != "live":
        name = {"init": "initial_logprobs", "ema": "ema_logprobs"}[kind.ratio_policy]
        return batch.aligned[name]
    return logprobs


def negative_tokens(batch: TokenBatch) -> torch.Tensor:
    """[token], True in rows that are known to be wrong."""
    marks = batch.aligned.get("is_negative")
    return torch.zeros_like(batch.loss_mask) if marks is None else marks.bool()


def _candidate_kl(
    outputs: dict[str, torch.Tensor], batch: TokenBatch, rest: config.KlRest
) -> torch.Tensor:
    if batch.candidate_ids is None or batch.candidate_logprobs is None:
        raise ValueError("the objective compares candidates, and the batch has none")
    return forward_kl_top_k(
        outputs["candidates"],
        batch.candidate_logprobs,
        batch.candidate_ids >= 0,
        batch.loss_mask,
        variant=rest,
        policy_rest_logprobs=outputs["rest"] if rest == "tail" else None,
    )


def _health(
    weights: PearWeights,
    logprobs: torch.Tensor,
    batch: TokenBatch,
    positive: torch.Tensor,
    settings: sft_config.SftConfig,
    groups: RowGroups | None,
) -> dict[str, float]:
    kind = settings.weights
    # The log-ratios of weights without a ratio are counted against the paper's bounds.
    bounds = clips(kind if kind.kind == "pear" else sft_config.PearWeights())
    clipped = {"log_ratio_clip": bounds[0], "log_weight_clip": bounds[1]}
    ids = batch.sequence_ids
    sums = weight_health.weight_sums(weights, logprobs, ids, positive, **clipped)
    if groups is not None:
        of_token = groups.of_row.to(ids.device)[ids]  # [token]
        sums |= group_sums(
            weights, logprobs, of_token, positive, num_groups=groups.num_groups, **clipped
        )
    return sums


def _negative_sums(
    weights: PearWeights,
    losses: torch.Tensor,
    logprobs: torch.Tensor,
    negative: torch.Tensor,
    settings: sft_config.NegativesConfig,
) -> dict[str, float]:
    below = negative & (logprobs.detach() <= settings.logprob_floor)
    return {
        "negative_tokens": float(negative.sum()),
        "negative_below_floor": float(below.sum()),
        "negative_weighted_loss": float((weights.weights * losses)[negative & ~below].sum()),
    }
