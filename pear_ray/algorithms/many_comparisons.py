"""Several tests at once: p adjusted for how many there are."""

from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p adjusted by Holm's step-down procedure (1979), in the order given.

    With the k-th smallest of m multiplied by `m - k + 1`, and none below a smaller one's: rejecting
    what is at most alpha rejects anything true with a chance of at most alpha, however the tests
    depend on each other.

    Raises:
        ValueError: One is outside [0, 1].
    """
    if wrong := [p for p in p_values if not 0.0 <= p <= 1.0]:
        raise ValueError(f"p={wrong[0]} is no chance; give values in [0, 1]")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda each: p_values[each])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
