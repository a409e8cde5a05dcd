"""The diagnosis by hand, from the method's worked examples, however the corpus is cut up."""

import dataclasses
import math

import numpy as np
import pytest
from scored_rows import constant, scored_row, second, worked

from pear_ray.config.sft import PearWeights, UniformWeights
from pear_ray.errors import ArtifactError
from pear_ray.reporting.diagnosis.numbers import ALL_SOURCES, LOG_RATIO_BINS, diagnose, row_weights

DEFAULTS = PearWeights()
# Token weights of the worked examples at gamma 0.999, to six digits.
FIRST = [1.343123, 1.456444, 1.080040, 1.081122, 1.104066, 1.0]
SECOND = [1.220181, 1.0]


@pytest.fixture(scope="module")
def both():
    return diagnose([[worked(source="a"), second(source="b")]], weights=DEFAULTS)


def test_log_ratios_of_one_source(both):
    source = both.sources[0]
    assert (source.source, source.num_rows, source.num_loss_tokens) == ("a", 1, 6)
    raw = [0.05, -0.30, 0.90, 0.0, -0.02, 0.10]
    assert source.health["log_ratio/mean"] == pytest.approx(np.mean(raw), abs=1e-6)
    assert source.health["log_ratio/std"] == pytest.approx(np.std(raw), abs=1e-6)
    assert source.log_ratio_absolute_mean == pytest.approx(1.37 / 6, abs=1e-6)
    assert source.clipped_log_ratio_mean == pytest.approx(0.35 / 6, abs=1e-6)
    assert source.health["log_ratio_clip_low_fraction"] == pytest.approx(1 / 6)
    assert source.health["log_ratio_clip_high_fraction"] == pytest.approx(1 / 6)


def test_weights_of_one_source(both):
    source = both.sources[0]
    assert source.health["weight/mean"] == pytest.approx(sum(FIRST) / 6, abs=1e-6)
    assert source.health["effective_sample_size"] == pytest.approx(5.886130, abs=1e-5)
    assert source.health["last_tenth_weight_share"] == pytest.approx(1 / sum(FIRST), abs=1e-6)
    assert source.even_last_tenth_share == pytest.approx(1 / 6)
    # Six tokens lie in tenths 0, 1, 3, 5, 6 and 8.
    expected = [FIRST[0], FIRST[1], None, FIRST[2], None, FIRST[3], FIRST[4], None, FIRST[5], None]
    assert source.decile_weight_means == [
        value if value is None else pytest.approx(value, abs=1e-6) for value in expected
    ]


def test_all_sources_together(both):
    overall, total = both.overall, sum(FIRST) + sum(SECOND)
    assert (overall.source, overall.num_rows, overall.num_loss_tokens) == (ALL_SOURCES, 2, 8)
    assert overall.mean_completion_length == 4.0
    assert overall.health["weight/mean"] == pytest.approx(total / 8, abs=1e-6)
    squares = sum(weight**2 for weight in FIRST + SECOND)
    assert overall.health["ess_fraction"] == pytest.approx(total**2 / squares / 8, abs=1e-6)
    fractions = [sum(g) ** 2 / sum(w**2 for w in g) / len(g) for g in (FIRST, SECOND)]
    assert overall.health["sequence_ess_fraction"] == pytest.approx(np.mean(fractions), abs=1e-6)
    assert overall.even_last_tenth_share == pytest.approx(2 / 8)
    assert overall.decile_weight_means[0] == pytest.approx((FIRST[0] + SECOND[0]) / 2, abs=1e-6)
    assert overall.decile_weight_means[5] == pytest.approx((FIRST[3] + SECOND[1]) / 2, abs=1e-6)
    assert [source.token_share for source in both.sources] == [6 / 8, 2 / 8]
    assert [source.weight_share for source in both.sources] == [
        pytest.approx(sum(FIRST) / total, abs=1e-6),
        pytest.approx(sum(SECOND) / total, abs=1e-6),
    ]
    assert (overall.token_share, overall.weight_share) == (1.0, 1.0)


def test_the_histogram_counts_every_token_once():
    # Edges are at multiples of 0.02 from -2 to 2; bin k starts at edge k - 1.
    row = scored_row([-3.5, -1.0, -0.5, -0.75, 0.0], [-1.0, -1.0, -0.75, -0.25, -2.5])
    shares = diagnose([[row]], weights=DEFAULTS).overall.log_ratio_shares
    assert len(shares) == len(LOG_RATIO_BINS) + 1
    assert {k: s for k, s in enumerate(shares) if s} == pytest.approx(
        {0: 0.2, 76: 0.2, 101: 0.2, 113: 0.2, 201: 0.2}  # below -2; -0.5; 0; 0.25; above 2
    )


def test_the_discount_at_the_corpus_lengths():
    lengths = [256] * 8 + [1024] * 10 + [4096, 8192]
    rows = [constant(0.0, length=length, example_id=str(k)) for k, length in enumerate(lengths)]
    overall = diagnose([rows[:7], rows[7:]], weights=DEFAULTS).overall
    assert overall.completion_lengths == {
        "min": 256,
        "p05": 256,
        "p50": 1024,
        "p95": 4096,
        "max": 8192,
    }
    means = overall.perfect_ratio_mean_weights
    assert [round(means[name], 2) for name in ("min", "p50", "p95", "max")] == [
        0.88,
        0.63,
        0.24,
        0.12,
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (PearWeights(level="sequence"), [math.exp(0.35)] * 6),
        (PearWeights(level="block", block_size=4), [1.081122] * 4 + [1.0] * 2),
        (PearWeights(gamma=0.9), [0.797078, 0.959405, 0.789716, 0.877463, 0.994654, 1.0]),
        (PearWeights(log_weight_clip_high=0.05), [math.exp(0.05)] * 5 + [1.0]),
        # d = 0 -.08 0 0 -.02 0
        (
            PearWeights(gamma=1.0, log_ratio_clip_high=0.0),
            [math.exp(-0.1)] + [math.exp(-0.02)] * 3 + [1.0] * 2,
        ),
    ],
)
def test_the_runs_own_settings_are_used(settings, expected):
    row = worked()
    weights = row_weights([row], settings).weights
    assert weights[row.loss_mask].tolist() == pytest.approx(expected, abs=1e-5)
    diagnosis = diagnose([[row]], weights=settings)
    assert diagnosis.overall.health["weight/mean"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert diagnosis.weights == settings
    assert not diagnosis.is_assumed


def test_sequence_level_has_no_discount():
    diagnosis = diagnose([[constant(0.0, length=5000)]], weights=PearWeights(level="sequence"))
    assert set(diagnosis.overall.perfect_ratio_mean_weights.values()) == {1.0}


def test_uniform_weights_are_diagnosed_as_pears_defaults():
    diagnosis = diagnose([[worked()]], weights=UniformWeights())
    assert (diagnosis.weights, diagnosis.is_assumed) == (DEFAULTS, True)
    assert diagnosis.overall.health["weight/mean"] == pytest.approx(sum(FIRST) / 6, abs=1e-6)


def make(num_rows=40):
    generator = np.random.default_rng(0)
    for index in range(num_rows):
        length = int(generator.integers(3, 90))
        behavior = -generator.random(length)
        yield scored_row(
            behavior + generator.normal(-0.05, 0.2, length),
            behavior,
            mask=[0, *(generator.random(length - 2) > 0.3), 1],
            source=f"s{index % 3}",
            example_id=str(index),
        )


def leaves(tree):
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    if isinstance(tree, list):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree]


def test_numbers_do_not_depend_on_the_batches():
    rows = list(make())
    whole = dataclasses.asdict(diagnose([rows], weights=DEFAULTS).overall)
    pieces = ([row] for row in reversed(rows))  # an iterator: read once
    again = dataclasses.asdict(diagnose(pieces, weights=DEFAULTS).overall)
    for one, other in zip(leaves(whole), leaves(again), strict=True):
        number = isinstance(other, float)
        assert one == (pytest.approx(other, rel=1e-6, abs=1e-9) if number else other)


def test_negatives_are_counted_and_left_out():
    rows = [worked(source="a"), second(source="a", is_negative=True), second(source="b")]
    rows.append(constant(math.nan, length=3, source="c", is_negative=True))
    diagnosis = diagnose([rows], weights=DEFAULTS)
    assert diagnosis.num_negative_rows == {"a": 1, "c": 1}
    assert [(s.source, s.num_loss_tokens) for s in diagnosis.sources] == [("a", 6), ("b", 2)]


def test_proxy_sources_are_those_that_the_corpus_has():
    diagnosis = diagnose([[worked()]], weights=DEFAULTS, proxy_sources=["teacher", "absent"])
    assert diagnosis.proxy_sources == ["teacher"]


def test_a_log_prob_that_is_not_finite_names_its_source():
    rows = [worked(source="good"), constant(math.nan, length=3, source="bad")]
    with pytest.raises(ArtifactError, match="source 'bad': 3 of 3 loss tokens have a log-ratio"):
        diagnose([rows], weights=DEFAULTS)


def test_garbage_outside_the_loss_mask_is_never_read():
    row = worked()
    policy = np.where(row.loss_mask, row.policy_logprobs, np.float32(np.nan))
    spoilt = dataclasses.replace(row, policy_logprobs=policy)
    clean, dirty = (diagnose([[one]], weights=DEFAULTS).overall for one in (row, spoilt))
    assert dataclasses.asdict(clean) == dataclasses.asdict(dirty)


def test_nothing_to_diagnose_is_an_error():
    with pytest.raises(ArtifactError, match="found 0 negative rows and no other"):
        diagnose([], weights=DEFAULTS)
    with pytest.raises(ArtifactError, match="found 1 negative rows and no other"):
        diagnose([[worked(is_negative=True)]], weights=DEFAULTS)
    empty = scored_row([-1.0], [-1.0], mask=[0], example_id="e7")
    with pytest.raises(ArtifactError, match="example 'e7' has no loss token"):
        diagnose([[worked(), empty]], weights=DEFAULTS)
