"""Write Grafana's dashboard and Kubernetes' alert rules; `--check` only says if they are current.

A panel is six lines here and fifty in Grafana's JSON, of which a reader wants the six.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pear_ray.telemetry.gauges import RUN_STATES, STAGE_STATES

MONITORING = Path(__file__).parents[1] / "cluster" / "monitoring"
DASHBOARD = MONITORING / "grafana" / "dashboards" / "pear_ray.json"
KUBERNETES_RULES = MONITORING / "kuberay" / "prometheus_rule.yaml"
COLUMNS = 24  # of Grafana's grid
HEIGHTS = {"stat": 5, "state-timeline": 6, "timeseries": 8}
COLORS = {
    "waiting": "text",
    "running": "blue",
    "finished": "green",
    "done": "green",
    "skipped": "semi-dark-green",
    "failed": "red",
    "stopped": "yellow",
    "silent": "orange",
    "dead": "dark-red",
}
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A panel.

    Attributes:
        text: What it says and what is wrong when it looks wrong, in a sentence or two.
        queries: PromQL by legend; `@` stands for the chosen runs, and `{{tag}}` for a tag's value.
        unit: Grafana's name of it.
        kind: `timeseries`, `stat` or `state-timeline`.
        width: In columns.
        bound: Where a line is drawn, and beyond which it is red; `is_minimum` says on which side.
        states: The words of a state's numbers.
    """

    title: str
    text: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    bound: float | None = None
    is_minimum: bool = False
    states: Sequence[str] = ()
    is_stacked: bool = False


def of_run(metric: str, *, by: str = "run", only: str = "") -> str:
    """The query of one of our gauges: a series per value of the tags `by`, of the chosen runs."""
    return f'max by ({by}) (ray_pear_ray_{metric}{{run=~"$run"{only}}})'


RUNS = (
    Panel(
        title="Run",
        text="What the run is doing, in the word of `pear status`. Silent: no news for five "
        "minutes. Dead: its driver is gone without a word.",
        queries={"{{run}}": of_run("run_state")},
        kind="stat",
        states=RUN_STATES,
    ),
    Panel(
        title="Stages done",
        text="Share of the run's stages that are done, the running one by its steps. Stages "
        "differ in length: time is in the next panel.",
        queries={"{{run}}": of_run("run_done_fraction")},
        unit="percentunit",
        kind="stat",
    ),
    Panel(
        title="Left of the running stage",
        text="The ETA of `pear status`: the steps left at the median pace of the last ones.",
        queries={"{{run}} {{stage}}": of_run("stage_eta_s", by="run, stage")},
        unit="s",
        kind="stat",
    ),
    Panel(
        title="Stages",
        text="When each stage ran and how it ended.",
        queries={"{{run}} {{stage}}": of_run("stage_state", by="run, stage")},
        kind="state-timeline",
        width=16,
        states=STAGE_STATES,
    ),
    Panel(
        title="Warnings",
        text="Warnings since the driver started, and metrics of the last step that are no finite"
        " numbers. `pear status` has the sentences.",
        queries={
            "{{run}}": of_run("run_warnings"),
            "{{run}} {{stage}} not finite": of_run("stage_not_finite", by="run, stage"),
        },
        kind="stat",
    ),
    Panel(
        title="Step",
        text="Share of the stage's steps that is done. A stage that was resumed begins at its "
        "last checkpoint.",
        queries={
            "{{run}} {{stage}}": f"{of_run('stage_step', by='run, stage')} / "
            f"({of_run('stage_steps', by='run, stage')} > 0)"
        },
        unit="percentunit",
    ),
    Panel(
        title="Silence and unsaved work",
        text="Seconds since the run's last news, and seconds of work that a lost node would "
        "cost. The first should stay near the time of a step, the second below that of "
        "checkpoint_every steps.",
        queries={
            "{{run}} silent": of_run("run_silent_s"),
            "{{run}} {{stage}} unsaved": of_run("stage_unsaved_s", by="run, stage"),
        },
        unit="s",
    ),
    Panel(
        title="Tokens per second",
        text="As each stage counts them: collected, scored, trained or sampled tokens.",
        queries={"{{run}} {{stage}}": of_run("stage_tokens_per_s", by="run, stage")},
    ),
)
SFT = (
    Panel(
        title="SFT loss",
        text="The weighted loss that is trained, and the plain one beside it, nats per token. A "
        "plain one that rises while the weighted one falls is the weights' choice, not a "
        "fault.",
        queries={
            "{{run}} weighted": of_run("sft_weighted_loss"),
            "{{run}} plain": of_run("sft_nll"),
        },
    ),
    Panel(
        title="SFT effective sample size",
        text="Of PEAR's weights, over the step's tokens and within sequences. Below 0.2 few "
        "tokens decide the gradient.",
        queries={
            "{{run}} tokens": of_run("sft_ess_fraction"),
            "{{run}} within sequences": of_run("sft_sequence_ess_fraction"),
        },
        unit="percentunit",
        bound=0.2,
        is_minimum=True,
    ),
    Panel(
        title="SFT clip fractions",
        text="Tokens whose log-ratio is beyond its clip, and whose summed log-weight is at its "
        "floor (they do not train) or ceiling.",
        queries={
            "{{run}} ratio low": of_run("sft_log_ratio_clip_low_fraction"),
            "{{run}} ratio high": of_run("sft_log_ratio_clip_high_fraction"),
            "{{run}} weight floor": of_run("sft_log_weight_floor_fraction"),
            "{{run}} weight ceiling": of_run("sft_log_weight_ceiling_fraction"),
        },
        unit="percentunit",
    ),
)
RL = (
    Panel(
        title="Reward",
        text="Mean reward of the step's rollouts, and the share that is correct.",
        queries={
            "{{run}} reward": of_run("rl_reward_mean"),
            "{{run}} correct": of_run("rl_correct_fraction"),
        },
    ),
    Panel(
        title="pass@k",
        text="On the evaluation's problems, while SFT and RL train (`pass_at_k.every`) and of "
        "each checkpoint that `evaluate` has done. Reward that rises without it is another "
        "problem's.",
        queries={
            "{{run}} sft pass@{{k}}": of_run("sft_eval_pass_at_k", by="run, k"),
            "{{run}} rl pass@{{k}}": of_run("rl_eval_pass_at_k", by="run, k"),
            "{{run}} {{suite}} pass@{{k}}": of_run("eval_pass_at_k", by="run, suite, k"),
        },
        unit="percentunit",
    ),
    Panel(
        title="Rollouts that teach nothing",
        text="Groups whose outcomes all agree, completions that were cut off, rewards that could"
        " not be computed.",
        queries={
            "{{run}} degenerate": of_run("rl_degenerate_group_fraction"),
            "{{run}} truncated": of_run("rl_truncated_fraction"),
            "{{run}} errored": of_run("rl_errored_fraction"),
        },
        unit="percentunit",
    ),
    Panel(
        title="RL clip fractions",
        text="Tokens that train whose ratio is clipped below and above. With one update per "
        "batch they are near 0; a rise says that the policy moves faster than its rollouts.",
        queries={
            "{{run}} low": of_run("rl_clip_fraction_low"),
            "{{run}} high": of_run("rl_clip_fraction_high"),
        },
        unit="percentunit",
    ),
    Panel(
        title="Sampler and trainer",
        text="Mean difference of their log-probs of the same tokens, and the gap right after the"
        " last weight sync, nats per token. Above 0.01 the numerics are wrong, not the "
        "learning.",
        queries={
            "{{run}} mean gap": of_run("rl_mismatch_mean_gap"),
            "{{run}} sync gap": of_run("rl_sync_gap"),
        },
        bound=0.01,
    ),
    Panel(
        title="Worth of the rollouts",
        text="Effective sample size of the trainer's probabilities over the sampler's, and of "
        "the correction's weights. 1 where both agree.",
        queries={
            "{{run}} rollouts": of_run("rl_mismatch_ess_fraction"),
            "{{run}} correction": of_run("rl_correction_ess_fraction"),
        },
        unit="percentunit",
        bound=0.8,
        is_minimum=True,
    ),
    Panel(
        title="Completion length and entropy",
        text="Tokens per completion, and the policy's entropy in nats per token. An entropy that"
        " falls to nothing has stopped exploring.",
        queries={
            "{{run}} length": of_run("rl_completion_length_mean"),
            "{{run}} entropy": of_run("rl_entropy"),
        },
    ),
    Panel(
        title="Gradient norm",
        text="Before clipping. A jump comes before a loss that goes astray.",
        queries={
            "{{run}} sft": of_run("sft_grad_norm"),
            "{{run}} rl": of_run("rl_grad_norm"),
        },
    ),
    Panel(
        title="Seconds of an RL step",
        text="By phase, of the slowest rank. What grows is what to look at: sample with the "
        "length of completions, reward with the verifier.",
        queries={
            "{{run}} {{phase}}": of_run(
                "time_s",
                by="run, phase",
                only=',phase=~"sample|reward|wake_trainer|train|sync|save"',
            )
        },
        unit="s",
        is_stacked=True,
    ),
)
MACHINES = (
    Panel(
        title="Memory ledger",
        text="Held at the end of each phase of an RL step by the fullest rank: of a GPU all that"
        " is taken, on a CPU the worker's resident memory. `pear plan` says what each phase"
        " should take.",
        queries={"{{run}} {{phase}}": of_run("memory_gib", by="run, phase")},
        unit="gbytes",
    ),
    Panel(
        title="GPU use",
        text="Of every GPU of the cluster. Low while sampling: too few sequences at once. Low "
        "while training: microbatches too small.",
        queries={"{{instance}} {{GpuIndex}}": "ray_node_gpus_utilization"},
        unit="percent",
    ),
    Panel(
        title="GPU memory",
        text="Share that is taken, by whomever. Near 1 it runs out at the next longer row.",
        queries={
            "{{instance}} {{GpuIndex}}": "ray_node_gram_used / "
            "(ray_node_gram_used + ray_node_gram_available)"
        },
        unit="percentunit",
        bound=0.98,
    ),
    Panel(
        title="CPU use",
        text="Of every node. At 100 % while GPUs wait, the verifiers or the tokenizer are too few.",
        queries={"{{instance}}": "ray_node_cpu_utilization"},
        unit="percent",
    ),
    Panel(
        title="Node memory",
        text="Share that is in use. From 0.95 on Ray ends workers.",
        queries={"{{instance}}": "ray_node_mem_used / ray_node_mem_total"},
        unit="percentunit",
        bound=0.93,
    ),
    Panel(
        title="Object store and disk",
        text="Bytes in Ray's object store, and the share of the disk that is used. From 95 % on "
        "Ray spills no more.",
        queries={
            "{{instance}} object store": "ray_object_store_used_memory",
            "{{instance}} disk free": "ray_node_disk_free",
        },
        unit="bytes",
    ),
)
ROWS = {"Runs": RUNS, "SFT": SFT, "RL": RL, "Memory and machines": MACHINES}


def main(arguments: list[str]) -> int:
    """Write or check both files; the exit code."""
    texts = {DASHBOARD: dashboard_text(), KUBERNETES_RULES: kubernetes_text()}
    if arguments == ["--check"]:
        stale = [
            str(path)
            for path, text in texts.items()
            if not path.exists() or path.read_text(encoding="utf-8") != text
        ]
        if stale:
            mend = ".venv/bin/python scripts/make_dashboard.py"
            print(f"{', '.join(stale)}: not current; mend: {mend}", file=sys.stderr)
        return int(bool(stale))
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
    return 0


def dashboard_text() -> str:
    """Grafana's JSON of the dashboard, as of schema version 39 (Grafana 11)."""
    tree = {
        "uid": "pear-ray",
        "title": "pear_ray",
        "description": "Runs, training and machines. Written by scripts/make_dashboard.py.",
        "tags": ["pear_ray", "ray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource_variable(), _run_variable()]},
        "panels": list(_placed()),
    }
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def kubernetes_text() -> str:
    """The alert rules as the Prometheus operator takes them."""
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text(encoding="utf-8"))
    tree = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "pear-ray", "labels": {"release": "prometheus"}},
        "spec": rules,
    }
    head = "# alerts.yaml for the Prometheus operator; written by scripts/make_dashboard.py.\n"
    return head + yaml.safe_dump(tree, sort_keys=False, width=100)


def _placed() -> Iterator[dict[str, Any]]:
    """Every row and panel, with its number and its place."""
    number, top = 0, 0
    for title, panels in ROWS.items():
        number += 1
        where = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
        yield {"id": number, "type": "row", "title": title, "gridPos": where, "panels": []}
        top, left, height = top + 1, 0, 0
        for panel in panels:
            if left + panel.width > COLUMNS:
                top, left, height = top + height, 0, 0
            number += 1
            height = max(height, HEIGHTS[panel.kind])
            where = {"x": left, "y": top, "w": panel.width, "h": HEIGHTS[panel.kind]}
            yield {"id": number, **_panel(panel), "gridPos": where}
            left += panel.width
        top += height


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": DATASOURCE,
        "targets": [
            {"refId": chr(ord("A") + place), "expr": query, "legendFormat": legend}
            for place, (legend, query) in enumerate(panel.queries.items())
        ],
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _options(panel),
    }


def _field(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.bound is not None:
        below, above = ("red", "green") if panel.is_minimum else ("green", "red")
        steps = [{"color": below, "value": None}, {"color": above, "value": panel.bound}]
    field: dict[str, Any] = {
        "unit": panel.unit,
        "thresholds": {"mode": "absolute", "steps": steps},
        "mappings": [_mapping(panel.states)] if panel.states else [],
    }
    if panel.kind == "timeseries":
        field["custom"] = {
            "fillOpacity": 20 if panel.is_stacked else 0,
            "stacking": {"mode": "normal" if panel.is_stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "off" if panel.bound is None else "line"},
            "spanNulls": 60_000,  # milliseconds: a missed scrape is no gap
        }
    return field


def _mapping(states: Sequence[str]) -> dict[str, Any]:
    words = {
        str(number): {"text": str(word), "color": COLORS[word], "index": number}
        for number, word in enumerate(states)
    }
    return {"type": "value", "options": words}


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        return {
            "colorMode": "background" if panel.states else "value",
            "graphMode": "none",
            "reduceOptions": {"calcs": ["lastNotNull"], "values": False},
            "textMode": "value_and_name",
        }
    if panel.kind == "state-timeline":
        return {"showValue": "never", "mergeValues": True, "rowHeight": 0.8}
    return {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}


def _datasource_variable() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "current": {"text": "Prometheus", "value": "prometheus"},
    }


def _run_variable() -> dict[str, Any]:
    return {
        "name": "run",
        "label": "run",
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": "label_values(ray_pear_ray_run_state, run)", "refId": "runs"},
        "refresh": 2,  # when the time range changes: runs come and go
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
