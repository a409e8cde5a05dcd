"""The paper's settings: each value says where it is from, and what they cost needs no weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pear_ray import cli
from pear_ray.config.run import load_run
from pear_ray.config.study_plan import load_study

ROOT = Path(__file__).parents[3]
RUNS = ROOT / "jobs" / "runs"
SHAPES = "jobs/runs/shapes"
MODELS = {"policy": "Qwen3-4B-Base", "behavior": "Qwen3-8B"}
PHASES = ("collect", "score", "sft", "rl", "evaluate")
ROWS = {"paper_math": ["--rows", "104569"], "paper_logic": []}
PAPER = pytest.mark.parametrize("name", sorted(ROWS))
ON_H100 = 989e12 * 8  # FLOP/s of eight, in bfloat16


def planned(name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    models = [f"models.{who}={SHAPES}/{shape}" for who, shape in MODELS.items()]
    options = ["--device", "h100", *ROWS[name], "--json"]
    assert cli.main(["plan", f"jobs/runs/{name}.yaml", *models, *options]) == 0
    return json.loads(capsys.readouterr().out)


@PAPER
def test_every_value_is_marked_with_its_origin(name: str) -> None:
    for line in (RUNS / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        setting, _, comment = line.partition(" #")
        key, _, value = setting.strip().partition(": ")
        if line.startswith(("#", "name: ")) or not value.strip() or not key or value[0] == "&":
            continue  # comments, and keys whose values stand below them
        assert comment.strip().split(" ")[0].strip(":,;") in {"paper", "recipe", "open"}, line


@PAPER
def test_what_is_known_of_the_paper_is_what_runs(name: str) -> None:
    run = load_run(RUNS / f"{name}.yaml")
    weights = run.sft.weights
    assert weights.kind == "pear"
    assert (weights.level, weights.gamma) == ("token", 0.999)
    assert (weights.log_ratio_clip_low, weights.log_ratio_clip_high) == (-0.08, 0.3)
    assert (weights.log_weight_clip_low, weights.log_weight_clip_high) == (-10, 5)
    assert run.sft.num_epochs == 1
    rate = {"paper_math": 1e-5, "paper_logic": 3e-5}[name]
    assert run.sft.optimizer.learning_rate == rate
    assert (run.rl.loss.kind, run.rl.advantage) == ("grpo", "grpo")
    assert (run.evaluate.num_samples, run.evaluate.k) == (64, [1, 8])


@PAPER
def test_its_study_compares_the_three_levels_and_their_controls_with_sft(name: str) -> None:
    plan = load_study(RUNS / f"{name}_study.yaml")
    weights = {arm: plan.run_of(cell).sft.weights for arm, cell in first_cells(plan).items()}
    assert weights["sft"].kind == "uniform"
    levels = {arm: getattr(weights[arm], "level", None) for arm in weights}
    assert levels["pear_token"] == "token"
    assert levels["pear_block"] == "block"
    assert levels["pear_sequence"] == "sequence"
    for level in ("token", "sequence"):
        for control in ("shuffled", "position_profile", "likelihood_only"):
            assert weights[f"pear_{level}.{control}.mean_one"].control == control
    assert plan.study.registered
    assert 2 / 2 ** len(plan.study.seeds) <= plan.study.primary.alpha


def first_cells(plan: Any) -> dict[str, Any]:
    cells = plan.reported_cells({})
    return {cell.arm: cell for cell in reversed(cells)}


@PAPER
def test_the_plan_is_made_without_weights(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, from the public sizes: 36 layers, and an embedding that is the head as well."""
    monkeypatch.chdir(ROOT)
    assert [path.name for path in Path(SHAPES, MODELS["policy"]).iterdir()] == ["config.json"]
    layer = 2560 * (2 * 32 * 128 + 2 * 8 * 128 + 3 * 9728) + 2 * 2560 + 2 * 128
    parameters = 36 * layer + 151936 * 2560 + 2560
    assert parameters == 4_022_468_096
    tree = planned(name, capsys)
    assert {each["verdict"] for each in tree["phases"]} == {"fits"}
    sft = next(each for each in tree["phases"] if each["phase"] == "sft")
    sizes = {item["name"]: item["num_bytes"] for item in sft["moments"][0]["items"]}
    assert sizes["parameters"] == 4 * parameters // 8
    seconds = {each["phase"]: each["seconds"] for each in tree["time"]["phases"]}
    rows = {"paper_math": 104_569, "paper_logic": 12_000 * 2}[name]
    forward = 4096 * (2 * parameters + 4 * 36 * 32 * 128 * 4096)  # half of 8,192 tokens
    assert seconds["sft"] == pytest.approx(4 * rows * forward / (0.14 * ON_H100))
    training = next(each for each in tree["time"]["phases"] if each["phase"] == "rl")["parts"]
    [rl] = [part["seconds"] for part in training if part["name"] == "training"]
    assert rl == pytest.approx(200 * 128 * 8 * 3 * forward / (0.14 * ON_H100))


@PAPER
def test_the_page_has_the_plans_hours(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    phases = planned(name, capsys)["time"]["phases"]
    hours = {each["phase"]: 8 * each["seconds"] / 3600 for each in phases}
    cells = [f"{hours[phase]:.1f}" if phase in hours else "" for phase in PHASES]
    assert f"| `{name}` | {' | '.join(cells)} | {sum(hours.values()):.1f} |" in page


@PAPER
def test_the_page_has_the_studys_hours(name: str) -> None:
    models = ", ".join(f"models.{who}: {SHAPES}/{shape}" for who, shape in MODELS.items())
    overrides = f"overrides={{{models}, evaluate.checkpoints: [sft, rl]}}"
    command = [sys.executable, "scripts/study_cost.py", f"jobs/runs/{name}_study.yaml", overrides]
    done = subprocess.run(
        [*command, "--device", "h100", *ROWS[name]],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    assert done.stdout in page, "make the table of docs/paper.md again with scripts/study_cost.py"
    # 19 arms x 6 seeds: what is shared, and each group of arms, add up to all of it.
    rows = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines()[2:]]
    numbers = [float(row[-2].replace(",", "")) for row in rows]
    assert sum(numbers[:-2]) == pytest.approx(numbers[-1], abs=2)
