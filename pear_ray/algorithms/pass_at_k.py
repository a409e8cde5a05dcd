"""Scores over samples per problem: pass@k, mean@n, maj@n, and intervals over problems."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# Draws held at once while bootstrapping (32 MiB of indices), whatever the number of problems.
MAX_DRAWS = 1 << 22


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased chance that at least one of k samples is right: `1 - C(n-c, k) / C(n, k)`.

    Chen et al. 2021 (arXiv 2107.03374), equation 1, in exact integers: no product of rounded
    factors, no cancellation.

    Raises:
        ValueError: Not `1 <= k <= num_samples` or not `0 <= num_correct <= num_samples`.
    """
    _check_counts(num_samples, num_correct)
    if not 1 <= k <= num_samples:
        raise ValueError(
            f"pass@{k} needs 1 to num_samples={num_samples} for k; draw more samples per problem "
            "or ask for a smaller k"
        )
    subsets = math.comb(num_samples, k)
    return (subsets - math.comb(num_samples - num_correct, k)) / subsets


def mean_at_n(num_samples: int, num_correct: int) -> float:
    """Share of a problem's n samples that are right; equals pass@1.

    Raises:
        ValueError: Not `0 <= num_correct <= num_samples` or no sample.
    """
    _check_counts(num_samples, num_correct)
    return num_correct / num_samples


def maj_at_n(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    """Chance that the majority answer of a problem's n samples is right.

    An answer of None (nothing could be extracted) has no vote. Answers tied for most votes are
    drawn with equal chance, so a tie of one right and one wrong answer gives 0.5.

    Args:
        answers: The answer extracted from each sample, in the verifier's normal form.
        correct: Whether each sample's answer is right.

    Raises:
        ValueError: The lengths differ, or there is no sample.
    """
    if len(answers) != len(correct) or not answers:
        raise ValueError(
            f"{len(answers)} answers and {len(correct)} verdicts; pass one verdict per answer and "
            "at least one of each"
        )
    winners = majority(answers)
    # Tied answers have equally many samples: the mean over samples is that over answers.
    verdicts = [
        verdict for answer, verdict in zip(answers, correct, strict=True) if answer in winners
    ]
    return sum(verdicts) / len(verdicts) if verdicts else 0.0


def majority(answers: Sequence[Hashable | None]) -> set[Hashable]:
    """The answers with most votes: several where they are tied, none where nobody has a vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    return {answer for answer, count in votes.items() if count == most}


def bootstrap_interval(
    values: Float[Tensor, " prompt"],
    *,
    seed: int,
    confidence: float = 0.95,
    num_resamples: int = 2000,
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean over problems.

    Problems are drawn with replacement, never samples within one: samples of a problem are not
    independent. For two arms on the same problems pass the per-problem differences: a paired
    interval, narrower than the difference of two.

    Args:
        values: One score (or difference of scores) per problem.
        seed: Same seed, same interval.
        confidence: Share of resampled means inside, in (0, 1).
        num_resamples: Number of resamples.

    Raises:
        ValueError: No value, or `confidence` outside (0, 1), or `num_resamples` below 1.
    """
    if not values.numel():
        raise ValueError("no problem to resample; evaluate at least one before asking for a range")
    if not (0.0 < confidence < 1.0 and num_resamples >= 1):
        raise ValueError(
            f"confidence={confidence}, num_resamples={num_resamples}; use a confidence in (0, 1), "
            "e.g. 0.95, and at least one resample, e.g. 2000"
        )
    scores = values.detach().double().cpu()
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, MAX_DRAWS // scores.numel())
    means = [
        scores[
            torch.randint(
                scores.numel(),
                (min(rows, num_resamples - start), scores.numel()),
                generator=generator,
            )
        ].mean(1)
        for start in range(0, num_resamples, rows)
    ]
    tail = (1.0 - confidence) / 2.0
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1.0 - tail]).double()).tolist()
    return low, high


def _check_counts(num_samples: int, num_correct: int) -> None:
    if not (0 <= num_correct <= num_samples and num_samples >= 1):
        raise ValueError(
            f"num_correct={num_correct} of num_samples={num_samples} is impossible; count both "
            "over the same samples of one problem"
        )
