"""Controls of a whole step: gathered over microbatches and ranks, made once, and given back."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from pear_ray.algorithms.loss_tokens import scatter_masked
from pear_ray.algorithms.weight_controls import (
    StepWeights,
    join_step_weights,
    position_profile,
    select_step_weights,
    shuffled_over_sequences,
    shuffled_over_tokens,
)
from pear_ray.config.sft import PearWeights, SftConfig
from pear_ray.distributed.sft_rows import ROW_NUMBER
from pear_ray.distributed.sft_terms import CONTROLLED, negative_tokens, positive_weights
from pear_ray.engines.batches import TokenBatch


def without_step_control(settings: SftConfig) -> SftConfig:
    """`settings` with the arm's own weights in place of a control that is made of whole steps."""
    own = settings.weights.model_copy(update={"control": "none"})
    return settings.model_copy(update={"weights": own})


@torch.no_grad()
def control_step(
    microbatches: Sequence[Sequence[dict[str, Any]]],
    batches: Sequence[TokenBatch],
    logprobs: Sequence[torch.Tensor],
    weights: PearWeights,
    *,
    seed: int,
    step: int,
) -> None:
    """Put into each batch what its tokens weigh under `weights.control` (a collective).

    Args:
        microbatches: The rows of each batch, with their numbers in the corpus.
        batches: This rank's part of the step.
        logprobs: The policy's, of each batch, [token].
        weights: Which weights, and which control of them.
        seed: The run's; with `step` it decides who gets whose weight.
        step: Optimizer steps behind the weights.
    """
    own = []
    for rows, batch, found in zip(microbatches, batches, logprobs, strict=True):
        positive = ~negative_tokens(batch)
        pear = positive_weights(found, batch, weights, positive)
        numbers = [row[ROW_NUMBER] for row in rows] or [0]  # a batch without rows has a pad's
        keys = torch.tensor(numbers, device=batch.sequence_ids.device)
        part = select_step_weights(pear, batch.sequence_ids, positive, keys)
        own.append(_moved(part, torch.device("cpu")))
    mine = join_step_weights(own)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    controlled = _controlled(join_step_weights(every), weights, seed=seed, step=step)
    first = sum(part.weights.numel() for part in every[: dist.get_rank()])
    sizes = [part.weights.numel() for part in own]
    for name, values in zip(CONTROLLED, (controlled.weights, controlled.log_weights), strict=True):
        shares = values[first : first + sum(sizes)].split(sizes)
        for batch, share in zip(batches, shares, strict=True):
            device = batch.sequence_ids.device
            batch.aligned[name] = scatter_masked(share.to(device), ~negative_tokens(batch))


def _controlled(found: StepWeights, weights: PearWeights, *, seed: int, step: int) -> StepWeights:
    if weights.control == "position_profile":
        return position_profile(found)
    shuffled = shuffled_over_sequences if weights.level == "sequence" else shuffled_over_tokens
    return shuffled(found, seed=seed, step=step)


def _moved(found: StepWeights, device: torch.device) -> StepWeights:
    names = (field.name for field in dataclasses.fields(StepWeights))
    return StepWeights(*(getattr(found, name).to(device) for name in names))
