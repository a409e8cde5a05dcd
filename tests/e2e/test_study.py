"""A study as a user runs it: killed, gone on with, an arm that fails, and DFT's reversal."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from pear_ray.artifacts.study_results import StudyTables, read_study_tables
from pear_ray.config.run import load_run
from pear_ray.telemetry.metrics_log import MetricRecord, read_metrics

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900
COMPARED_STEPS = 8  # of RL
STUDY = f"""
name: reversal
base: {ROOT}/jobs/runs/suffix.yaml
overrides:
  corpus.path: embedded:automaton/changed/corpus.parquet
  rl.problems.path: embedded:automaton/changed/train_a.jsonl
  rl.num_steps: 20  # by then the reversal is wide
  rl.save_rollouts_every: 0
  evaluate.problems.path: embedded:automaton/changed/heldout_a.jsonl
  evaluate.suites: []
  evaluate.num_samples: 8
  evaluate.checkpoints: [sft, rl]
arms:
  - {{name: sft, overrides: {{sft.weights: uniform}}}}
  - name: dft
    overrides: {{sft.weights: uniform, sft.objective: dft, sft.optimizer.learning_rate: 0.004}}
  - name: stops  # its weights are never all alike
    overrides: {{sft.alarms: {{action: stop, min_ess_fraction: 1.0, patience: 1}}}}
seeds: [1, 2]
primary: {{arm: sft, against: [dft]}}
registered: true
"""


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    log = (folder / f"driver-{time.monotonic():.0f}.log").open("w", encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "pear_ray", *(arguments or ("study", "reversal.yaml"))],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
    )


def log_of(folder: Path) -> str:
    return max(folder.glob("driver-*.log")).read_text(encoding="utf-8")


def wait_until(reached: Callable[[], bool], process: "subprocess.Popen[str]", folder: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not reached():
        assert process.poll() is None, log_of(folder)[-4000:]
        assert time.monotonic() < deadline, log_of(folder)[-4000:]
        time.sleep(0.2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study that was killed in its first RL and gone on with."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "reversal.yaml").write_text(STUDY, encoding="utf-8")
    process = start(folder)
    study_dir = folder / "outputs" / "reversal"
    evaluated = study_dir / "runs" / "sft-seed1" / "evaluate" / "manifest.json"
    wait_until(evaluated.exists, process, folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = start(folder)
    assert again.wait(timeout=TIMEOUT_S) == 0, log_of(folder)[-4000:]
    return folder


def tables(folder: Path) -> StudyTables:
    return read_study_tables(folder / "outputs" / "reversal" / "results")


def scores(folder: Path, arm: str, checkpoint: str) -> list[float]:
    """pass@1 by seed."""
    found = {
        each.seed: each.value
        for each in tables(folder).scores
        if (each.arm, each.checkpoint, each.metric) == (arm, checkpoint, "pass_at_1")
    }
    return [found[seed] for seed in (1, 2)]


@pytest.mark.timeout(2 * TIMEOUT_S)
def test_a_killed_study_goes_on_and_repeats_nothing_that_was_done(finished: Path) -> None:
    study_dir = finished / "outputs" / "reversal"
    assert "runs are done already" in log_of(finished)
    attempts = {run.arm: run.attempts for run in tables(finished).runs if run.seed == 1}
    assert attempts["sft"] <= 1  # 0: it was killed between its last stage and its record
    logs = study_dir / "runs" / "sft-seed1" / "logs"
    assert len(list(logs.iterdir())) == 1
    registered = json.loads((study_dir / "registration.json").read_text(encoding="utf-8"))
    assert registered["time"] < registered["first_rl_time"]
    facts = json.loads((study_dir / "study.json").read_text(encoding="utf-8"))
    assert (facts["state"], facts["changed_since_registration"]) == ("done", [])


def test_an_arm_that_fails_is_named_and_the_others_go_on(finished: Path) -> None:
    ends = {(run.arm, run.seed): run for run in tables(finished).runs}
    assert {seed for arm, seed in ends if arm == "sft"} == {1, 2}
    assert all(run.status == "done" for (arm, _), run in ends.items() if arm in ("sft", "dft"))
    stopped = [run for (arm, _), run in ends.items() if arm == "stops"]
    assert [run.status for run in stopped] == ["failed"] * 2
    assert all("sft.alarms.action=stop" in run.detail for run in stopped)


def test_a_packed_run_is_the_run_to_the_bit(finished: Path, tmp_path: Path) -> None:
    """The second run of a worker, on an engine that has held other weights.

    By itself it is stopped after some steps of RL: by then all that a step takes has been equal.
    """
    packed = finished / "outputs" / "reversal" / "runs" / "sft-seed2"
    config = load_run(packed / "config.yaml", [f"output_dir={tmp_path}"])
    alone = tmp_path / config.name
    process = start(
        tmp_path,
        "run",
        str(packed / "config.yaml"),
        f"output_dir={tmp_path}",
        "--reuse",
        str(finished / "outputs" / "reversal" / "shared"),
    )
    wait_until(lambda: len(rl_steps(alone)) >= COMPARED_STEPS, process, tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=TIMEOUT_S) == 0, log_of(tmp_path)[-4000:]
    expected = load_file(packed / "sft" / "model" / "model.safetensors")
    found = load_file(alone / "sft" / "model" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)
    pairs = list(zip(rl_steps(packed), rl_steps(alone), strict=False))
    assert len(pairs) >= COMPARED_STEPS
    for one, other in pairs:
        for name in ("rl/loss", "rl/grad_norm", "rl/reward/mean", "rl/mismatch/max_gap"):
            assert one[name] == other[name], name


def rl_steps(run_dir: Path) -> list[dict[str, float]]:
    """What each step of RL logged, so far."""
    file = run_dir / "metrics.jsonl"
    records = read_metrics(file) if file.exists() else []
    return [
        r.metrics
        for r in records
        if isinstance(r, MetricRecord) and (r.stage, bool(r.step)) == ("rl", True)
    ]


def test_dft_is_ahead_before_rl_and_behind_after_it(finished: Path) -> None:
    """Each seed by itself, and by far: an operation does what only the corpus could teach."""
    for checkpoint, sign in (("sft", 1), ("rl", -1)):
        pairs = zip(
            scores(finished, "dft", checkpoint), scores(finished, "sft", checkpoint), strict=True
        )
        assert all(sign * (dft - sft) > 0.1 for dft, sft in pairs), checkpoint


def test_the_report_says_how_few_seeds_there_were(finished: Path) -> None:
    study_dir = finished / "outputs" / "reversal"
    assert "<svg" in (study_dir / "report.html").read_text(encoding="utf-8")
    summary = (study_dir / "summary.md").read_text(encoding="utf-8")
    assert "Too few seeds for any claim: 2 give p >= 0.5" in summary
    assert "dft" in summary
