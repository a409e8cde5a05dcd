"""The mean of several curves, and how sure it is."""

import torch
from jaxtyping import Float
from torch import Tensor

NUM_RESAMPLES = 2000  # as of `bootstrap_interval`


def bootstrap_band(
    curves: Float[Tensor, "seed step"], *, seed: int, confidence: float
) -> tuple[Float[Tensor, " step"], Float[Tensor, " step"]]:
    """Ends of the percentile bootstrap interval of the mean over seeds, at every step.

    Whole curves are drawn: steps of one seed are not independent. The interval is each step's own;
    that the mean lies in the band everywhere is less likely.

    Raises:
        ValueError: There is no curve, or `confidence` is outside (0, 1).
    """
    if not len(curves) or not 0.0 < confidence < 1.0:
        raise ValueError(
            f"{len(curves)} curves, confidence={confidence}; give at least one, and a level in "
            "(0, 1)"
        )
    values = curves.double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (NUM_RESAMPLES, len(values)), generator=generator)
    # How often each seed is drawn: one product in place of a [resample, seed, step] tensor.
    counts = torch.zeros(NUM_RESAMPLES, len(values), dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    means = counts @ values / len(values)  # [resample, step]
    tail = (1.0 - confidence) / 2.0
    low, high = means.quantile(torch.tensor([tail, 1.0 - tail], dtype=torch.float64), dim=0)
    return low, high
