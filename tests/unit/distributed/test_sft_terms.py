"""Weights, objectives and negatives of a run meet in a microbatch as the core has them."""

import math

import pytest
import torch

from pear_ray.algorithms import objectives as core
from pear_ray.algorithms.forward_kl import forward_kl_top_k
from pear_ray.config.sft import SftConfig
from pear_ray.distributed.sft_terms import (
    RowGroups,
    microbatch_terms,
    token_losses,
    token_weights,
)
from pear_ray.engines.batches import Row, TokenBatch, collate

# Both sequences of the worked example and its negative (prompt of two tokens in front).
BEHAVIOR = [
    [0.0, 0.0, -0.15, -0.20, -2.90, -0.05, -0.28, -0.12],
    [0.0, 0.0, -0.2, -0.6],
    [0.0, 0.0, -0.2, -1.0, -1.3],
]
POLICY = [-0.10, -0.50, -2.00, -0.05, -0.30, -0.02, -1.0, -0.4, -0.3, -1.2, -0.9]
INITIAL = [-0.2, -0.4, -1.5, -0.1, -0.3, -0.1, -0.9, -0.6, -0.5, -1.0, -1.1]
NAMES = ("behavior_logprobs", "initial_logprobs", "is_negative")


def batch_of(*places: int) -> TokenBatch:
    rows = []
    flat = iter(INITIAL)
    initial = [[0.0, 0.0, *[next(flat) for _ in row[2:]]] for row in BEHAVIOR]
    for place in places:
        length = len(BEHAVIOR[place])
        aligned = {
            "behavior_logprobs": BEHAVIOR[place],
            "initial_logprobs": initial[place],
            "is_negative": [place == 2] * length,
        }
        mask = [False, False] + [True] * (length - 2)
        candidates = ([4, 9] * (length - 2), [math.log(0.5), math.log(0.25)] * (length - 2))
        rows.append(Row(list(range(length)), mask, aligned, candidates))
    return collate(rows, pad_id=0, names=NAMES, device=torch.device("cpu"), num_candidates=2)


def settings(**changes: object) -> SftConfig:
    return SftConfig.model_validate({"optimizer": {"learning_rate": 1e-3}} | changes)


def outputs(logprobs: list[float]) -> dict[str, torch.Tensor]:
    flat = torch.tensor(logprobs, requires_grad=True)
    both = torch.tensor([[0.4, 0.3]]).log().expand(len(logprobs), 2)
    return {
        "logprobs": flat,
        "candidates": both,
        "rest": torch.full((len(logprobs),), math.log(0.3)),
        "entropies": torch.linspace(0.1, 2.0, len(logprobs)),
    }


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("sum", 2.524036),
        ("token_mean", 0.631009),
        ("seq_mean", 0.690703),
        ("weight_norm", 0.543682),
    ],
)
def test_the_worked_batch_of_two(reduction: str, expected: float) -> None:
    terms = microbatch_terms(outputs(POLICY[:8]), batch_of(0, 1), settings(reduction=reduction))
    assert terms.sums["numerator"] / terms.sums["denominator"] == pytest.approx(expected, abs=1e-6)


def test_the_worked_negative() -> None:
    wanted = settings(negatives={"scale": 0.1, "logprob_floor": -5.0})
    terms = microbatch_terms(outputs(POLICY[8:]), batch_of(2), wanted)
    assert terms.sums["numerator"] / 3 == pytest.approx(-0.092022, abs=1e-6)
    assert terms.weights.weights.tolist() == pytest.approx([-0.1150274] * 3, abs=1e-6)
    assert terms.sums["tokens"] == 0  # it is in no metric of the positives
    assert terms.sums["negative_tokens"] == 3


def test_negatives_beside_positives_change_neither() -> None:
    wanted = settings(negatives={"scale": 0.1, "logprob_floor": -1.0})
    terms = microbatch_terms(outputs(POLICY), batch_of(0, 1, 2), wanted)
    alone = microbatch_terms(outputs(POLICY[:8]), batch_of(0, 1), settings())
    assert terms.weights.weights[:8].tolist() == alone.weights.weights.tolist()
    assert terms.weights.weights[8:].tolist() == pytest.approx(
        [-0.1150274, 0.0, -0.1150274], abs=1e-6
    )  # the second token's -1.2 is below the floor
    assert terms.sums["negative_below_floor"] == 1
    pushed = -0.1150274 * (0.3 + 0.9)
    assert terms.sums["negative_weighted_loss"] == pytest.approx(pushed, abs=1e-6)
    assert terms.sums["numerator"] == pytest.approx(alone.sums["numerator"] + pushed, abs=1e-5)
    assert terms.sums["denominator"] == 11
    terms.numerator.backward()


def test_the_worked_batch_by_source() -> None:
    """Row 0 (weights 1.34 ... 1) of one source, row 1 of another; the negative in no source."""
    groups = RowGroups(torch.tensor([1, 0, 1]), 2)
    wanted = settings(negatives={"scale": 0.1})
    sums = microbatch_terms(outputs(POLICY), batch_of(0, 1, 2), wanted, groups=groups).sums
    assert (sums["group_01_tokens"], sums["group_00_tokens"]) == (6, 2)
    first = [1.343123, 1.456444, 1.080040, 1.081122, 1.104066, 1.0]
    assert sums["group_01_weight"] == pytest.approx(sum(first), abs=1e-5)
    assert sums["group_00_weight"] == pytest.approx(2.220181, abs=1e-6)
    assert sums["group_01_nll"] == pytest.approx(2.97, abs=1e-6)
    assert sums["group_00_nll"] == pytest.approx(1.4, abs=1e-6)
    without = microbatch_terms(outputs(POLICY), batch_of(0, 1, 2), wanted).sums
    assert {name: value for name, value in sums.items() if "group" not in name} == without


def test_negatives_of_plain_sft_are_not_weighted() -> None:
    wanted = settings(weights={"kind": "uniform"}, negatives={"scale": 0.1, "logprob_floor": -1.0})
    found = token_weights(torch.tensor(POLICY), batch_of(0, 1, 2), wanted)
    assert found.weights.tolist() == pytest.approx([1.0] * 8 + [-0.1, 0.0, -0.1])


def test_the_ratio_of_the_initial_policy() -> None:
    batch = batch_of(0, 1)
    frozen = settings(weights={"kind": "pear", "ratio_policy": "init"})
    found = token_weights(torch.tensor(POLICY[:8]), batch, frozen)
    as_if_live = token_weights(torch.tensor(INITIAL[:8]), batch, settings())
    assert torch.equal(found.weights, as_if_live.weights)
    assert not torch.equal(
        found.weights, token_weights(torch.tensor(POLICY[:8]), batch, settings()).weights
    )


def test_rescaled_weights() -> None:
    batch, logprobs = batch_of(0, 1), torch.tensor(POLICY[:8])
    mean_one = settings(weights={"kind": "pear", "rescale": "sequence_mean_one"})
    found = token_weights(logprobs, batch, mean_one).weights
    assert float(found[:6].mean()) == pytest.approx(1.0, abs=1e-6)
    assert float(found[6:].mean()) == pytest.approx(1.0, abs=1e-6)
    plain = token_weights(logprobs, batch, settings()).weights
    assert (found[:6] / plain[:6]).tolist() == pytest.approx([float(found[0] / plain[0])] * 6)


def test_centred_log_ratios() -> None:
    """By hand: the second sequence's ratios -.8 and .2 have the mean -.3, so -.5 and .5."""
    batch, logprobs = batch_of(0, 1), torch.tensor(POLICY[:8])
    centred = settings(weights={"kind": "pear", "rescale": "centred"})
    found = token_weights(logprobs, batch, centred)
    assert found.clipped_log_ratios[6:].tolist() == pytest.approx([-0.08, 0.30])
    assert found.log_ratios[6:].tolist() == pytest.approx([-0.8, 0.2])  # raw, for the metrics
    assert found.weights[6:].tolist() == pytest.approx([0.999 * math.exp(0.30), 1.0])


def test_every_objective_is_its_own_function() -> None:
    batch, out = batch_of(0, 1), outputs(POLICY[:8])
    p, mask, ids = out["logprobs"], batch.loss_mask, batch.sequence_ids
    initial = torch.tensor(INITIAL[:8])
    kl = forward_kl_top_k(
        out["candidates"],
        torch.tensor([[0.5, 0.25]]).log().expand(8, 2),
        torch.ones(8, 2, dtype=torch.bool),
        mask,
        policy_rest_logprobs=out["rest"],
    )
    # By hand: .5 ln(.5/.4) + .25 ln(.25/.3) + .25 ln(.25/.3)
    assert kl.tolist() == pytest.approx([0.0204110] * 8, abs=1e-6)
    wanted = {
        "nll": core.nll(p, mask),
        "dft": core.dft(p, mask),
        "p_family": core.p_family(p, mask, power=1.0),
        "iw_sft": core.iw_sft_sequence(p, initial, ids, mask),
        "talr": core.talr(p, mask, tau=0.7, min_weight=0.01),
        "psft": core.psft(p, initial, mask),
        "eaft": core.eaft(p, out["entropies"], mask),
        "asft": core.asft(p, kl, mask),
        "sft_kl": core.sft_kl(p, kl, mask),
        "forward_kl": kl,
    }
    for kind, losses in wanted.items():
        objective = settings(objective=kind).objective
        found = token_losses(out, batch, objective, tau=0.7)
        assert torch.equal(found, losses), kind
    token = settings(objective={"kind": "iw_sft", "level": "token"}).objective
    assert torch.equal(token_losses(out, batch, token), core.iw_sft_token(p, initial, mask))


def test_candidates_lie_beside_their_tokens() -> None:
    batch = batch_of(1, 0)
    assert batch.candidate_ids is not None
    assert batch.candidate_ids.tolist() == [[4, 9]] * 8
    masked_first = Row([1, 2], [True, True], {}, ([3, 4, 5, 6], [-1.0, -2.0, -3.0, -4.0]))
    cut = collate([masked_first], pad_id=0, names=(), device=torch.device("cpu"), num_candidates=2)
    assert cut.candidate_ids is not None
    assert cut.candidate_ids.tolist() == [[5, 6]]  # the first token has no place in the flat view
    none = collate([], pad_id=0, names=(), device=torch.device("cpu"), num_candidates=2)
    assert none.candidate_ids is not None
    assert none.candidate_ids.shape == (0, 2)
