"""A few steps of RL with each of several seeds, for the readiness report."""

import json
import shutil
from pathlib import Path

from pear_ray.artifacts.run_dir import write_json
from pear_ray.config.ready import ProbeConfig
from pear_ray.config.run import RunConfig
from pear_ray.distributed.loops import rl_loop
from pear_ray.distributed.train_group import run_train_group
from pear_ray.telemetry.metrics_log import latest_by_step, read_metrics

PROBE_FILE = "probe.json"


def run_probe(
    config: RunConfig, probe: ProbeConfig, folder: Path, model: Path, *, attempt: int
) -> dict[int, list[dict[str, float]]]:
    """Metrics of every step by seed; a seed that is done already is not run again.

    Each seed is `rl` as it is, in a run's folder of its own, of which only `probe.json` and the
    metrics stay.

    Raises:
        PearRayError: As in the stage `rl`.
    """
    found: dict[int, list[dict[str, float]]] = {}
    for seed in probe.seeds:
        run_dir = folder / f"seed-{seed}"
        if not (run_dir / PROBE_FILE).exists():
            stage_dir = run_dir / "rl"
            stage_dir.mkdir(parents=True, exist_ok=True)
            run_train_group(
                rl_loop,
                {
                    "config": probe_config(config, probe, seed=seed),
                    "run_dir": run_dir,
                    "attempt": attempt,
                    "model": model,
                },
                cluster=config.cluster,
                stage_dir=stage_dir,
            )
            records = latest_by_step(read_metrics(run_dir / "metrics.jsonl"), "rl")
            steps = [record.metrics for record in records if record.step]
            write_json(run_dir / PROBE_FILE, steps)
            shutil.rmtree(stage_dir)
        found[seed] = json.loads((run_dir / PROBE_FILE).read_text(encoding="utf-8"))
    return found


def probe_config(config: RunConfig, probe: ProbeConfig, *, seed: int) -> RunConfig:
    """The run, short, with another seed, and without what only costs time."""
    short = {
        "num_steps": probe.num_steps,
        "checkpoint_every": probe.num_steps,
        "pass_at_k": None,
        "save_rollouts_every": 0,
    }
    rl = config.rl.model_copy(update=short)
    return config.model_copy(update={"seed": seed, "rl": rl})
