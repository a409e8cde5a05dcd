"""Learning rates, registration and packing: what a study decides without running anything."""

import json
from pathlib import Path

import pytest

from pear_ray.artifacts.study_results import StudyRun, StudyScore
from pear_ray.config.study import ScoreOfStudy
from pear_ray.config.study_plan import Cell, StudyPlan, load_study
from pear_ray.errors import ConfigError
from pear_ray.study.cell import Measured
from pear_ray.study.packing import packing_of
from pear_ray.study.registration import begin_rl, changes, register, registration_facts
from pear_ray.study.tuning import chosen_rates, score_after_rl

BASE = """\
name: tiny
models: {policy: models/base, behavior: models/teacher}
corpus: {kind: dataset, path: corpus.jsonl}
sft: {optimizer: {learning_rate: 1e-5}}
rl:
  problems: {games: [{name: chain_sum}], size: 10}
  optimizer: {learning_rate: 1e-6}
  num_steps: 3
evaluate: {problems: {games: [{name: chain_sum}], size: 10}}
"""
STUDY = """\
name: small
base: tiny.yaml
overrides: {cluster.num_trainers: 1}
arms:
  - {name: sft, overrides: {sft.weights: uniform}}
  - {name: dft, overrides: {sft.weights: uniform, sft.objective: dft}}
seeds: [4, 5]
tune: {learning_rates: [1e-3, 2e-3, 3e-3], seeds: [8, 9]}
primary: {arm: dft, against: [sft]}
registered: true
"""


def plan_in(folder: Path, *overrides: str) -> StudyPlan:
    (folder / "tiny.yaml").write_text(BASE, encoding="utf-8")
    (folder / "small.yaml").write_text(STUDY, encoding="utf-8")
    return load_study(folder / "small.yaml", overrides)


def found(arm: str, rate: float, seed: int, after: float | None) -> Measured:
    """A tuning run that ended with `after`, or failed."""
    key = {"arm": arm, "seed": seed, "learning_rate": rate, "is_tuning": True}
    run = StudyRun(
        **key,
        status="failed" if after is None else "done",
        detail="",
        run_dir="",
        attempts=1,
        seconds=1.0,
        optimizer_steps=1,
        tokens=1,
    )
    where = {"suite": "main", "checkpoint": "rl", "metric": "pass_at_1"}
    scores = [] if after is None else [StudyScore(**key, **where, value=after)]
    return Measured(run, scores, [])


def test_the_rate_with_the_highest_mean_is_chosen_and_the_smaller_of_equals(tmp_path: Path) -> None:
    rows = [("sft", 1e-3, 0.2, 0.6), ("sft", 2e-3, 0.5, 0.5), ("sft", 3e-3, 0.9, 0.0)]
    rows += [("dft", 1e-3, 0.25, 0.25), ("dft", 2e-3, 0.0, 0.5)]  # equal means
    measured = [
        found(arm, rate, seed, value)
        for arm, rate, *values in rows
        for seed, value in zip((8, 9), values, strict=True)
    ]
    assert chosen_rates(plan_in(tmp_path), measured) == {"sft": 2e-3, "dft": 1e-3}


def test_a_rate_that_lost_a_run_counts_only_if_all_have(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    lucky = [found("sft", 3e-3, 8, 0.9), found("sft", 3e-3, 9, None)]
    whole = [found("sft", 1e-3, 8, 0.1), found("sft", 1e-3, 9, 0.1)]
    assert chosen_rates(plan, [*lucky, *whole]) == {"sft": 1e-3}
    assert chosen_rates(plan, lucky) == {"sft": 3e-3}
    assert chosen_rates(plan, [found("sft", 3e-3, 8, None)]) == {}


def test_an_unknown_metric_says_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"pass_at_9.*'main' has pass_at_1"):
        score_after_rl(found("sft", 1e-3, 8, 0.5), ScoreOfStudy(metric="pass_at_9"))


def test_a_registration_stands_and_changes_are_named(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    register(plan, tmp_path)
    assert changes(plan, tmp_path) == []
    before = registration_facts(tmp_path)
    assert before is not None
    assert before.first_rl_time is None
    begin_rl(tmp_path)
    begun = registration_facts(tmp_path)
    assert begun is not None
    assert begun.first_rl_time is not None
    assert begun.time <= begun.first_rl_time
    other = plan_in(tmp_path, "seeds=[4]", "overrides={cluster.num_trainers: 1, rl.num_steps: 4}")
    register(other, tmp_path)  # too late
    words = changes(other, tmp_path)
    assert words[0] == f"seeds was {json.dumps([4, 5])} and is {json.dumps([4])}"
    assert words[1:] == ["arm dft has other settings", "arm sft has other settings"]
    assert registration_facts(tmp_path) == begun


def test_how_the_machine_is_used_is_not_held_to(tmp_path: Path) -> None:
    register(plan_in(tmp_path), tmp_path)
    assert changes(plan_in(tmp_path, "runs_at_once=3", "budget.tokens=5"), tmp_path) == []


def test_small_runs_are_packed_one_to_a_core(tmp_path: Path) -> None:
    packing = packing_of(plan_in(tmp_path), {"CPU": 4.0})
    assert (packing.packed, packing.at_once, packing.cpus) == (True, 4, 1.0)


def test_large_runs_bring_groups_of_their_own(tmp_path: Path) -> None:
    plan = plan_in(tmp_path, "overrides={cluster.num_trainers: 2}")
    packing = packing_of(plan, {"CPU": 5.0})
    assert (packing.packed, packing.at_once, packing.cpus) == (False, 2, 0.0)
    with pytest.raises(ConfigError, match="packed=true wants runs of one trainer"):
        packing_of(plan_in(tmp_path, "packed=true", "overrides={cluster.num_trainers: 2}"), {})


def test_runs_whose_engines_are_wide_bring_them_along(tmp_path: Path) -> None:
    wide = "overrides={evaluate.tensor_parallel_size: 2}"
    assert not packing_of(plan_in(tmp_path, wide), {"CPU": 4.0}).packed
    with pytest.raises(ConfigError, match="packed=true wants runs on one device"):
        packing_of(plan_in(tmp_path, "packed=true", wide), {})


def test_several_runs_share_a_gpu(tmp_path: Path) -> None:
    cuda = "overrides={cluster.num_trainers: 1, cluster.device: cuda}"
    plan = plan_in(tmp_path, cuda, "gpus_per_run=0.25")
    packing = packing_of(plan, {"CPU": 16.0, "GPU": 1.0})
    assert (packing.at_once, packing.gpus) == (4, 0.25)


def test_cells_name_their_folders(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    cell = Cell(arm="sft", seed=8, learning_rate=2e-3, is_tuning=True)
    run = plan.run_of(cell)
    assert run.name == cell.name == "sft-lr0.002-seed8"
    assert Path(run.output_dir).parts[-2:] == ("small", "runs")
