"""RL on the report's page: which figures a run's metrics make, and what they say."""

import json
import re

import numpy as np
import pytest
from synthetic_run import CONFIG

from pear_ray.config.run import dump_run, validate_run
from pear_ray.reporting import rl_figures, rl_health_figures, time_figures
from pear_ray.reporting.load import Estimate, Evaluation, load_run_data
from pear_ray.reporting.outcome import pass_at_k
from pear_ray.reporting.plot import WIDTH_IN, has_spikes
from pear_ray.reporting.sections import build_sections
from pear_ray.reporting.training_figures import grad_norm
from pear_ray.telemetry.metrics_log import MetricsLog

PLAIN = {
    "rl/reward/mean": 0.25,
    "rl/reward/game/mean": 0.25,
    "rl/correct_fraction": 0.25,
    "rl/advantage/mean_abs": 0.5,
    "rl/advantage/std": 0.75,
    "rl/degenerate_group_fraction": 0.5,
    "rl/truncated_fraction": 0.0,
    "rl/errored_fraction": 0.0,
    "rl/completion_length/mean": 40.0,
    "rl/completion_length/min": 10.0,
    "rl/completion_length/max": 80.0,
    "rl/entropy": 0.5,
    "rl/grad_norm": 0.25,
    "rl/clip_fraction/low": 0.0,
    "rl/clip_fraction/high": 0.0,
    "rl/ratio/max": 1.0,
    "rl/ratio/min": 1.0,
    "rl/mismatch/mean_gap": 1e-6,
    "rl/mismatch/max_gap": 1e-5,
    "rl/mismatch/ess_fraction": 1.0,
    "rl/correction/bounded_fraction": 0.0,
    "rl/correction/masked_fraction": 0.0,
    "rl/sync_gap": 0.0,
    "rl/tokens_per_s": 100.0,
    "rl/tokens_per_s/sample": 200.0,
    "rl/tokens_per_s/train": 400.0,
    "memory/sample_gib": 2.0,
    "memory/train_gib": 2.05,
    "time/sample_s": 5.0,
    "time/train_s": 3.0,
    "time/wake_trainer_s": 1.0,
    "time/save_s": 0.01,
    "time/step_s": 10.0,
}
EVERYTHING = PLAIN | {
    "rl/correct_fraction": 0.125,
    "rl/reward/_format/mean": 0.75,
    "rl/errored_fraction": 0.01,
    "rl/entropy/exact": 0.4,
    "rl/kl_to_init": 0.01,
    "rl/clip_fraction/high": 0.02,
    "rl/ratio/max": 1.5,
    "rl/ratio/min": 0.5,
    "rl/mismatch/ess_fraction": 0.99,
    "rl/correction/bounded_fraction": 0.001,
    "rl/dynamic_sampling/sampled_groups": 40.0,
    "rl/dynamic_sampling/kept_fraction": 0.4,
    "rl/dynamic_sampling/filled_fraction": 0.25,
    "rl/dynamic_sampling/discarded_tokens": 960.0,
    "rl/dynamic_sampling/cap_reached": 1.0,
    "memory/train_gib": 6.0,
}


@pytest.fixture
def run(tmp_path):
    """Makes what a report reads of a run of four steps, each with the same `metrics`."""

    def make(metrics, *, before=None, **rl):
        tree = json.loads(json.dumps(CONFIG))
        tree["corpus"]["kind"] = "sampled"
        tree["rl"] |= rl
        (tmp_path / "config.yaml").write_text(dump_run(validate_run(tree, origin="test")))
        log = MetricsLog(tmp_path, run="x", stage="rl", attempt=1)
        if before:
            log.log(before, step=0, num_steps=4)
        for step in range(1, 5):
            log.log(metrics, step=step, num_steps=4)
        return load_run_data(tmp_path)

    return make


def chapters(data):
    return {each.anchor: each for each in build_sections(data)}


def titles(section):
    return [each.title for each in section.charts]


def words(figure):
    """What is written in a drawing, but for the numbers at the axes."""
    found = re.findall(r"<text[^>]*>\s*(.*?)\s*</text>", figure.svg, re.DOTALL)
    return [each for each in found if not re.fullmatch(r"[-\u2212\d.e]+", each)]


def test_a_plain_run_has_the_figures_of_what_moved(run):
    sections = chapters(run(PLAIN))
    assert titles(sections["rl"]) == [
        "RL reward",
        "Advantages",
        "What RL could not use",
        "Completion length",
        "Entropy",
    ]
    assert titles(sections["rl-health"]) == ["RL gradient norm", "Engine against trainer"]
    ratios, mismatch = sections["rl-health"].missing
    assert ratios.startswith("every ratio was 1 and no clip bound")
    assert mismatch.startswith("the mismatch between sampler and trainer cost nothing")
    assert titles(sections["time"])[-3:] == [
        "RL tokens per second",
        "RL memory by phase",
        "Time per RL step",
    ]
    assert not sections["rl"].missing
    assert not sections["rl"].notes


def test_everything_that_can_be_logged_is_drawn(run):
    sections = chapters(run(EVERYTHING))
    assert titles(sections["rl"])[1] == "Reward by component, and the outcome"
    assert titles(sections["rl-health"]) == [
        "RL gradient norm",
        "Engine against trainer",
        "KL to the first policy",
        "Clipped ratios",
        "Ratios",
        "What the mismatch costs",
    ]
    assert not sections["rl-health"].missing


def test_metrics_of_an_older_run_are_not_missed(run):
    """Those that every run has are named where they are not there; the others draw nothing."""
    sections = chapters(run({"rl/reward/mean": 0.5, "rl/grad_norm": 1.0, "rl/tokens_per_s": 9.0}))
    assert titles(sections["rl"]) == ["RL reward"]
    assert titles(sections["rl-health"]) == ["RL gradient norm"]
    assert sections["rl"].missing == [
        f"no figure of {name}: stage `rl` has not logged it"
        for name in ("rl/degenerate_group_fraction", "rl/completion_length/mean", "rl/entropy")
    ]
    assert len(sections["rl-health"].missing) == 1


def test_the_outcome_is_told_from_the_reward(run):
    same = run(PLAIN)
    assert not rl_figures.outcome_differs(same)
    assert "fraction of correct answers as well" in rl_figures.reward(same).caption


def test_components_stand_beside_the_outcome(run):
    data = run(EVERYTHING)
    assert rl_figures.outcome_differs(data)
    assert "as well" not in rl_figures.reward(data).caption
    drawn = words(rl_figures.components(data))
    assert {"_format", "game", "correct answers"} <= set(drawn)


def test_a_component_that_is_the_outcome_is_one_line_with_it(run):
    metrics = EVERYTHING | {"rl/reward/game/mean": EVERYTHING["rl/correct_fraction"]}
    drawn = words(rl_figures.components(run(metrics)))
    assert {"_format", "correct answers (game)"} <= set(drawn)
    assert "game" not in drawn


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        ([1.0, 1.0, 21.0], True),
        ([1.0, 1.0, 19.0], False),
        ([0.0, 1.0, 100.0], False),  # a logarithmic axis has no place for 0
        ([1.0, 1.0, float("nan")], False),
        ([], False),
    ],
)
def test_spikes_that_flatten_the_rest(values, answer):
    assert has_spikes(np.array(values)) is answer


def test_a_single_component_that_is_no_outcome_leaves_the_outcome_alone(run):
    data = run(PLAIN | {"rl/correct_fraction": 0.5})
    assert "game" not in words(rl_figures.components(data))
    assert titles(chapters(data)["rl"])[1] == "Reward by component, and the outcome"


def test_waste_of_dynamic_sampling(run):
    """4 steps of 40 groups, 16 of which train."""
    drawn = rl_figures.fractions(run(EVERYTHING))
    assert {"groups thrown away", "groups filled up", "errored rewards"} <= set(words(drawn))
    assert (
        "sampled 160 groups for the 64 that trained, threw 3,840 tokens away and reached its cap "
        "in 4 of 4 steps" in drawn.caption
    )


def test_no_errors_and_no_dynamic_sampling_take_no_place(run):
    drawn = rl_figures.fractions(run(PLAIN))
    assert [each for each in words(drawn) if each not in ("RL step", "fraction")] == [
        "degenerate groups",
        "truncated completions",
    ]
    assert "Dynamic sampling" not in drawn.caption


def test_lengths_have_a_band_where_its_ends_are_known(run):
    data = run(PLAIN)
    drawn = rl_figures.length(data)
    assert "from the shortest to the longest" in drawn.caption
    assert "token limit" in words(drawn)
    for record in data.metrics["rl"][:2]:  # as of a run whose first steps an older version made
        del record.metrics["rl/completion_length/min"]
    assert "shortest" not in rl_figures.length(data).caption


def test_entropies_are_told_apart(run):
    assert "exact, of trained tokens" in words(rl_figures.entropy(run(EVERYTHING)))


@pytest.mark.parametrize(
    ("loss", "bounds"),
    [("grpo", {"1 + clip_high", "1 - clip_low"}), ("reinforce", set())],
)
def test_ratios_have_the_bounds_of_the_loss(run, loss, bounds):
    drawn = words(rl_health_figures.ratios(run(EVERYTHING, loss=loss)))
    assert {each for each in drawn if "clip" in each} == bounds
    assert {"largest", "smallest"} <= set(drawn)


def test_a_mismatch_that_costs_is_drawn_without_what_did_not_happen(run):
    data = run(EVERYTHING)
    assert rl_health_figures.mismatch_costs(data)
    drawn = words(rl_health_figures.mismatch_cost(data))
    assert "bounded weights" in drawn
    assert "masked tokens" not in drawn


def test_the_self_test_is_one_sentence(run):
    before = {
        "rl/self_test/max_log_ratio": 0.0,
        "rl/self_test/mean_gap": 4.8e-7,
        "rl/self_test/grad_norm": 1.724,
        "time/self_test_s": 0.42,
    }
    (sentence,) = chapters(run(PLAIN, before=before))["rl-health"].notes
    assert sentence == (
        "Self-test before the first step, passed in 0.4 s: two passes of the trainer differ by 0 "
        "nats at most, sampler and trainer by 4.8e-07 nats per token on average, and the gradient "
        "norm is 1.72."
    )


def test_shares_of_a_steps_time(run):
    """5, 3 and 1 of 10 s; what is saved in 0.01 s is among the rest."""
    drawn = time_figures.step_time(run(PLAIN))
    shares = [each for each in words(drawn) if each.endswith("%")]
    assert shares == ["sample 50 %", "wake trainer 10 %", "train 30 %", "other 10 %"]
    assert "40 s in all" in drawn.caption


def test_phases_of_like_memory_are_one_line(run):
    drawn = time_figures.memory(run(PLAIN))
    assert "the fullest is drawn" in drawn.caption
    assert "sample" not in words(drawn)


def test_phases_of_unlike_memory_have_a_line_each(run):
    drawn = time_figures.memory(run(EVERYTHING))
    assert "the fullest is drawn" not in drawn.caption
    assert {"sample", "train"} <= set(words(drawn))


def test_gradient_norms_of_both_stages_are_one_figure(run, tmp_path):
    run(PLAIN, optimizer={"learning_rate": 1e-5, "max_grad_norm": 0.5})
    log = MetricsLog(tmp_path, run="x", stage="sft", attempt=1)
    log.log({"sft/grad_norm": 2.0}, step=1, num_steps=1)
    data = load_run_data(tmp_path)
    for stage, title in (("sft", "SFT gradient norm"), ("rl", "RL gradient norm")):
        drawn = grad_norm(data, stage)
        assert drawn.title == title
        assert {"max_grad_norm", f"{title[:3].strip()} step"} <= set(words(drawn))


def test_steps_that_are_not_finite_leave_gaps(run):
    metrics = {name: float("nan") for name in EVERYTHING if name.startswith("rl/")}
    sections = chapters(run(EVERYTHING | metrics | {"rl/ratio/max": 2.0, "rl/ratio/min": 1.0}))
    assert "Ratios" in titles(sections["rl-health"])
    drawn = [*sections["rl"].charts, *sections["rl-health"].charts]
    paths = [path for each in drawn for path in re.findall(r' d="(.*?)"', each.svg, re.DOTALL)]
    assert paths
    assert not [path for path in paths if "nan" in path.lower()]


@pytest.mark.parametrize(("num_passes", "is_wide"), [(3, False), (4, True)])
def test_many_passes_span_the_page(num_passes, is_wide):
    passes = {f"pass_at_{2**k}": Estimate(0.5, 0.4, 0.6) for k in range(num_passes)}
    shape = {"num_problems": 9, "num_samples": 8, "temperature": 1.0, "max_tokens": 9}
    evaluation = Evaluation(
        "main", {}, **shape, confidence=0.95, checkpoints={"base": passes, "rl": passes}
    )
    drawn = pass_at_k(evaluation, named=False)
    (width,) = re.findall(r'viewBox="0 0 ([\d.]+) ', drawn.svg)
    assert float(width) == pytest.approx(72 * WIDTH_IN * (2 if is_wide else 1))
