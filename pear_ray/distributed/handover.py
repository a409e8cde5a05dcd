"""The hand-over gate in front of every stage that takes up the SFT checkpoint for RL."""

from pathlib import Path

from pear_ray.config.run import RunConfig
from pear_ray.engines.handover.files import check_files
from pear_ray.engines.handover.record import RECORD_FILE
from pear_ray.engines.model_files import resolve_model
from pear_ray.telemetry.metrics_log import MetricsLog


def sft_checkpoint(config: RunConfig, run_dir: Path, *, log: MetricsLog) -> Path:
    """The folder of the SFT checkpoint, whose files have passed the gate.

    Called where RL begins and not where SFT ends: what was put there by hand, taken from another
    run or changed since comes by here too. What only a loaded model shows (log-probs of trainer and
    engine, completions that end) the workers look at, before their first step.

    Raises:
        HandoverError: It cannot be trained on; every difference is named.
    """
    folder = run_dir / "sft" / "model"
    source, note = check_files(folder, resolve_model(config.models.policy))
    if note:
        log.event("warning", f"{folder}: {note}")
    if source.record is None:
        log.event(
            "warning",
            f"{folder} has no {RECORD_FILE}: config, tokenizer and template were compared with "
            f"{source.name}, and its weights with nothing that trained them",
        )
    return folder
