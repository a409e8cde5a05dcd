"""Mixed groups at other sizes: against all subsets, by hand, and on draws of a known Beta."""

import pytest
import torch

from pear_ray.algorithms.mixed_groups import fit_beta, mixed_beyond, mixed_within


@pytest.mark.parametrize(("num_samples", "num_correct"), [(6, 2), (6, 0), (6, 6), (5, 4)])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_within_the_samples_against_all_subsets(
    num_samples: int, num_correct: int, size: int
) -> None:
    samples = torch.tensor([1] * num_correct + [0] * (num_samples - num_correct))
    subsets = torch.combinations(samples, r=size)
    sums = subsets.sum(-1) if size > 1 else subsets.flatten()
    by_hand = ((sums > 0) & (sums < size)).double().mean().item()
    assert mixed_within(num_samples, num_correct, size) == pytest.approx(by_hand)


def test_beyond_them_by_hand() -> None:
    """Laplace's rule: under a flat prior the next of n wrong ones is right with 1 / (n + 2)."""
    flat = (1.0, 1.0)
    assert mixed_beyond(4, 0, 5, prior=flat) == pytest.approx(1 / 6)
    assert mixed_beyond(4, 4, 5, prior=flat) == pytest.approx(1 / 6)
    assert mixed_beyond(4, 0, 6, prior=flat) == pytest.approx(1 - 5 / 6 * 6 / 7)
    assert mixed_beyond(4, 1, 4, prior=flat) == 1.0
    assert mixed_beyond(4, 0, 4, prior=flat) == pytest.approx(0.0)
    # Right answers are likelier a priori: from wrong ones one expects more, from right ones less.
    assert mixed_beyond(4, 0, 5, prior=(3.0, 1.0)) == pytest.approx(3 / 8)
    assert mixed_beyond(4, 4, 5, prior=(3.0, 1.0)) == pytest.approx(1 / 8)


def test_a_fit_finds_the_beta_that_drew_and_predicts_larger_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rates = torch.distributions.Beta(0.5, 1.5).sample((20_000,))
    draws = torch.rand(20_000, 32, generator=generator) < rates[:, None]
    counts = [(8, int(c)) for c in draws[:, :8].sum(1)]
    a, b = fit_beta(counts)
    assert (a, b) == (pytest.approx(0.5, rel=0.05), pytest.approx(1.5, rel=0.05))
    expected = sum(mixed_beyond(n, c, 32, prior=(a, b)) for n, c in counts) / len(counts)
    of_32 = draws.sum(1)
    assert expected == pytest.approx(((of_32 > 0) & (of_32 < 32)).double().mean().item(), abs=0.01)


@pytest.mark.parametrize("correct", [0, 4])
def test_a_fit_holds_where_all_are_alike(correct: int) -> None:
    prior = fit_beta([(4, correct)] * 10)
    assert all(each > 0 for each in prior)
    assert 0 < mixed_beyond(4, correct, 64, prior=prior) < 0.7


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="group_size=5 of num_samples=4"):
        mixed_within(4, 1, 5)
    with pytest.raises(ValueError, match="group_size=3 is below num_samples=4"):
        mixed_beyond(4, 1, 3, prior=(1.0, 1.0))
    with pytest.raises(ValueError, match="num_correct=5 of num_samples=4"):
        mixed_within(4, 5, 2)
    with pytest.raises(ValueError, match="no prompt to fit"):
        fit_beta([])
