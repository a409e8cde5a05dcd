"""Two checkpoints on the same problems: how their scores differ, and what may be said of it."""

import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from pear_ray.config.evaluate import MAIN_SUITE
from pear_ray.records import RewardStatus

if TYPE_CHECKING:
    from pear_ray.algorithms.paired import PairedDifference

Counts = Mapping[str, tuple[int, int]]
"""Of each problem, by id: samples with a verdict, and how many of them are correct."""
LEAST_P = 0.001  # smaller ones are told as such


def load_counts(samples_path: Path) -> dict[tuple[str, str], Counts]:
    """What `evaluate/samples.parquet` says of each problem, by suite and checkpoint."""
    keys = ["checkpoint", "problem_id", "reward_status"]
    # Tables from before there were suites are of one.
    has_suites = "suite" in pq.read_schema(samples_path).names
    keys += ["suite"] if has_suites else []
    table = pq.read_table(samples_path, columns=keys).group_by(keys).aggregate([([], "count_all")])
    found: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
    for row in table.to_pylist():
        counts = found.setdefault((row.get("suite", MAIN_SUITE), row["checkpoint"]), {})
        judged, correct = counts.get(row["problem_id"], (0, 0))
        number = 0 if row["reward_status"] == RewardStatus.ERRORED else row["count_all"]
        is_right = row["reward_status"] == RewardStatus.OK
        counts[row["problem_id"]] = (judged + number, correct + number * is_right)
    return {key: dict(sorted(counts.items())) for key, counts in found.items()}


def pair(
    before: Counts | None, after: Counts | None, *, k: int, confidence: float
) -> "PairedDifference | None":
    """How pass@k differs; None where the problems are not the same or one has too few verdicts."""
    # Torch takes seconds, and no page without an evaluation needs it.
    from pear_ray.algorithms.paired import paired_difference  # noqa: PLC0415

    if not before or not after or before.keys() != after.keys():
        return None
    if min(judged for counts in (before, after) for judged, _ in counts.values()) < k:
        return None
    return paired_difference(
        [_pass_at_k(*before[problem], k) for problem in before],
        [_pass_at_k(*after[problem], k) for problem in before],
        seed=0,
        confidence=confidence,
    )


def difference_words(found: "PairedDifference") -> str:
    """`+0.036 [+0.010, +0.062], p = 0.031`."""
    words = f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    if found.p is None:
        return words
    return f"{words}, p {f'< {LEAST_P}' if found.p < LEAST_P else f'= {found.p:.3f}'}"


def problem_counts(found: "PairedDifference") -> str:
    """On how many problems it is better and worse."""
    return f"{found.num_better} of {found.num_pairs} problems better, {found.num_worse} worse"


def _pass_at_k(num_samples: int, num_correct: int, k: int) -> Fraction:
    """`algorithms.pass_at_k`, exact: a test of signs must know which sums are equal."""
    subsets = math.comb(num_samples, k)
    return Fraction(subsets - math.comb(num_samples - num_correct, k), subsets)
