"""Each alert speaks of what it is there for, and of nothing else: Prometheus' own promtool says."""

import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_server import MONITORING, program

LASTING = 20  # minutes
# Of each alert: the series of a bad run or node, and of a good one. `{}` is where its label goes.
CASES = {
    "PearRunFailed": (["run_state{} 3"], ["run_state{} 2"]),
    "PearDriverGone": (["run_state{} 6"], ["run_state{} 5"]),
    "PearRunStalled": (
        ["run_silent_s{} 400", "stage_step_s{} 30"],
        ["run_silent_s{} 400", "stage_step_s{} 100"],  # its steps take long
    ),
    "PearRunStalled while starting": (["run_silent_s{} 1900"], ["run_silent_s{} 1700"]),
    "PearCheckpointOld": (["stage_unsaved_s{} 3700"], ["stage_unsaved_s{} 3500"]),
    "PearNotFinite": (["stage_not_finite{} 1"], ["stage_not_finite{} 0"]),
    "PearEssLow": (["sft_ess_fraction{} 0.1"], ["sft_ess_fraction{} 0.3"]),
    "PearMismatchHigh": (
        ["rl_mismatch_mean_gap{} 0.02", "rl_policy_lag{} 0"],
        ["rl_mismatch_mean_gap{} 0.02", "rl_policy_lag{} 1"],  # learnt since
    ),
    "PearMismatchEssLow": (["rl_mismatch_ess_fraction{} 0.5"], ["rl_mismatch_ess_fraction{} 1"]),
    "PearRewardErrors": (["rl_errored_fraction{} 0.06"], ["rl_errored_fraction{} 0.04"]),
    "PearTruncated": (["rl_truncated_fraction{} 0.4"], ["rl_truncated_fraction{} 0.2"]),
    "PearNoSignal": (
        ["rl_degenerate_group_fraction{} 0.95"],
        ["rl_degenerate_group_fraction{} 0.8"],
    ),
    "PearGpuMemoryFull": (
        ["ray_node_gram_used{} 79", "ray_node_gram_available{} 1"],
        ["ray_node_gram_used{} 70", "ray_node_gram_available{} 10"],
    ),
    "PearNodeMemoryFull": (
        ["ray_node_mem_used{} 95", "ray_node_mem_total{} 100"],
        ["ray_node_mem_used{} 90", "ray_node_mem_total{} 100"],
    ),
    "PearDiskFull": (
        ["ray_node_disk_utilization_percentage{} 91"],
        ["ray_node_disk_utilization_percentage{} 89"],
    ),
    "PearNodeNotScraped": (["up{} 0"], ["up{} 1"]),
}
RULES = MONITORING / "alerts.yaml"


def series(entry: str, where: str) -> dict[str, str]:
    """A series of `where` that keeps one value."""
    name, value = entry.split("{} ")
    if name == "up" or name.startswith("ray_"):
        label = f'{{instance="{where}", job="ray"}}'
    else:
        name, label = f"ray_pear_ray_{name}", f'{{run="{where}"}}'
    return {"series": name + label, "values": f"{value}x{LASTING}"}


def case(name: str) -> dict[str, object]:
    """What promtool is to check of an alert: that at the end it speaks of the bad one alone."""
    alert, (bad, good) = name.split(maxsplit=1)[0], CASES[name]
    inputs = [series(one, "bad") for one in bad] + [series(one, "good") for one in good]
    label = "run" if "run=" in inputs[0]["series"] else "instance"
    firing = f'count by ({label}) (ALERTS{{alertname="{alert}", alertstate="firing"}})'
    found = [{"labels": f'{{{label}="bad"}}', "value": 1}]
    return {
        "name": name,
        "interval": "1m",
        "input_series": inputs,
        "promql_expr_test": [
            {"expr": firing, "eval_time": f"{LASTING}m", "exp_samples": found},
            # Of all that is wrong here, only this alert speaks.
            {"expr": "count(count by (alertname) (ALERTS))", "eval_time": f"{LASTING}m"}
            | {"exp_samples": [{"labels": "{}", "value": 1}]},
        ],
    }


def test_there_is_a_case_for_every_alert() -> None:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    named = dict.fromkeys(name.split()[0] for name in CASES)
    assert list(named) == [rule["alert"] for group in groups for rule in group["rules"]]


def test_rules_and_configuration_are_prometheus_own() -> None:
    for kind, path in (("rules", RULES), ("config", MONITORING / "prometheus.yaml")):
        checked = subprocess.run(
            [program("promtool"), "check", kind, str(path)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_alert_speaks_of_the_bad_alone(tmp_path: Path) -> None:
    cases = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [case(name) for name in CASES],
    }
    path = tmp_path / "cases.yaml"
    path.write_text(yaml.safe_dump(cases), encoding="utf-8")
    done = subprocess.run(
        [program("promtool"), "test", "rules", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        pytest.fail(done.stdout + done.stderr)
