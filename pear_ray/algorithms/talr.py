"""TALR's temperature: one number for a step's whole batch (arXiv 2509.20758)."""

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from pear_ray.algorithms.loss_tokens import select_loss_tokens

# Ours: a batch known by heart has a median loss of 0, and tau divides.
MIN_TAU = 1e-6


def sequence_mean_losses(
    losses: Float[Tensor, " token"],
    sequence_ids: Int[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
) -> Float64[Tensor, " sequence"]:
    """Mean loss of each sequence's loss tokens, detached; one per sequence that has any, in order.

    Args:
        losses: Per-token losses; read only at loss tokens. For TALR those of `objectives.nll`.
        sequence_ids: The sequence of each position, non-decreasing; each lies whole in the batch.
        loss_mask: True where a token trains.

    Raises:
        ValueError: `sequence_ids` decrease (see `select_loss_tokens`).
    """
    loss_tokens = select_loss_tokens(sequence_ids, loss_mask)
    selected = losses.detach()[loss_tokens.positions].double()
    sums = selected.new_zeros(loss_tokens.ends.numel())
    return sums.index_add_(0, loss_tokens.sequence_index, selected) / loss_tokens.counts


def batch_tau(sequence_means: Float[Tensor, " sequence"]) -> float:
    """TALR's tau: the median of a step's mean token losses, nats, at least `MIN_TAU`.

    Of an even number it is the mean of the middle two (ours; the order never matters).

    Args:
        sequence_means: `sequence_mean_losses` of every microbatch and rank of the step, in one
            tensor. A median of medians would depend on how the batch was cut.

    Raises:
        ValueError: There is no sequence, or a mean is not finite.
    """
    if sequence_means.numel() == 0 or not bool(sequence_means.isfinite().all()):
        raise ValueError(
            f"{sequence_means.numel()} sequences have means {sequence_means.tolist()[:8]}, which "
            "have no median; skip a step without loss tokens, and mask out losses of NaN or inf"
        )
    return max(float(torch.quantile(sequence_means.double(), 0.5)), MIN_TAU)
