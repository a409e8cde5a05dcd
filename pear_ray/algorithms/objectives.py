"""Base objectives: the per-token loss that a weight multiplies."""

from jaxtyping import Bool, Float
from torch import Tensor

from pear_ray.algorithms.loss_tokens import scatter_masked


def nll(
    policy_logprobs: Float[Tensor, " token"], loss_mask: Bool[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """`-log p` per token (plain SFT), nats; 0 outside the mask, which is never read."""
    selected = policy_logprobs[loss_mask]
    return scatter_masked(-selected, loss_mask)


def dft(
    policy_logprobs: Float[Tensor, " token"], loss_mask: Bool[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """`sg[p] * -log p` per token (DFT, arXiv 2508.05629), nats; 0 outside the mask.

    `p` is frozen, so an unlikely token is trained on in proportion to its own probability.
    """
    selected = policy_logprobs[loss_mask]
    return scatter_masked(-selected.detach().exp() * selected, loss_mask)
