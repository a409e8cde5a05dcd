"""How often a group of another size would hold right and wrong completions."""

import math
from collections.abc import Sequence

# Bounds of the correlation of a prompt's samples: a Beta of finite, positive counts.
MIN_CORRELATION, MAX_CORRELATION = 1e-3, 0.999


def mixed_within(num_samples: int, num_correct: int, group_size: int) -> float:
    """Chance that `group_size` of a prompt's samples, drawn without replacement, are mixed.

    Unbiased for a group of that size, by the argument of pass@k (arXiv 2107.03374, equation 1).

    Raises:
        ValueError: Not `1 <= group_size <= num_samples`, or impossible counts.
    """
    _check_counts(num_samples, num_correct)
    if not 1 <= group_size <= num_samples:
        raise ValueError(
            f"group_size={group_size} of num_samples={num_samples}; use 1 up to that many, or "
            "mixed_beyond"
        )
    if group_size == 1:
        return 0.0
    alike = math.comb(num_correct, group_size) + math.comb(num_samples - num_correct, group_size)
    subsets = math.comb(num_samples, group_size)
    return (subsets - alike) / subsets


def mixed_beyond(
    num_samples: int, num_correct: int, group_size: int, *, prior: tuple[float, float]
) -> float:
    """Chance that a prompt's samples are mixed once they are filled up to `group_size`.

    1 where they are mixed already. Where all are alike it is the chance that one of the others is
    not, with the prompt's rate from the posterior Beta: `1 - B(a + c + m, b) / B(a + c, b)` for m
    more samples after c right ones, and the same with a and b exchanged after wrong ones.

    Args:
        num_samples: Drawn so far.
        num_correct: Of these.
        group_size: At least `num_samples`.
        prior: The Beta's two counts over prompts, as from `fit_beta`.

    Raises:
        ValueError: Impossible counts, or fewer than there are.
    """
    _check_counts(num_samples, num_correct)
    more = group_size - num_samples
    if more < 0:
        raise ValueError(f"group_size={group_size} is below num_samples={num_samples}")
    if 0 < num_correct < num_samples:
        return 1.0
    same, other = prior if num_correct else prior[::-1]
    same += num_samples
    return 1.0 - math.exp(_log_beta(same + more, other) - _log_beta(same, other))


def fit_beta(counts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """The two counts of a Beta over prompts' pass rates, from `(num_samples, num_correct)` each.

    By moments: its mean is the share of right samples (a half of one added to both sides, for where
    all are alike), and its spread what the rates vary more than binomial noise would.

    Raises:
        ValueError: There is no prompt.
    """
    if not counts:
        raise ValueError("no prompt to fit; sample at least one")
    total = sum(n for n, _ in counts)
    mean = (sum(c for _, c in counts) + 0.5) / (total + 1)
    per_prompt = total / len(counts)
    spread = sum((c / n - mean) ** 2 for n, c in counts) / max(1, len(counts) - 1)
    # Var(c / n) = mean (1 - mean) (1 + (n - 1) correlation) / n of a beta-binomial.
    excess = spread / (mean * (1 - mean)) * per_prompt - 1
    correlation = excess / max(1.0, per_prompt - 1)
    scale = 1 / min(max(correlation, MIN_CORRELATION), MAX_CORRELATION) - 1
    return mean * scale, (1 - mean) * scale


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _check_counts(num_samples: int, num_correct: int) -> None:
    if not (0 <= num_correct <= num_samples and num_samples >= 1):
        raise ValueError(
            f"num_correct={num_correct} of num_samples={num_samples} is impossible; count both "
            "over the same samples of one prompt"
        )
