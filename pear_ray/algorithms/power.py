"""How many pairs it takes to see a difference of a given size."""

import math
from statistics import NormalDist


def least_p(num_pairs: int) -> float:
    """The smallest two-sided sign-flip p of so many pairs: all signs alike, one way or the other.

    Raises:
        ValueError: `num_pairs` is below 0.
    """
    if num_pairs < 0:
        raise ValueError(f"num_pairs={num_pairs}; count from 0")
    return min(1.0, 2.0 / 2.0**num_pairs)


def fewest_pairs(alpha: float) -> int:
    """The smallest number of pairs whose sign-flip p can be at most `alpha`.

    Raises:
        ValueError: `alpha` is outside (0, 1).
    """
    _check_share(alpha=alpha)
    return max(1, math.ceil(1.0 - math.log2(alpha) - 1e-9))


def pairs_needed(*, sd: float, difference: float, alpha: float, power: float) -> int:
    """Pairs that show a mean difference with a chance of `power`, two-sided at `alpha`.

    For a paired t test of normal differences, by the normal formula with Guenther's correction
    (1981, The American Statistician 35): `((z_a + z_b) sd / difference)^2 + z_a^2 / 2`, within one
    of the exact number. The sign-flip test has about that power, and never does with fewer than
    `fewest_pairs`.

    Args:
        sd: Of one pair's difference, from pair to pair.
        difference: The mean to be seen, in the same units, not 0.
        alpha: Level, in (0, 1).
        power: Chance to find it, in (0, 1).

    Raises:
        ValueError: An argument is out of its range.
    """
    _check_share(alpha=alpha, power=power)
    if sd < 0 or difference == 0:
        raise ValueError(f"sd={sd}, difference={difference}; give an sd and a size above 0")
    level, chance = _quantiles(alpha, power)
    found = ((level + chance) * sd / difference) ** 2 + level**2 / 2 * (sd > 0)
    return max(fewest_pairs(alpha), math.ceil(found))


def detectable_difference(*, sd: float, num_pairs: int, alpha: float, power: float) -> float | None:
    """The mean difference that so many pairs show with a chance of `power`, two-sided at `alpha`.

    The inverse of `pairs_needed`, in the units of `sd`; None with fewer than `fewest_pairs`.

    Raises:
        ValueError: An argument is out of its range.
    """
    _check_share(alpha=alpha, power=power)
    level, chance = _quantiles(alpha, power)
    left = num_pairs - level**2 / 2
    if num_pairs < fewest_pairs(alpha) or left <= 0:
        return None
    return (level + chance) * sd / math.sqrt(left)


def _quantiles(alpha: float, power: float) -> tuple[float, float]:
    normal = NormalDist()
    return normal.inv_cdf(1.0 - alpha / 2.0), normal.inv_cdf(power)


def _check_share(**shares: float) -> None:
    for name, share in shares.items():
        if not 0.0 < share < 1.0:
            raise ValueError(f"{name}={share}; use a share in (0, 1), such as 0.05 or 0.8")
