"""ready: the hand-over gate, and what RL would make of the SFT checkpoint, on one page."""

import json
from pathlib import Path

from pear_ray.artifacts import manifest
from pear_ray.artifacts.rollouts import FOLDER, saved_steps
from pear_ray.config.run import RunConfig
from pear_ray.distributed.loops import MEASURED_FILE, ready_loop
from pear_ray.distributed.loops import READY_STAGE as STAGE
from pear_ray.distributed.rl_group import run_from_sft
from pear_ray.distributed.rl_probe import run_probe
from pear_ray.distributed.session import ray_session
from pear_ray.engines.model_files import resolve_model
from pear_ray.errors import StopRequested
from pear_ray.reporting.readiness.advice import readiness_advice
from pear_ray.reporting.readiness.numbers import readiness
from pear_ray.reporting.readiness.page import write_readiness
from pear_ray.tasks.problem_sets import with_absolute_paths
from pear_ray.telemetry.metrics_log import MetricsLog


def run(config: RunConfig, run_dir: Path, *, attempt: int) -> manifest.Manifest:
    """Write `ready/ready.html`, `ready.json`, the rollouts and the manifest.

    Steps that are there are passed over.

    Raises:
        HandoverError: The SFT checkpoint cannot be trained on.
        TrainingError: The worker group failed more often than allowed.
        RewardError: Too many rewards could not be computed.
        StopRequested: SIGTERM came; the steps done are there.
    """
    stage_dir = run_dir / STAGE
    log = MetricsLog(run_dir, run=config.name, stage=STAGE, attempt=attempt)
    with ray_session(config.cluster):
        model = run_from_sft(
            ready_loop,
            config,
            run_dir,
            log=log,
            stage=STAGE,
            attempt=attempt,
            base=resolve_model(config.models.policy),
        )
        files = saved_steps(stage_dir / FOLDER)
        if len(files) < config.ready.num_steps or not (stage_dir / MEASURED_FILE).exists():
            raise StopRequested(
                f"{STAGE} stopped after {len(files)} of {config.ready.num_steps} steps, as SIGTERM "
                "asked; run the same command again to go on"
            )
        measured = json.loads((stage_dir / MEASURED_FILE).read_text(encoding="utf-8"))
        if (probe := config.ready.probe) is not None:
            told, folder = with_absolute_paths(config), stage_dir / "probe"
            measured["probe"] = run_probe(told, probe, folder, model, attempt=attempt)
    found = readiness(list(files.values()), config, measured)
    write_readiness(found, stage_dir, config=config, measured=measured)
    for each in readiness_advice(found):
        log.event("warning", f"{each.headline}: {each.message}")
    counts = {"steps": len(files), "prompts": found.num_prompts}
    return manifest.complete(stage_dir, counts=counts | {"rollouts": found.num_completions})
