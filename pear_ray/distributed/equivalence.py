"""A guard at the start of training: cutting a batch otherwise must not change its gradient."""

from collections.abc import Callable, Sequence
from typing import Any

from pear_ray.errors import TrainingError

ROWS_PER_RANK = 2
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # relative; sums in another order round otherwise

Rows = list[dict[str, Any]]


def check_equivalence(
    probe: Callable[[list[Rows]], float],
    rows: Sequence[dict[str, Any]],
    *,
    rank: int,
    world_size: int,
    dtype: str,
) -> None:
    """Compare the gradient of a few rows cut in three ways (a collective, before the first step).

    On every rank all rows at once; split over the ranks, one microbatch each; split over the ranks,
    one row at a time. A backend that drops microbatches, or that averages where it should add,
    gives other norms: that has happened to plain SFT in several peers, unseen for months
    (DeepSpeed's ZeRO-1/2 with CPU offload, issue 7967).

    Args:
        probe: The gradient norm of microbatches, divided by the global denominator.
        rows: The same on every rank, `ROWS_PER_RANK` for each.
        rank: This rank.
        world_size: Number of ranks.
        dtype: What the backend computes in.

    Raises:
        TrainingError: The norms differ.
    """
    mine = list(rows[rank::world_size])
    whole = probe([list(rows)])
    split = probe([mine])
    accumulated = probe([[row] for row in mine])
    for name, norm in (("split over ranks", split), ("accumulated row by row", accumulated)):
        if not abs(norm - whole) <= TOLERANCE[dtype] * whole:
            raise TrainingError(
                f"the gradient norm of {len(rows)} rows is {whole:.6g} at once and {norm:.6g} "
                f"{name}: this backend loses or double-counts part of a batch; use another "
                "sft.backend, or another version of its library"
            )
