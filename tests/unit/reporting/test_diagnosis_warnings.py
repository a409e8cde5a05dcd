"""Each warning fires past its threshold, says the numbers, and stays silent below it."""

import dataclasses

import pytest
from scored_rows import constant, scored_row

from pear_ray.config.sft import PearWeights, UniformWeights
from pear_ray.reporting.diagnosis.numbers import ALL_SOURCES, diagnose
from pear_ray.reporting.diagnosis.warnings import diagnosis_warnings, percent, verdict

DEFAULTS = PearWeights()


def warn(rows, weights=DEFAULTS, **options):
    return {
        (warning.rule, warning.source): warning
        for warning in diagnosis_warnings(diagnose([rows], weights=weights, **options))
    }


def mixed(low, high, *, length=50, **changes):
    """A row with `low` tokens of log-ratio -1 spread evenly among others of log-ratio `high`."""
    ratios = [-1.0 if k * low // length != (k + 1) * low // length else high for k in range(length)]
    return scored_row([ratio - 2.0 for ratio in ratios], [-2.0] * length, **changes)


def test_a_corpus_that_suits_the_policy_has_no_warning():
    # Two fifths clipped low, the rest at +0.125: log-weights rise by 0.042 per token to 2.1.
    rows = [mixed(20, 0.125)]
    assert warn(rows) == {}
    diagnosis = diagnose([rows], weights=DEFAULTS)
    # With a = 2.1 the mean is about (e^a - 1) / a = 3.4, the ESS tanh(a / 2) / (a / 2) = 74 %.
    sentence = verdict(diagnosis, [])
    assert sentence.startswith("Nothing stands out. PEAR leaves 7")
    assert "of 50 loss tokens effective, with a mean weight of 3." in sentence


def test_a_far_stronger_behavior_model():
    # d stuck at -0.08: the floor is 124 tokens from the end, so 76 of 200 lie on it.
    found = warn([constant(-1.0, length=200, source="big")])
    warning = found["behavior_unlike_policy", "big"]
    assert warning.message == (
        "100 % of the loss tokens are clipped low (the policy gives them less than 92 % of the "
        "behavior model's probability; mean log-ratio -1), and 38 % weigh exp(-10), the floor, "
        "where they do not train. At the mean drift the floor is 124 tokens from the end."
    )
    assert any("batch_mean_one" in o and "not the paper's" in o for o in warning.options)
    assert any("`sft.weights.level=block` or `sequence`" in option for option in warning.options)
    assert any("behavior model nearer" in option for option in warning.options)
    # ESS 24.715823 of 200, and the ends hold the weight.
    assert "is 12 % of 200 loss tokens" in found["ess_collapse", "big"].message
    assert "on the last tenth of the completions, which holds 10 %" in (
        found["weights_on_the_ends", "big"].message
    )


def test_options_that_are_set_already_are_not_offered():
    weights = PearWeights(rescale="batch_mean_one", level="sequence")
    warning = warn([constant(-1.0, length=200)], weights)["behavior_unlike_policy", "teacher"]
    assert warning.options == [
        "a behavior model nearer to the policy (smaller, or of its family), or the policy's own"
    ]
    assert "tokens from the end" not in warning.message
    block = warn([constant(-1.0, length=200)], PearWeights(level="block"))
    assert any("block_size" in o for o in block["behavior_unlike_policy", "teacher"].options)


def test_half_clipped_low_is_the_threshold():
    assert ("behavior_unlike_policy", "teacher") not in warn([mixed(25, 0.125)])
    assert ("behavior_unlike_policy", "teacher") in warn([mixed(26, 0.125)])


def test_the_ceiling():
    # d stuck at +0.30: the ceiling is 17 tokens from the end.
    warning = warn([constant(1.0, length=100)])["ceiling", "teacher"]
    assert warning.message.startswith("83 % of the loss tokens weigh exp(5) = 148, the ceiling")
    assert "100 % of the log-ratios are clipped high" in warning.message
    assert ("ceiling", "teacher") not in warn([constant(1.0, length=17)])


def test_sources_that_outweigh_each_other():
    # Twenty tokens of exp(1.2) among 1,800 of exp(-3.2): each source is even in itself.
    rows = [constant(1.0, length=4, source="up", example_id=str(k)) for k in range(5)]
    rows += [constant(-1.0, length=40, source="down", example_id=str(k)) for k in range(45)]
    weights = PearWeights(level="sequence")
    found = warn(rows, weights)
    assert [key for key in found if key[0] == "ess_collapse"] == [("ess_collapse", ALL_SOURCES)]
    # 20 e^1.2 = 66.40; 1800 e^-3.2 = 73.37
    assert "up has 48 % of all weight with 1.1 % of the tokens" in (
        found["ess_collapse", ALL_SOURCES].message
    )


def test_the_behavior_model_is_the_policy():
    found = warn([constant(0.0, length=60, source="own")])
    assert list(found) == [("behavior_is_policy", "own")]  # and not flat_weights beside it
    message = found["behavior_is_policy", "own"].message
    assert "mean absolute log-ratio is 0 nats" in message
    assert message.endswith("every ratio is 1, so PEAR reduces to the discount: 0.999 per token.")
    plain = warn([constant(0.0, length=60)], PearWeights(gamma=1.0))
    assert "every weight is 1: plain SFT" in plain["behavior_is_policy", "teacher"].message
    # Both signs: a mean of 0 is no copy.
    assert ("behavior_is_policy", "teacher") not in warn([mixed(3, 0.0625)])
    assert ("behavior_is_policy", "teacher") not in warn([constant(2**-9, length=60)])
    assert ("behavior_is_policy", "teacher") in warn([constant(2**-10, length=60)])


def test_nearly_flat_weights():
    found = warn([constant(0.015625, length=20)])
    assert list(found) == [("flat_weights", "teacher")]
    assert "so training is close to plain SFT" in found["flat_weights", "teacher"].message


def test_long_traces_and_the_gamma_that_would_do():
    rows = [constant(0.0, length=4096, source="long")]
    warning = warn(rows)["long_traces", "long"]
    assert warning.message == (
        "At the median length of 4,096 loss tokens, gamma 0.999 alone leaves a mean weight of "
        "0.24, even where the policy agrees with every token."
    )
    # 1 - 0.2148 / 4096 = 0.9999476, with two digits of what it lacks to 1
    assert warning.options == ["`sft.weights.gamma=0.999948`: 0.9 instead"]
    better = diagnose([rows], weights=PearWeights(gamma=0.999948)).overall
    assert 0.9 <= better.perfect_ratio_mean_weights["p50"] < 0.902
    assert ("long_traces", "long") not in warn(rows, PearWeights(level="sequence"))
    assert ("long_traces", "teacher") not in warn([constant(0.0, length=1024)])


def test_short_completions_have_a_long_last_tenth():
    # One token of three is the last tenth: up to two thirds of the weight on it is no wonder.
    falling = PearWeights(gamma=0.5)
    rows = [constant(0.0, length=3)]
    assert ("weights_on_the_ends", "teacher") not in warn(rows, falling)  # 1 / 1.75 = 57 %
    warning = warn(rows, PearWeights(gamma=0.25))["weights_on_the_ends", "teacher"]
    assert "76 % of the weight" in warning.message  # 1 / 1.3125
    assert "which holds 33 % of the tokens" in warning.message
    assert warning.options[0] == "a higher `sft.weights.gamma` (now 0.25; 1 is no discount)"


def test_a_proxy_scorer_is_named():
    rows = [mixed(20, 0.125, source="human"), mixed(20, 0.125, source="teacher")]
    found = warn(rows, proxy_sources=["human"])
    assert list(found) == [("proxy_scorer", "human")]
    assert "not from the author" in found["proxy_scorer", "human"].message


def test_the_verdict_counts_warnings_and_tells_of_assumed_weights():
    diagnosis = diagnose([[constant(-1.0, length=200, source="big")]], weights=UniformWeights())
    sentence = verdict(diagnosis, diagnosis_warnings(diagnosis))
    assert sentence == (
        "Look before training: the behavior model is far stronger than the policy, or unlike it "
        "(big), and 2 more. PEAR leaves 12 % of 200 loss tokens effective, with a mean weight of "
        "0.0643. The run's weights have no ratio in them; PEAR's defaults would do this."
    )


def test_a_control_is_told_and_one_without_a_teacher_is_not_compared_with_it():
    """Weights of log-probs below the clip: no rule may say that the behavior model is unlike."""
    row = constant(-1.0, length=200, source="big")
    rules = {}
    for control in ("shuffled", "likelihood_only"):
        diagnosis = diagnose([[row]], weights=PearWeights(control=control))
        warnings = diagnosis_warnings(diagnosis)
        rules[control] = [warning.rule for warning in warnings]
        assert "The run is a control" in verdict(diagnosis, warnings)
    assert "behavior_unlike_policy" in rules["shuffled"]
    assert rules["shuffled"][1:] == rules["likelihood_only"]


def test_every_warning_has_options_and_ends_its_sentence():
    rows = [constant(ratio, length=5000, source=str(ratio)) for ratio in (-1.0, 0.0, 1.0)]
    warnings = diagnosis_warnings(diagnose([rows], weights=DEFAULTS, proxy_sources=["0.0"]))
    assert len({warning.rule for warning in warnings}) == 8
    for warning in warnings:
        assert warning.options
        assert warning.message.endswith(".")
        assert all(dataclasses.asdict(warning).values())


@pytest.mark.parametrize(
    ("fraction", "words"),
    [(0.0, "0 %"), (0.0004, "<0.1 %"), (0.034, "3.4 %"), (0.34, "34 %"), (1.0, "100 %")],
)
def test_shares_in_words(fraction, words):
    assert percent(fraction) == words
