"""The whole pipeline as a user runs it: through, skipped, killed and resumed, on real engines."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from prometheus_server import (
    Prometheus,
    alert_queries,
    dashboard_queries,
    find_program,
    names_in,
    prometheus,
)
from safetensors.numpy import load_file

from pear_ray.artifacts.tables import EVALUATION_SAMPLES, read_table
from pear_ray.telemetry.metrics_log import EventRecord, MetricRecord, read_metrics

ROOT = Path(__file__).parents[2]
STAGES = ["collect", "score", "sft", "rl", "evaluate", "report"]
RUN_TIMEOUT_S = 500
_CLUSTER: dict[str, str] = {}  # where a run finds its Ray; nothing: it starts one
# Planted in every run's environment; nothing that a run leaves may hold one.
SECRETS = {
    name: f"planted-{name.lower()}-5f3a9c"
    for name in (
        "AWS_SECRET_ACCESS_KEY",
        "HF_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "OPENAI_API_KEY",
        "RAY_AUTH_TOKEN",
        "WANDB_API_KEY",
    )
}
GAME = "{name: chain_sum, params: {min_terms: 3, max_terms: 5, min_digits: 1, max_digits: 1}}"
RUN_FILE = f"""
name: small
models:
  policy: embedded:student
  behavior: embedded:teacher
  dtype: float32
  max_model_len: 160
corpus:
  kind: sampled
  problems: {{games: [{GAME}], size: 48, seed: 1}}
  samples_per_problem: 2
  max_tokens: 64
score: {{rows_per_block: 16}}
sft:
  optimizer: {{learning_rate: 1e-3}}
  num_epochs: 2
  global_batch_size: 16
  checkpoint_every: 2
  pass_at_k: {{every: 100}}
rl:
  problems: {{games: [{GAME}], size: 64, seed: 2}}
  optimizer: {{learning_rate: 1e-4}}
  num_steps: 6
  prompts_per_step: 8
  group_size: 4
  max_tokens: 64
  checkpoint_every: 2
  pass_at_k: {{every: 3}}
evaluate:
  problems: {{games: [{GAME}], size: 40, seed: 3}}  # more than one call to an engine
  max_tokens: 64
  suites:
    - name: in_form
      problems: {{games: [{GAME}], size: 8, seed: 4}}
      num_samples: 4
      k: [1, 4]
      rewards:
        components:
          - {{kind: game}}
          - {{kind: regex, name: form, pattern: "<answer>", compare: match, weight: 0.1}}
cluster: {{num_samplers: 1}} # pools of several are tests/integration's
"""


def command(folder: Path, stage: str, *flags: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pear_ray",
        stage,
        str(folder / "small.yaml"),
        f"output_dir={folder}",
        *flags,
    ]


def start(folder: Path, stage: str = "run", *flags: str) -> subprocess.Popen[str]:
    log = (folder / f"driver-{time.time_ns()}.log").open("w", encoding="utf-8")
    return subprocess.Popen(
        command(folder, stage, *flags),
        cwd=ROOT,
        env=os.environ | _CLUSTER | SECRETS,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_to_end(folder: Path, stage: str = "run", *flags: str) -> float:
    """Run the pipeline; the seconds it took."""
    began = time.monotonic()
    process = start(folder, stage, *flags)
    assert process.wait(timeout=RUN_TIMEOUT_S) == 0, newest_log(folder)
    return time.monotonic() - began


def newest_log(folder: Path) -> str:
    return max(folder.glob("driver-*.log")).read_text(encoding="utf-8")[-4000:]


def metrics(folder: Path, stage: str) -> list[MetricRecord]:
    records = read_metrics(folder / "small" / "metrics.jsonl")
    return [r for r in records if isinstance(r, MetricRecord) and r.stage == stage]


def events(folder: Path, attempt: int) -> list[tuple[str, str]]:
    records = read_metrics(folder / "small" / "metrics.jsonl")
    found = [r for r in records if isinstance(r, EventRecord) and r.attempt == attempt]
    return [(r.stage, str(r.event)) for r in found]


@pytest.fixture(scope="module")
def watching() -> Iterator[Prometheus | None]:
    """A Prometheus that is there while the first run goes, where there is a program for it."""
    if find_program("prometheus") is None:
        yield None
        return
    with prometheus() as server:
        yield server


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, watching: Prometheus | None
) -> Iterator[Path]:
    """A folder with a run that went through undisturbed, on a Ray of its own.

    What comes after it connects to one that is there, as on a cluster, and need not start another.
    """
    folder = tmp_path_factory.mktemp("run")
    (folder / "small.yaml").write_text(RUN_FILE, encoding="utf-8")
    _CLUSTER.update(watching.environment if watching else {})
    run_to_end(folder)
    _CLUSTER.clear()
    is_there = ray.is_initialized()  # that of tests/integration
    if not is_there:
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    _CLUSTER["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    yield folder
    _CLUSTER.clear()
    if not is_there:
        ray.shutdown()


def test_every_stage_leaves_a_complete_artifact(finished: Path) -> None:
    run_dir = finished / "small"
    for stage in STAGES:
        manifest = json.loads((run_dir / stage / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["stage"] == stage
        assert not (run_dir / stage / "unfinished.json").exists()
    results = json.loads((run_dir / "evaluate" / "results.json").read_text(encoding="utf-8"))
    assert [each["checkpoint"] for each in results["suites"][0]["checkpoints"]] == [
        "base",
        "sft",
        "rl",
    ]
    for each in results["suites"][0]["checkpoints"]:
        at_1, at_8 = each["metrics"]["pass_at_1"], each["metrics"]["pass_at_8"]
        assert 0 <= at_1["low"] <= at_1["value"] <= at_1["high"] <= 1
        assert at_1["value"] <= at_8["value"]
    report = (run_dir / "report" / "report.html").read_text(encoding="utf-8")
    assert "pass@1" in report
    assert "http" not in report.replace("http://www.w3.org/", "")  # self-contained


def test_no_secret_of_the_environment_is_in_what_the_run_left(finished: Path) -> None:
    files = [path for path in finished.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.yaml", "run.json", "metrics.jsonl", "manifest.json", "report.html"} <= names
    assert any("logs" in path.parts for path in files)
    for path in files:
        content = path.read_bytes()
        for name, secret in SECRETS.items():
            assert secret.encode() not in content, f"{name} is in {path}"


def test_every_suite_is_evaluated_reported_and_in_the_table(finished: Path) -> None:
    run_dir = finished / "small"
    results = json.loads((run_dir / "evaluate" / "results.json").read_text(encoding="utf-8"))
    main, in_form = results["suites"]
    assert (main["name"], main["num_problems"], main["num_samples"]) == ("main", 40, 8)
    assert (in_form["name"], in_form["num_problems"], in_form["num_samples"]) == ("in_form", 8, 4)
    assert "State the final answer" in in_form["first_prompt"]
    assert set(in_form["checkpoints"][0]["metrics"]) == {
        *("pass_at_1", "pass_at_4", "mean_at_4", "maj_at_4", "tied_fraction", "mean_length"),
        *("truncated_fraction", "entropy", "reward/mean", "reward/game/mean", "reward/form/mean"),
        *("format_fraction", "errored_fraction"),
    }
    rows = read_table(run_dir / "evaluate" / "samples.parquet", EVALUATION_SAMPLES).to_pylist()
    for suite in results["suites"]:
        for each in suite["checkpoints"]:
            of = [
                row
                for row in rows
                if row["suite"] == suite["name"] and row["checkpoint"] == each["checkpoint"]
            ]
            right = [row["reward_status"] == "ok" for row in of]
            assert len(right) == suite["num_problems"] * suite["num_samples"]
            assert sum(right) / len(right) == pytest.approx(each["metrics"]["pass_at_1"]["value"])
    logged = metrics(finished, "evaluate")[-1].metrics
    last = in_form["checkpoints"][-1]["metrics"]
    assert logged["eval/in_form/pass_at_4"] == last["pass_at_4"]["value"]
    report = (run_dir / "report" / "report.html").read_text(encoding="utf-8")
    assert "Suite in_form" in report


def test_pass_at_k_while_training_is_the_evaluate_stages(finished: Path) -> None:
    """Digit for digit: SFT begins at the base model, and ends where RL begins."""
    results = json.loads((finished / "small" / "evaluate" / "results.json").read_text())
    known = {each["checkpoint"]: each["metrics"] for each in results["suites"][0]["checkpoints"]}
    for stage, place, checkpoint in (
        ("sft", 0, "base"),
        ("sft", -1, "sft"),
        ("rl", 0, "sft"),
        ("rl", -1, "rl"),
    ):
        found = metrics(finished, stage)[place].metrics
        for name, estimate in known[checkpoint].items():
            assert found[f"{stage}/eval/{name}"] == estimate["value"]
            assert found[f"{stage}/eval/{name}/low"] == estimate["low"]
            assert found[f"{stage}/eval/{name}/high"] == estimate["high"]
    evaluated = [r.step for r in metrics(finished, "rl") if "rl/eval/pass_at_1" in r.metrics]
    assert evaluated == [0, 3, 6]


def test_scores_agree_with_what_was_sampled_and_with_transformers(finished: Path) -> None:
    details = json.loads((finished / "small" / "score" / "manifest.json").read_text())["details"]
    assert details["score/given_gap/mean"] < 1e-5
    assert details["score/audit_gap/max"] < 1e-4


def test_engine_and_trainer_agree_at_every_rl_step(finished: Path) -> None:
    steps = [record for record in metrics(finished, "rl") if record.step]
    assert [record.step for record in steps] == [1, 2, 3, 4, 5, 6]
    assert max(record.metrics["rl/mismatch/mean_gap"] for record in steps) < 1e-5
    assert max(record.metrics["rl/sync_gap"] for record in steps) < 1e-5


def test_a_second_run_skips_everything(finished: Path) -> None:
    def stamps() -> dict[str, int]:
        files = [finished / "small" / stage / "manifest.json" for stage in STAGES]
        return {str(file): file.stat().st_mtime_ns for file in files}

    before = stamps()
    run_to_end(finished)
    assert stamps() == before
    assert events(finished, attempt=2) == [(stage, "stage_skipped") for stage in STAGES]


@pytest.mark.slow
def test_a_replay_of_the_runs_rollouts_is_the_run(finished: Path) -> None:
    """Trained on without an engine, in other processes: the same losses and weights to the bit."""
    run_to_end(finished, "rl", "--train-only")
    steps = [record for record in metrics(finished, "rl") if record.step]
    replayed = metrics(finished, "rl_train")
    assert [record.step for record in replayed] == [1, 2, 3, 4, 5, 6]
    for name in ("rl/loss", "rl/grad_norm", "rl/reward/mean", "rl/mismatch/max_gap"):
        assert [r.metrics[name] for r in replayed] == [r.metrics[name] for r in steps], name
    assert {record.metrics["rl/policy_lag"] for record in replayed} == {0.0}
    weights, again = (
        load_file(finished / "small" / stage / "model" / "model.safetensors")
        for stage in ("rl", "rl_train")
    )
    for name, tensor in weights.items():
        assert (tensor == again[name]).all(), name


def test_readiness_is_of_the_rollouts_that_rl_begins_with(finished: Path) -> None:
    run_to_end(finished, "ready", "ready.num_steps=2")
    stage_dir = finished / "small" / "ready"
    found = json.loads((stage_dir / "ready.json").read_text(encoding="utf-8"))
    steps = [record.metrics for record in metrics(finished, "rl") if record.step == 1]
    first = metrics(finished, "ready")[0].metrics
    for name in ("rl/reward/mean", "rl/degenerate_group_fraction", "rl/entropy"):
        assert first[name] == steps[0][name], name
    assert found["num_completions"] == 2 * 8 * 4
    assert found["drift"]["num_completions"] == 2 * 8 * 2
    assert found["drift"]["kl_per_token"]["value"] > 0.0
    assert found["handover"]["reload_gap"] < 1e-5
    assert found["handover"]["engine_gap"] < 1e-5
    assert found["verdict"] in newest_log(finished)
    assert (stage_dir / "ready.html").read_text(encoding="utf-8").count("<svg") == 4
    # How long RL is does not matter.
    run_to_end(finished, "ready", "ready.num_steps=2", "rl.num_steps=9")
    assert events(finished, max_attempt_of_all(finished)) == [("ready", "stage_skipped")]


@pytest.mark.slow
def test_a_probe_of_the_runs_own_seed_is_the_run(finished: Path) -> None:
    run_to_end(finished, "ready", "ready.num_steps=2", "ready.probe={num_steps: 2, seeds: [0, 5]}")
    stage_dir = finished / "small" / "ready"
    found = json.loads((stage_dir / "ready.json").read_text(encoding="utf-8"))
    steps = [record.metrics for record in metrics(finished, "rl") if record.step == 1]
    assert (stage_dir / "ready.html").read_text(encoding="utf-8").count("<svg") == 5
    # The probe with the run's own seed is the run; with another it is not, and its models are gone.
    probe = found["probe"]["rewards"]
    assert probe["0"][0] == steps[0]["rl/reward/mean"]
    assert probe["5"][0] != probe["0"][0]
    assert sorted(path.name for path in (stage_dir / "probe" / "seed-5").iterdir()) == [
        "metrics.jsonl",
        "probe.json",
    ]


def test_rl_refuses_a_checkpoint_that_was_changed_since_sft(finished: Path, tmp_path: Path) -> None:
    """By name, before a worker starts."""
    model = before_rl(finished, tmp_path) / "sft" / "model"
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    planted = json.dumps(config | {"tie_word_embeddings": False})
    (model / "config.json").write_text(planted, encoding="utf-8")
    driver = start(tmp_path, "rl")
    assert driver.wait(timeout=RUN_TIMEOUT_S) == 1
    assert "tied_weights: config.json has tie_word_embeddings=False, the trainer True" in (
        newest_log(tmp_path)
    )
    assert metrics(tmp_path, "rl") == []
    assert not (tmp_path / "small" / "rl" / "rollouts").exists()


@pytest.mark.slow
def test_a_checkpoint_put_there_by_hand_passes_with_a_warning(
    finished: Path, tmp_path: Path
) -> None:
    (before_rl(finished, tmp_path) / "sft" / "model" / "handover.json").unlink()
    run_to_end(tmp_path, "rl", "rl.num_steps=1", "--rollouts-only")
    records = read_metrics(tmp_path / "small" / "metrics.jsonl")
    warned = [r for r in records if isinstance(r, EventRecord) and r.event == "warning"]
    assert any("has no handover.json" in each.message for each in warned)


def before_rl(finished: Path, folder: Path) -> Path:
    """A copy of the run in `folder`, with no RL yet."""
    shutil.copytree(finished / "small", folder / "small")
    (folder / "small.yaml").write_text(RUN_FILE, encoding="utf-8")
    shutil.rmtree(folder / "small" / "rl")
    (folder / "small" / "metrics.jsonl").unlink()
    return folder / "small"


def test_a_killed_run_resumes_to_the_same_weights(finished: Path, tmp_path: Path) -> None:
    """SIGKILL of the driver in mid-RL; the rerun goes on from the last checkpoint, bit for bit."""
    folder = before_rl(finished, tmp_path)
    for stage in ("evaluate", "report"):
        shutil.rmtree(folder / stage)
    driver = start(tmp_path)
    # Ray Train's controller takes note of a checkpoint a moment after it was written; a driver that
    # is killed in between goes on from the one before.
    snapshot = folder / "rl" / "train" / "checkpoint_manager_snapshot.json"
    wait_until(driver, tmp_path, lambda: snapshot.exists() and "step-0" in snapshot.read_text())
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    run_to_end(tmp_path)
    records, last = metrics(tmp_path, "rl"), max_attempt(tmp_path)
    resumed = [r for r in records if r.attempt == last]
    assert resumed[0].step in {3, 5}, "resumed from a committed checkpoint, not from the start"
    # Looked at only now: workers outlive their driver by a moment, and may end a step in it.
    assert resumed[0].step <= max(r.step for r in records if r.attempt < last) + 1
    undisturbed = {r.step: r.metrics for r in metrics(finished, "rl")}
    for record in resumed:
        for name in ("rl/reward/mean", "rl/eval/pass_at_1"):
            assert record.metrics.get(name) == undisturbed[record.step].get(name)
    assert_same_weights(finished, tmp_path)


@pytest.mark.slow
def test_sigterm_checkpoints_and_sft_resumes_to_the_same_weights(
    finished: Path, tmp_path: Path
) -> None:
    """Told to stop, then killed, then left to end: three attempts, and the same bits.

    Without the evaluations of the undisturbed run, which must not have changed them.
    """
    shutil.copytree(finished / "small", tmp_path / "small")
    without = RUN_FILE.replace("  pass_at_k: {every: 100}\n", "")
    assert without != RUN_FILE
    (tmp_path / "small.yaml").write_text(without, encoding="utf-8")
    for stage in ("sft", "rl", "evaluate", "report"):
        shutil.rmtree(tmp_path / "small" / stage)
    (tmp_path / "small" / "metrics.jsonl").unlink()
    driver = start(tmp_path, "sft")
    wait_for_step(tmp_path, driver, stage="sft", step=1)
    os.kill(driver.pid, signal.SIGTERM)
    assert driver.wait(timeout=60) == 0, newest_log(tmp_path)
    assert "sft stopped at a checkpoint, as SIGTERM asked" in newest_log(tmp_path)
    stopped_after = max(record.step for record in metrics(tmp_path, "sft"))
    assert not (tmp_path / "small" / "sft" / "model").exists()

    driver = start(tmp_path, "sft")
    wait_for_step(tmp_path, driver, stage="sft", step=stopped_after + 1)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    run_to_end(tmp_path, "sft")
    undisturbed = {r.step: r.metrics for r in metrics(finished, "sft")}
    first, *later = sorted({r.attempt for r in metrics(tmp_path, "sft")})
    for attempt in later:  # neither begins again
        steps = [r.step for r in metrics(tmp_path, "sft") if r.attempt == attempt]
        assert stopped_after < min(steps) <= max(steps) <= 8, first
    for record in metrics(tmp_path, "sft"):
        for name in ("sft/weighted_loss", "sft/grad_norm"):
            assert record.metrics[name] == undisturbed[record.step][name]
    assert_same_weights(finished, tmp_path, "sft")


def wait_until(driver: Any, folder: Path, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while not holds():
        assert driver.poll() is None, newest_log(folder)
        assert time.monotonic() < deadline, newest_log(folder)
        time.sleep(0.1)


def wait_for_step(folder: Path, driver: Any, *, stage: str, step: int) -> None:
    file = folder / "small" / "metrics.jsonl"
    wait_until(
        driver,
        folder,
        lambda: file.exists() and any(record.step >= step for record in metrics(folder, stage)),
    )


def max_attempt(folder: Path) -> int:
    return max(record.attempt for record in metrics(folder, "rl"))


def max_attempt_of_all(folder: Path) -> int:
    return max(record.attempt for record in read_metrics(folder / "small" / "metrics.jsonl"))


def assert_same_weights(one: Path, other: Path, stage: str = "rl") -> None:
    weights, again = (
        load_file(folder / "small" / stage / "model" / "model.safetensors")
        for folder in (one, other)
    )
    assert weights.keys() == again.keys()
    for name, tensor in weights.items():
        assert (tensor == again[name]).all(), name


# What only GPUs feed, runs whose rollouts lag, and runs that have to wait for devices.
NOT_FED = {"ray_node_gpus_utilization", "ray_node_gram_used", "ray_node_gram_available"} | {
    "ray_pear_ray_rl_policy_lag",
    "ray_pear_ray_stage_waiting_s",
}


def test_prometheus_has_seen_all_that_the_dashboard_asks_for(
    finished: Path, watching: Prometheus | None
) -> None:
    if watching is None:
        pytest.skip("no prometheus: scripts/prometheus.sh puts it where it is looked for")
    records = read_metrics(finished / "small" / "metrics.jsonl")
    first = [record.time for record in records if record.attempt == 1]
    window = {"begin": first[0], "end": first[-1] + 30}
    known = set(watching.ask("label/__name__/values"))
    for where, query in (dashboard_queries() | alert_queries()).items():
        assert names_in(query) <= known | NOT_FED, where
        found = watching.over_time(query, **window)  # an error says why in its message
        if where in dashboard_queries() and not names_in(query) & NOT_FED:
            assert found, where
    rules = [rule for group in watching.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"]: rule["health"] for rule in rules} == dict.fromkeys(alert_queries(), "ok")

    # What was scraped is what was logged, and the run's state is the one that it was in.
    logged = {each.metrics.get("rl/reward/mean") for each in metrics(finished, "rl")}
    (reward,) = watching.over_time("ray_pear_ray_rl_reward_mean", **window)
    assert {float(value) for _, value in reward["values"]} <= logged
    (state,) = watching.over_time("ray_pear_ray_run_state", **window)
    assert {int(value) for _, value in state["values"]} <= {0, 1, 2}
    assert reward["metric"]["run"] == state["metric"]["run"] == "small"


def test_what_is_not_fed_here_is_known_to_ray() -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    ours = {name for name in NOT_FED if not name.startswith("ray_pear_ray_")}
    assert {name.removeprefix("ray_") for name in ours} <= set(METRICS_GAUGES)
