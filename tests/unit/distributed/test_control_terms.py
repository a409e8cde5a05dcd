"""Controls that a microbatch shows by itself: the ratio without a teacher, and fixed weights."""

import json
import math

import pyarrow as pa
import pytest
import torch
from test_sft_terms import POLICY, batch_of, outputs, settings

from pear_ray.algorithms import weight_health
from pear_ray.config.sft import needs_initial_policy, needs_step_weights
from pear_ray.distributed.sft_metrics import denominator_of, step_metrics
from pear_ray.distributed.sft_sources import Sources
from pear_ray.distributed.sft_terms import SOURCE_WEIGHTS, microbatch_terms, token_weights
from pear_ray.engines.batches import TokenBatch

# Row 1 and the negative row 2 of the worked example.
PLACES, LOGPROBS = (1, 2), POLICY[6:]


def pear(**changes: object) -> dict[str, object]:
    return {"kind": "pear", "control": "likelihood_only"} | changes


def by_source(*weights: float) -> tuple[TokenBatch, list[float]]:
    """Rows 1 and 2 (a negative), with their sources' weights as the collator gives them."""
    batch = batch_of(*PLACES)
    per_token = torch.tensor(weights)[batch.sequence_ids]
    batch.aligned[SOURCE_WEIGHTS] = per_token
    return batch, LOGPROBS


def test_likelihood_only_by_hand() -> None:
    """Log-probs -1 and -.4: both at the clip of -.08. The negative's -.3, -1.2 and -.9 too."""
    wanted = settings(
        weights=pear(level="sequence"), negatives={"scale": 0.1, "logprob_floor": -5.0}
    )
    found = token_weights(torch.tensor(LOGPROBS), batch_of(*PLACES), wanted)
    low, wrong = math.exp(-0.16), -0.1 * math.exp(-0.24)
    assert found.weights.tolist() == pytest.approx([low] * 2 + [wrong] * 3, rel=1e-6)
    assert found.log_ratios.tolist() == pytest.approx(LOGPROBS)  # nothing is subtracted


def test_likelihood_only_is_pear_against_a_teacher_who_is_sure() -> None:
    """At every level and rescaling, and whatever the behavior log-probs are."""
    for level in ("token", "block", "sequence"):
        for rescale in ("none", "sequence_mean_one", "centred"):
            changes = {"level": level, "rescale": rescale, "log_ratio_clip_low": -1.5}
            sure = batch_of(0, 1)
            sure.aligned["behavior_logprobs"] = torch.zeros(8)
            own = settings(weights=pear(**changes, control="none"))
            wanted = token_weights(torch.tensor(POLICY[:8]), sure, own)
            unread = batch_of(0, 1)
            unread.aligned["behavior_logprobs"] = torch.full((8,), math.nan)
            found = token_weights(
                torch.tensor(POLICY[:8]), unread, settings(weights=pear(**changes))
            )
            assert torch.equal(found.weights, wanted.weights), (level, rescale)


def test_weights_by_source_by_hand() -> None:
    """A weight of 0.5 and 3: losses 1 and .4; the negative is pushed by its source's weight too."""
    wanted = settings(
        weights={"kind": "by_source", "weights": {"a": 0.5, "b": 3.0}},
        negatives={"scale": 0.1, "logprob_floor": -1.0},
    )
    batch, logprobs = by_source(0.5, 3.0)
    terms = microbatch_terms(outputs(logprobs), batch, wanted)
    assert terms.weights.weights.tolist() == pytest.approx([0.5, 0.5, -0.3, 0.0, -0.3])
    loss = 0.5 * (1.0 + 0.4) - 0.3 * (0.3 + 0.9)
    assert terms.sums["numerator"] == pytest.approx(loss, rel=1e-6)
    assert terms.sums["denominator"] == 5
    assert terms.sums["weight"] == pytest.approx(1.0)  # the positives'
    assert terms.sums["max/log_weight"] == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("reduction", ["token_mean", "weight_norm"])
def test_a_step_of_sources_without_weight_is_no_error(reduction: str) -> None:
    """Neither its denominator nor its metrics divide by the sum of the weights."""
    wanted = settings(
        weights={"kind": "by_source", "weights": {"a": 0.0, "b": 1.0}}, reduction=reduction
    )
    batch = batch_of(1)
    batch.aligned[SOURCE_WEIGHTS] = torch.zeros(2)
    terms = microbatch_terms(outputs(POLICY[6:8]), batch, wanted)
    assert denominator_of(terms.sums, wanted) == {"token_mean": 2, "weight_norm": 1}[reduction]
    terms.numerator.backward()
    rows = [{"token_ids": [1, 2], "source": "a", "is_negative": False}]
    metrics = step_metrics(terms.sums, Sources(pa.Table.from_pylist(rows)))
    json.dumps(metrics, allow_nan=False)
    assert metrics["sft/weight/mean"] == metrics["sft/ess_fraction"] == 0.0
    assert metrics["sft/log_weight/min"] == -10.0


def test_a_step_with_weights_still_needs_its_denominator() -> None:
    wanted = settings(weights={"kind": "pear"}, reduction="weight_norm")
    sums = microbatch_terms(outputs(POLICY[6:8]), batch_of(1), wanted).sums
    assert denominator_of(sums, wanted) == pytest.approx(2.220181, abs=1e-6)
    nothing = weight_health.merge(sums, {"denominator": -sums["denominator"]})
    assert denominator_of(nothing, wanted) == 0.0  # the trainer refuses it


def test_what_the_step_must_know_first() -> None:
    needs = {
        control: needs_step_weights(settings(weights=pear(control=control)).weights)
        for control in ("none", "shuffled", "position_profile", "likelihood_only")
    }
    assert [control for control, needed in needs.items() if needed] == [
        "shuffled",
        "position_profile",
    ]
    assert not needs_step_weights(settings(weights={"kind": "uniform"}).weights)


def test_no_sft_needs_no_scores_of_the_initial_policy() -> None:
    init = {"kind": "pear", "ratio_policy": "init"}
    assert needs_initial_policy(settings(weights=init))
    assert not needs_initial_policy(settings(weights=init, num_epochs=0))
