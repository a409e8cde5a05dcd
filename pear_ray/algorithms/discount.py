"""What PEAR's discount and clips do by arithmetic alone, before any token is scored.

Token level is a block of one token; sequence level has no discount, so nothing here is for it.
"""

import math

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from pear_ray.algorithms.pear import LOG_WEIGHT_CLIP

_HALVINGS = 60  # bisection steps: far below float64's resolution of a discount


def perfect_ratio_mean_weights(
    num_loss_tokens: Int[Tensor, " sequence"],
    *,
    gamma: float,
    block_size: int = 1,
    log_weight_low: float = LOG_WEIGHT_CLIP[0],
) -> Float64[Tensor, " sequence"]:
    """Mean weight of a sequence of T loss tokens whose policy equals the behavior policy (d = 0).

    The closed form of `1/T sum_t max(gamma^(T-e), exp(low))`, with `e` the last token of t's block:
    a geometric series over the blocks above the floor, and the floor for those before them.

    Raises:
        ValueError: `gamma` is outside (0, 1], or `block_size` or a length is below 1.
    """
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"gamma={gamma} is not a discount; use a value in (0, 1], e.g. 0.999")
    if block_size < 1 or bool((num_loss_tokens < 1).any()):
        raise ValueError("block_size and every length count tokens; use 1 or more")
    lengths = num_loss_tokens.double()
    if gamma == 1.0:
        return torch.ones_like(lengths)
    full_blocks = torch.ceil(lengths / block_size) - 1  # before the last, which weighs 1
    last = lengths - full_blocks * block_size
    log_gamma = math.log(gamma)
    # Blocks j = 0, 1, ... back from the last one have T - e = last + j * block_size.
    reach = log_weight_low / log_gamma  # the largest T - e above the floor
    above = (torch.floor((reach - last) / block_size) + 1).clamp(min=0).minimum(full_blocks)
    # expm1: at gamma 0.99999 the plain form loses half its digits.
    series = torch.expm1(above * block_size * log_gamma) / math.expm1(block_size * log_gamma)
    discounted = block_size * (last * log_gamma).exp() * series
    floored = block_size * (full_blocks - above) * math.exp(log_weight_low)
    return (last + discounted + floored) / lengths


def gamma_for_mean_weight(
    mean_weight: float,
    *,
    num_loss_tokens: int,
    block_size: int = 1,
    log_weight_low: float = LOG_WEIGHT_CLIP[0],
) -> float:
    """The smallest gamma with which a perfect ratio has at least this mean weight at this length.

    Raises:
        ValueError: `mean_weight` is outside (0, 1].
    """
    if not 0.0 < mean_weight <= 1.0:
        raise ValueError(f"mean_weight={mean_weight} is not a discounted mean; use one in (0, 1]")
    length = torch.tensor([num_loss_tokens])
    # Bisected in -ln(gamma), in which the mean falls from 1 at 0.
    enough, too_much = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (enough + too_much) / 2
        mean = perfect_ratio_mean_weights(
            length,
            gamma=math.exp(-middle),
            block_size=block_size,
            log_weight_low=log_weight_low,
        )
        enough, too_much = (middle, too_much) if mean.item() >= mean_weight else (enough, middle)
    return math.exp(-enough)


def tokens_to_bound(
    mean_log_ratio: float,
    *,
    gamma: float,
    log_weight_clip: tuple[float, float] = LOG_WEIGHT_CLIP,
) -> int | None:
    """How many tokens before the end a steady clipped log-ratio takes the log-weight to a bound.

    None where the log-weight does not move: the drift and the discount cancel.

    Raises:
        ValueError: `gamma` is outside (0, 1].
    """
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"gamma={gamma} is not a discount; use a value in (0, 1], e.g. 0.999")
    per_token = mean_log_ratio + math.log(gamma)
    if per_token == 0.0:
        return None
    return math.ceil(log_weight_clip[per_token > 0] / per_token)
