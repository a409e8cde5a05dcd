"""Every base objective: by hand, against formulas on a full softmax, and its limits."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.algorithms import objectives
from pear_ray.algorithms.full_kl import full_kl
from pear_ray.algorithms.logprobs import chosen_logprobs, top_k_entropies
from pear_ray.algorithms.reduce import loss_numerator
from pear_ray.algorithms.talr import MIN_TAU, batch_tau, sequence_mean_losses

QUICK = settings(deadline=None, max_examples=20)
LENGTHS = st.lists(st.integers(1, 8), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**31)
NAN = math.nan


def logs(*probs, grad=True):
    return torch.tensor(probs, dtype=torch.float64).log().requires_grad_(grad)


def check(losses, policy, *, values, gradients):
    """Losses and gradients of the log-probs, to six decimals."""
    assert losses.tolist() == pytest.approx(values, abs=1e-6)
    (got,) = torch.autograd.grad(losses.sum(), policy)
    assert got.tolist() == pytest.approx(gradients, abs=1e-6)


MASK = torch.tensor([True, True, False])


def test_p_family_by_hand():
    policy = logs(0.25, 0.81, NAN)
    # a = 1/2: (1 - .5) / .5 = 1 and (1 - .9) / .5 = .2; gradients -p^a = -.5 and -.9.
    half = objectives.p_family(policy, MASK, power=0.5)
    check(half, policy, values=[1.0, 0.2, 0.0], gradients=[-0.5, -0.9, 0.0])
    # a = 1: 1 - p. a = 2: (1 - .0625) / 2 and (1 - .6561) / 2.
    one = objectives.p_family(policy, MASK, power=1.0)
    check(one, policy, values=[0.75, 0.19, 0.0], gradients=[-0.25, -0.81, 0.0])
    two = objectives.p_family(policy, MASK, power=2.0)
    check(two, policy, values=[0.46875, 0.17195, 0.0], gradients=[-0.0625, -0.6561, 0.0])
    zero = objectives.p_family(policy, MASK, power=0.0)
    check(zero, policy, values=[1.386294, 0.210721, 0.0], gradients=[-1.0, -1.0, 0.0])
    # A power that float32 cannot hold is not 0 / 0.
    assert torch.equal(objectives.p_family(policy, MASK, power=5e-324), zero)


def test_iw_sft_by_hand():
    policy, proximal = logs(0.5, 0.125, NAN), logs(0.25, 0.25, NAN)
    ids = torch.zeros(3, dtype=torch.long)
    # Log-ratios ln 2 and -ln 2 have mean 0: weight 1. Without the second: ln 2, weight 2.
    both = objectives.iw_sft_sequence(policy, proximal, ids, MASK)
    check(both, policy, values=[0.693147, 2.079442, 0.0], gradients=[-1.0, -1.0, 0.0])
    first = torch.tensor([True, False, False])
    alone = objectives.iw_sft_sequence(policy, proximal, ids, first)
    check(alone, policy, values=[1.386294, 0.0, 0.0], gradients=[-2.0, 0.0, 0.0])
    # A ratio of 2^20 is held at 16: 16 ln 4.
    capped = objectives.iw_sft_sequence(logs(0.25), logs(2**-22), ids[:1], first[:1])
    assert capped.item() == pytest.approx(16 * math.log(4.0))
    # Tokens: ratio 2 is held at 1.8 (1.8 ln 2), ratio 1/2 stays (.5 ln 8), 1/8 is held at .2.
    token = objectives.iw_sft_token(policy, proximal, MASK)
    check(token, policy, values=[1.247665, 1.039721, 0.0], gradients=[-1.8, -0.5, 0.0])
    low = objectives.iw_sft_token(logs(0.125), logs(1.0), torch.tensor([True]))
    assert low.item() == pytest.approx(0.2 * math.log(8.0))
    assert torch.autograd.grad(both.sum(), proximal, allow_unused=True) == (None,)


def test_talr_by_hand():
    policy = logs(0.25, 2**-10, NAN)
    # tau 2: sqrt(.25) = .5, and sqrt(2^-10) = 1/32, held at .1.
    losses = objectives.talr(policy, MASK, tau=2.0, min_weight=0.1)
    expected = [0.5 * math.log(4.0), 0.1 * math.log(1024.0), 0.0]
    check(losses, policy, values=expected, gradients=[-0.5, -0.1, 0.0])
    # tau 1 and no floor is DFT; a floor of 1 is plain SFT; the least tau keeps only p = 1 whole.
    dft = objectives.dft(policy, MASK)
    assert torch.equal(objectives.talr(policy, MASK, tau=1.0, min_weight=0.0), dft)
    nll = objectives.nll(policy, MASK)
    assert torch.equal(objectives.talr(policy, MASK, tau=0.3, min_weight=1.0), nll)
    sure = torch.tensor([1e-6, -0.5])  # a log-prob a rounding above 0
    rounded = objectives.talr(sure, MASK[:2], tau=MIN_TAU, min_weight=0.25)
    assert rounded.tolist() == pytest.approx([-1e-6, 0.125])


def test_tau_by_hand():
    losses = torch.tensor([1.0, 3.0, NAN, 4.0, 6.0, 8.0, NAN])
    ids = torch.tensor([0, 0, 0, 4, 4, 5, 6])
    mask = torch.tensor([True, True, False, True, True, True, False])
    # Sequence 6 has no loss token and no mean: (1 + 3) / 2, (4 + 6) / 2, 8.
    means = sequence_mean_losses(losses.requires_grad_(), ids, mask)
    assert means.tolist() == [2.0, 5.0, 8.0]
    assert not means.requires_grad
    assert batch_tau(means) == 5.0
    # From two ranks, of 3 and 1 sequences: the median of all four, not of 5 and 1.
    assert batch_tau(torch.cat([means, torch.tensor([1.0])])) == 3.5
    assert batch_tau(torch.zeros(3)) == MIN_TAU
    with pytest.raises(ValueError, match="0 sequences"):
        batch_tau(torch.zeros(0))
    with pytest.raises(ValueError, match=r"\[1\.0, nan\]"):
        batch_tau(torch.tensor([1.0, NAN]))
    with pytest.raises(ValueError, match="sequence_ids decrease"):
        sequence_mean_losses(losses, ids.flip(0), mask.flip(0))


def test_psft_by_hand():
    policy, old = logs(0.25, 0.6, 0.15), logs(0.5, 0.4, 0.1)
    # r = .5 (below .8, still taken: the smaller), 1.5 (held at 1.28), 1.5 with a wider clip.
    mask = torch.tensor([True, True, True])
    losses = objectives.psft(policy, old, mask)
    check(losses, policy, values=[-0.5, -1.28, -1.28], gradients=[-0.5, 0.0, 0.0])
    wide = objectives.psft(policy, old, mask, clip_high=1.0)
    check(wide, policy, values=[-0.5, -1.5, -1.5], gradients=[-0.5, -1.5, -1.5])
    # On the first pass r = 1 and the gradient is plain SFT's.
    first = objectives.psft(policy, policy, mask)
    check(first, policy, values=[-1.0] * 3, gradients=[-1.0] * 3)


def test_eaft_by_hand():
    policy = logs(0.5, 0.25, NAN)
    entropies = torch.tensor([math.log(2.0), math.log(4.0), NAN], dtype=torch.float64)
    # k = 4: H / ln 4 = 1/2 and 1. Squared: 1/4 and 1.
    losses = objectives.eaft(policy, entropies, MASK, k=4)
    expected = [0.5 * math.log(2.0), math.log(4.0), 0.0]
    check(losses, policy, values=expected, gradients=[-0.5, -1.0, 0.0])
    squared = objectives.eaft(policy, entropies, MASK, k=4, power=2.0)
    expected = [0.25 * math.log(2.0), math.log(4.0), 0.0]
    check(squared, policy, values=expected, gradients=[-0.25, -1.0, 0.0])
    plain = objectives.eaft(policy, torch.tensor([0.0, 1.0, NAN]), MASK, power=0.0)
    assert torch.equal(plain, objectives.nll(policy, MASK))
    rounded = objectives.eaft(policy, torch.tensor([-1e-9, 0.0, NAN]), MASK, power=0.5)
    assert rounded.tolist() == [0.0] * 3


def test_anchored_objectives_by_hand():
    policy = logs(0.5, 0.25, NAN)
    kl = torch.tensor([2.0, 3.0, NAN], dtype=torch.float64, requires_grad=True)
    # .5 ln 2 + .1 * 2 and .25 ln 4 + .1 * 3.
    losses = objectives.asft(policy, kl, MASK)
    check(losses, policy, values=[0.546574, 0.646574, 0.0], gradients=[-0.5, -0.25, 0.0])
    # ln 2 + .5 * 2 and ln 4 + .5 * 3.
    losses = objectives.sft_kl(policy, kl, MASK, kl_coefficient=0.5)
    (gradient,) = torch.autograd.grad(losses.sum(), kl, retain_graph=True)
    assert gradient.tolist() == [0.5, 0.5, 0.0]
    check(losses, policy, values=[1.693147, 2.886294, 0.0], gradients=[-1.0, -1.0, 0.0])


# Formulas once more, one token at a time, from full softmaxes: `p`, `p_ref` and `log` are floats of
# a graph; a weight is frozen with `.detach()`, as `sg` says.
def sequence_weight(p, r, own):
    return torch.stack([(p[t] / r[t]).log() for t in own]).mean().exp().detach().clamp(max=16.0)


FORMULAS = {
    "nll": lambda p, **_: -p.log(),
    "dft": lambda p, **_: -p.detach() * p.log(),
    "p_family": lambda p, **_: (1 - p**0.7) / 0.7,
    "iw_sft_token": lambda p, r, **_: -(p / r).detach().clamp(0.2, 1.8) * p.log(),
    "iw_sft_sequence": lambda p, weight, **_: -weight * p.log(),
    "talr": lambda p, **_: -(p.detach() ** (1 / 1.7)).clamp(min=0.3) * p.log(),
    "psft": lambda p, r, **_: -torch.minimum(p / r, (p / r).clamp(0.8, 1.28)),
    "eaft": lambda p, gate, **_: -(gate.detach() ** 1.5) * p.log(),
    "asft": lambda p, kl, **_: -p.detach() * p.log() + 0.1 * kl,
    "sft_kl": lambda p, kl, **_: -p.log() + 0.1 * kl,
}
ARGUMENTS = {
    "nll": (objectives.nll, ()),
    "dft": (objectives.dft, ()),
    "p_family": (partial(objectives.p_family, power=0.7), ()),
    "iw_sft_token": (objectives.iw_sft_token, ("proximal",)),
    "iw_sft_sequence": (objectives.iw_sft_sequence, ("proximal", "ids")),
    "talr": (partial(objectives.talr, tau=1.7, min_weight=0.3), ()),
    "psft": (objectives.psft, ("proximal",)),
    "eaft": (partial(objectives.eaft, power=1.5), ("entropies",)),
    "asft": (objectives.asft, ("kl",)),
    "sft_kl": (objectives.sft_kl, ("kl",)),
}
NAMES = sorted(FORMULAS)


def make_batch(lengths, seed, *, vocab=25, width=6):
    """A packed batch with holes in its mask, from the hidden states and heads of two models."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    batch = {
        "hidden": torch.randn(total, width, generator=generator),
        "head": torch.randn(vocab, width, generator=generator),
        "chosen": torch.randint(vocab, (total,), generator=generator),
        "ids": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        "mask": torch.rand(total, generator=generator) >= 0.3,
    }
    batch["mask"][torch.tensor(lengths).cumsum(0) - 1] = True
    for part, scale in (("hidden", 0.3), ("head", 0.3)):
        noise = torch.randn(batch[part].shape, generator=generator)
        batch[f"reference_{part}"] = batch[part] + scale * noise
    return batch


def ours(name, batch, *, poison=None, chunk_tokens=256):
    """Losses and the gradients of hidden states and head, through this package alone."""
    hidden, head = (batch[part].clone().requires_grad_() for part in ("hidden", "head"))
    reference = (batch["reference_hidden"], batch["reference_head"])
    columns = {
        "policy": chosen_logprobs(hidden, head, batch["chosen"], chunk_tokens=chunk_tokens),
        "proximal": chosen_logprobs(*reference, batch["chosen"]),
        "kl": full_kl(hidden, head, *reference, chunk_tokens=chunk_tokens),
        "entropies": top_k_entropies(hidden, head, chunk_tokens=chunk_tokens),
    }
    mask = batch["mask"]
    if poison is not None:
        columns = {k: torch.where(mask, v, torch.tensor(poison)) for k, v in columns.items()}
    columns["ids"] = batch["ids"]
    function, wanted = ARGUMENTS[name]
    losses = function(columns["policy"], *(columns[each] for each in wanted), loss_mask=mask)
    factors = torch.arange(1.0, len(mask) + 1)
    return losses.detach(), torch.autograd.grad((losses * factors).sum(), [hidden, head])


def straightforward(name, batch):
    """The same from full float64 softmaxes, a token at a time."""
    hidden, head = (batch[part].double().requires_grad_() for part in ("hidden", "head"))
    policy = (hidden @ head.t()).softmax(-1)
    reference = (batch["reference_hidden"].double() @ batch["reference_head"].double().t()).softmax(
        -1
    )
    chosen = list(batch["chosen"])
    p = [row[i] for row, i in zip(policy, chosen, strict=True)]
    r = [row[i] for row, i in zip(reference, chosen, strict=True)]
    kept = batch["mask"].nonzero()[:, 0].tolist()
    losses = [torch.zeros((), dtype=torch.float64)] * len(p)
    for t in kept:
        own = [s for s in kept if batch["ids"][s] == batch["ids"][t]]
        top = policy[t].sort(descending=True).values[:20]
        top = top / top.sum()
        losses[t] = FORMULAS[name](
            p[t],
            r=r[t],
            weight=sequence_weight(p, r, own),
            gate=-(top * top.log()).sum() / math.log(20.0),
            kl=(reference[t] * (reference[t] / policy[t]).log()).sum(),
        )
    losses = torch.stack(losses)
    factors = torch.arange(1.0, len(p) + 1)
    return losses.detach(), torch.autograd.grad((losses * factors).sum(), [hidden, head])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("lengths", "seed"), [([5, 1, 7], 0), ([12], 1), ([1, 1, 3], 2)])
def test_losses_and_gradients_are_those_of_the_formulas_on_a_full_softmax(name, lengths, seed):
    batch = make_batch(lengths, seed)
    losses, gradients = ours(name, batch, chunk_tokens=3)
    want, expected = straightforward(name, batch)
    torch.testing.assert_close(losses.double(), want, rtol=1e-4, atol=1e-5)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("poison", [NAN, math.inf, -math.inf])
def test_masked_positions_reach_neither_value_nor_gradient(name, poison):
    batch = make_batch([4, 6], 3)
    assert not batch["mask"].all()
    (losses, gradients), (want, expected) = ours(name, batch, poison=poison), ours(name, batch)
    assert torch.equal(losses, want)
    assert (losses[~batch["mask"]] == 0).all()
    assert all(map(torch.equal, gradients, expected))


@QUICK
@given(LENGTHS, SEEDS, st.sampled_from(NAMES), st.randoms(use_true_random=False))
def test_packing_and_the_order_of_a_batch_change_nothing(lengths, seed, name, random):
    batch = make_batch(lengths, seed)
    want, expected = ours(name, batch)
    order = list(range(len(lengths)))
    random.shuffle(order)
    # Each sequence behind two masked positions of garbage, under another number.
    at, ids, mask = [], [], []
    for number, sequence in enumerate(order):
        own = (batch["ids"] == sequence).nonzero()[:, 0]
        at.append(torch.cat([own[:1], own[:1], own]))
        ids.append(torch.full((len(own) + 2,), 3 * number + 1))
        mask.append(torch.cat([torch.zeros(2, dtype=torch.bool), batch["mask"][own]]))
    at, mask = torch.cat(at), torch.cat(mask)
    rows = ("hidden", "chosen", "reference_hidden")
    moved = batch | {each: batch[each][at] for each in rows} | {"ids": torch.cat(ids), "mask": mask}
    losses, _ = ours(name, moved)
    torch.testing.assert_close(losses[mask], want[at][mask], rtol=1e-5, atol=1e-6)
    # One sequence at a time (microbatches) as well, and their gradients add up.
    total = torch.zeros_like(expected[1])
    factors = torch.arange(1.0, len(batch["mask"]) + 1)
    for sequence in range(len(lengths)):
        own = batch["ids"] == sequence
        alone = batch | {each: batch[each][own] for each in (*rows, "ids", "mask")}
        losses, _ = ours(name, alone)
        torch.testing.assert_close(losses, want[own], rtol=1e-5, atol=1e-6)
        total += head_gradient(name, alone, factors[own])
    torch.testing.assert_close(total, expected[1], rtol=1e-3, atol=1e-4)


def head_gradient(name, batch, factors):
    """Of losses weighted as in the whole batch, reduced as a microbatch is."""
    head = batch["head"].clone().requires_grad_()
    reference = (batch["reference_hidden"], batch["reference_head"])
    columns = {
        "proximal": chosen_logprobs(*reference, batch["chosen"]),
        "kl": full_kl(batch["hidden"], head, *reference),
        "entropies": top_k_entropies(batch["hidden"], head),
        "ids": batch["ids"],
    }
    function, wanted = ARGUMENTS[name]
    policy = chosen_logprobs(batch["hidden"], head, batch["chosen"])
    losses = function(policy, *(columns[each] for each in wanted), loss_mask=batch["mask"])
    numerator = loss_numerator(losses, factors, batch["ids"], batch["mask"], reduction="sum")
    return torch.autograd.grad(numerator, head)[0]


LOGPROBS = st.lists(st.floats(-50.0, 0.0), min_size=1, max_size=6)


@QUICK
@given(LOGPROBS, st.floats(0.0, 10.0))
def test_p_family_falls_from_nll_and_its_gradient_is_minus_p_to_the_a(logprobs, power):
    policy = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(len(logprobs), dtype=torch.bool)
    losses = objectives.p_family(policy, mask, power=power)
    assert losses.isfinite().all()
    assert (losses >= 0).all()
    # Denormals round by more than their last digit.
    assert (losses <= objectives.nll(policy, mask) * (1 + 1e-12) + 1e-300).all()
    assert (objectives.p_family(policy, mask, power=power + 0.5) <= losses + 1e-12).all()
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    torch.testing.assert_close(gradient, -(policy.detach().exp() ** power), rtol=1e-8, atol=1e-8)
    one = objectives.p_family(policy, mask, power=1.0)
    torch.testing.assert_close(one, 1 - policy.exp(), rtol=1e-9, atol=1e-15)
    # The gradient of 1 - p is DFT's.
    (of_one,) = torch.autograd.grad(one.sum(), policy)
    (of_dft,) = torch.autograd.grad(objectives.dft(policy, mask).sum(), policy)
    torch.testing.assert_close(of_one, of_dft)


@QUICK
@given(LOGPROBS, st.floats(0.0, 1e-3))
def test_p_family_near_0_is_nll_in_float32(logprobs, power):
    policy = torch.tensor(logprobs)
    mask = torch.ones(len(logprobs), dtype=torch.bool)
    losses = objectives.p_family(policy, mask, power=power).double()
    # (1 - e^(-a l)) / a = l - a l^2 / 2 + a^2 l^3 / 6 - ..., alternating while a l <= 1.
    nll = -policy.double()
    series = nll - power * nll**2 / 2 + power**2 * nll**3 / 6
    error = power**3 * nll**4 / 24 + 2e-7 * nll + 1e-30  # the last for denormals
    assert ((losses - series).abs() <= error).all()
    assert torch.equal(objectives.p_family(policy, mask, power=0.0), objectives.nll(policy, mask))


@QUICK
@given(LENGTHS, SEEDS)
def test_equal_models_make_iw_sft_plain_sft(lengths, seed):
    batch = make_batch(lengths, seed)
    policy = chosen_logprobs(batch["hidden"], batch["head"], batch["chosen"]).requires_grad_()
    ids, mask = batch["ids"], batch["mask"]
    nll = objectives.nll(policy, mask)
    assert torch.equal(objectives.iw_sft_sequence(policy, policy, ids, mask), nll)
    assert torch.equal(objectives.iw_sft_token(policy, policy, mask), nll)
    # The sequence weight forgets the length: the same ratio on every token is that ratio.
    shifted = objectives.iw_sft_sequence(policy, policy - math.log(3.0), ids, mask)
    torch.testing.assert_close(shifted, 3 * nll, rtol=1e-5, atol=0)


@QUICK
@given(st.lists(st.floats(0.0, 20.0), min_size=1, max_size=9), st.data())
def test_tau_does_not_depend_on_how_a_batch_is_cut(means, data):
    order = data.draw(st.permutations(means))
    whole = torch.tensor(means, dtype=torch.float64)
    assert batch_tau(torch.tensor(order, dtype=torch.float64)) == batch_tau(whole)
    middle = sorted(means)[(len(means) - 1) // 2], sorted(means)[len(means) // 2]
    assert batch_tau(whole) == pytest.approx(max(sum(middle) / 2, MIN_TAU))


def test_extreme_ratios_stay_finite():
    policy, proximal = torch.tensor([-1e4, -1.0, -1e-7]), torch.tensor([-1.0, -1e4, -1e-7])
    ids, mask = torch.arange(3), torch.ones(3, dtype=torch.bool)
    token = objectives.iw_sft_token(policy, proximal, mask)
    assert token.tolist() == pytest.approx([0.2e4, 1.8, 1e-7])
    sequence = objectives.iw_sft_sequence(policy, proximal, ids, mask)
    assert sequence.tolist() == pytest.approx([0.0, 16.0, 1e-7])
    assert objectives.psft(policy, proximal, mask).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_loss_tokens_is_0_and_keeps_the_graph(name):
    batch = make_batch([3, 2], 0)
    batch["mask"] = torch.zeros(5, dtype=torch.bool)
    losses, gradients = ours(name, batch)
    assert losses.tolist() == [0.0] * 5
    assert all((each == 0).all() for each in gradients)


def test_impossible_settings_are_refused():
    policy = logs(0.5, 0.25)
    mask, ids = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    for power in (-0.1, math.inf, NAN):
        with pytest.raises(ValueError, match="not a member of the family"):
            objectives.p_family(policy, mask, power=power)
    with pytest.raises(ValueError, match=r"weight_cap=0\.0"):
        objectives.iw_sft_sequence(policy, policy, ids, mask, weight_cap=0.0)
    with pytest.raises(ValueError, match="sequence_ids decrease"):
        objectives.iw_sft_sequence(policy, policy, torch.tensor([1, 0]), mask)
    with pytest.raises(ValueError, match=r"ratio_clip=\(1\.8, 0\.2\)"):
        objectives.iw_sft_token(policy, policy, mask, ratio_clip=(1.8, 0.2))
    with pytest.raises(ValueError, match=r"tau=0\.0"):
        objectives.talr(policy, mask, tau=0.0, min_weight=0.1)
    with pytest.raises(ValueError, match=r"min_weight=1\.5"):
        objectives.talr(policy, mask, tau=1.0, min_weight=1.5)
    with pytest.raises(ValueError, match="distances from 1"):
        objectives.psft(policy, policy, mask, clip_low=1.2)
    for bad in ({"k": 1}, {"power": -1.0}):
        with pytest.raises(ValueError, match="the gate"):
            objectives.eaft(policy, policy, mask, **bad)
    for anchored in (objectives.asft, objectives.sft_kl):
        with pytest.raises(ValueError, match="away from the reference"):
            anchored(policy, policy, mask, kl_coefficient=-0.1)
