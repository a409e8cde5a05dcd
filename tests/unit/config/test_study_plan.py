"""Arms with their controls, cells seed by seed, and what a study file may not say."""

from pathlib import Path

import pytest

from pear_ray.config.study_plan import Cell, StudyPlan, load_study
from pear_ray.errors import ConfigError

STUDY = """\
name: small
base: tiny.yaml
overrides: {sft.num_epochs: 2}
arms:
  - {name: sft, overrides: {sft.weights: uniform}}
  - {name: pear, overrides: {sft.weights.level: sequence}, controls: [shuffled]}
  - {name: none, overrides: {sft.weights: uniform, sft.num_epochs: 0}}
seeds: [4, 5]
"""


def plan_of(run_file: Path, text: str, *overrides: str) -> StudyPlan:
    path = run_file.with_name("small.yaml")
    path.write_text(text, encoding="utf-8")
    return load_study(path, overrides)


def refusal(run_file: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        plan_of(run_file, text, *overrides)
    return str(caught.value)


def test_weighted_arms_come_with_controls_and_rescaled(run_file: Path) -> None:
    plan = plan_of(run_file, STUDY)
    assert list(plan.arms) == [
        "sft",
        "pear",
        "pear.mean_one",
        "pear.shuffled",
        "pear.shuffled.mean_one",
        "none",
    ]
    run = plan.run_of(Cell(arm="pear.shuffled.mean_one", seed=5))
    weights = run.sft.weights
    assert weights.kind == "pear"
    assert (weights.level, weights.control) == ("sequence", "shuffled")
    assert weights.rescale == "batch_mean_one"
    assert (run.seed, run.sft.num_epochs, run.name) == (5, 2, "pear.shuffled.mean_one-seed5")


@pytest.mark.parametrize(
    ("rescaled", "names", "scales"),
    [("no", ["pear"], ["none"]), ("only", ["pear"], ["batch_mean_one"])],
)
def test_one_scale_keeps_the_arms_name(
    run_file: Path, rescaled: str, names: list[str], scales: list[str]
) -> None:
    text = STUDY.replace("controls: [shuffled]", f"rescaled: {rescaled}")
    plan = plan_of(run_file, text)
    pears = [name for name in plan.arms if name.startswith("pear")]
    assert pears == names
    runs = [plan.run_of(Cell(arm=name, seed=4)) for name in pears]
    assert [getattr(run.sft.weights, "rescale", "") for run in runs] == scales


def test_cells_go_seed_by_seed_with_the_rates_that_were_chosen(run_file: Path) -> None:
    tune = "tune: {learning_rates: [1e-3, 2e-3], seeds: [9]}\n"
    plan = plan_of(run_file, STUDY + tune)
    tuning = plan.tuning_cells()
    assert {cell.arm for cell in tuning} == set(plan.arms) - {"none"}  # it has no rate
    assert [cell.name for cell in tuning[:2]] == ["sft-lr0.001-seed9", "sft-lr0.002-seed9"]
    assert all(cell.is_tuning for cell in tuning)
    cells = plan.reported_cells({"sft": 2e-3})
    assert [cell.seed for cell in cells] == [4] * 6 + [5] * 6
    assert plan.run_of(cells[0]).sft.optimizer.learning_rate == 2e-3
    assert plan.run_of(cells[-1]).sft.optimizer.learning_rate == 1e-5  # the base's


def test_only_the_seed_of_a_run_differs_between_seeds(run_file: Path) -> None:
    plan = plan_of(run_file, STUDY)
    first, second = (plan.run_of(Cell(arm="sft", seed=seed)) for seed in (4, 5))
    same = {"seed": 0, "name": "x"}
    assert first.model_copy(update=same) == second.model_copy(update=same)


def test_arms_may_differ_in_their_sft_alone(run_file: Path) -> None:
    text = STUDY.replace("sft.weights.level: sequence", "rl.group_size: 4, sft.weights: pear")
    said = refusal(run_file, text)
    assert "arm 'pear'" in said
    assert "changes `rl`" in said


def test_an_arm_that_makes_no_run_is_named(run_file: Path) -> None:
    said = refusal(run_file, STUDY.replace("level: sequence", "levle: sequence"))
    assert "arm 'pear'" in said
    assert "did you mean 'level'?" in said


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ("tune: {learning_rates: [1, 2], seeds: [5]}", "tune.seeds and seeds share [5]"),
        ("primary: {arm: pera, against: [sft]}", "primary names the arm 'pera'"),
        ("registered: true", "has nothing to register"),
        ("score: {suite: other}", "score.suite='other' is not evaluated"),
    ],
)
def test_what_a_study_may_not_say(run_file: Path, more: str, wanted: str) -> None:
    assert wanted in refusal(run_file, f"{STUDY}{more}\n")


def test_controls_are_of_weights(run_file: Path) -> None:
    text = STUDY.replace("sft.weights: uniform}}", "sft.weights: uniform}, controls: [shuffled]}")
    assert "its weights are uniform" in refusal(run_file, text)


def test_two_arms_of_one_name_and_a_seed_twice_are_refused(run_file: Path) -> None:
    assert "two are called sft" in refusal(run_file, STUDY.replace("name: none", "name: sft"))
    assert "has one twice" in refusal(run_file, STUDY, "seeds=[4,4]")


def test_a_base_that_is_missing_is_named(run_file: Path) -> None:
    assert "nowhere.yaml: cannot read" in refusal(run_file, STUDY, "base=nowhere.yaml")


def test_a_study_that_is_missing_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot read the study file"):
        load_study(tmp_path / "nothing.yaml")


def test_a_key_of_the_run_is_told_where_it_goes(run_file: Path) -> None:
    said = refusal(run_file, STUDY, "rl.num_steps=2")
    assert "rl: of the run that all arms begin with" in said
    assert "overrides.rl.num_steps=2" in said


def test_an_override_of_the_runs_keeps_the_rest_of_its_section(run_file: Path) -> None:
    plan = plan_of(run_file, STUDY, "overrides.rl.num_steps=2", "seeds=[7]")
    run, before = (
        each.run_of(Cell(arm="sft", seed=7)) for each in (plan, plan_of(run_file, STUDY))
    )
    assert (run.sft.num_epochs, run.rl.num_steps) == (2, 2)
    assert before.rl.num_steps != 2
    assert run.rl.problems == before.rl.problems
    assert plan.study.seeds == [7]
