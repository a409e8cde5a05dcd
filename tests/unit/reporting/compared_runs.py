"""Run folders as `pear sft` leaves them, with numbers worked out by hand."""

import json
from pathlib import Path

from synthetic_run import CONFIG, START, make_manifest

from pear_ray.artifacts.manifest import MANIFEST_FILE, UNFINISHED_FILE
from pear_ray.config.run import dump_run, validate_run
from pear_ray.telemetry.metrics_log import MetricsLog

NUM_STEPS = 20
PEAR = {"kind": "pear", "level": "token"}


def make_sft_run(run_dir: Path, *, nll=1.0, num_steps=NUM_STEPS, finished=True, **sft) -> Path:
    """A run whose plain train loss falls to `nll`, held-out loss 0.5 above, batch by batch."""
    run_dir.mkdir(parents=True)
    tree = json.loads(json.dumps(CONFIG))
    tree["name"] = run_dir.name
    tree["corpus"]["kind"] = "sampled"
    tree["sft"] |= {"heldout_rows": 8, "weights": {"kind": "uniform"}} | sft
    (run_dir / "config.yaml").write_text(dump_run(validate_run(tree, origin="test")))
    for stage in ("collect", "score"):
        make_manifest(run_dir / stage, 10, {"rows": 100})
        set_fingerprint(run_dir, stage, f"{stage}-of-all")
    if finished:
        make_manifest(run_dir / "sft", 90, {"steps": NUM_STEPS})
        set_fingerprint(run_dir, "sft", f"sft-of-{run_dir.name}")
    else:
        (run_dir / "sft").mkdir()
        unfinished = {"fingerprint": "f", "started": START}
        (run_dir / "sft" / UNFINISHED_FILE).write_text(json.dumps(unfinished))
    log = MetricsLog(run_dir, run=run_dir.name, stage="sft", attempt=1)
    for step in range(1, num_steps + 1):
        at = nll + (NUM_STEPS - step) / 10
        values = {
            "sft/nll": at,
            "sft/weighted_loss": 7777.0,
            "sft/grad_norm": 2 * at,
            "sft/ess_fraction": 0.5 + nll / 10,
            "sft/weight/mean": nll,
            "sft/tokens_per_s": 100.0 * step,
        }
        if step % 5 == 0:
            values |= {"sft/heldout/nll": at + 0.5, "sft/heldout/weighted_nll": at + 0.25}
        log.log(values, step=step, num_steps=NUM_STEPS)
    return run_dir


def set_fingerprint(run_dir: Path, stage: str, fingerprint: str) -> None:
    """Make the run's artifact of `stage` another one."""
    path = run_dir / stage / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": fingerprint}))


def make_evaluation(run_dir: Path, passes, *, num_samples=8) -> None:
    """`results.json` with pass@1 as (value, low, high) for each checkpoint."""
    checkpoints = [
        {
            "checkpoint": name,
            "policy_version": 0,
            "metrics": {"pass_at_1": dict(zip(("value", "low", "high"), each, strict=True))},
        }
        for name, each in passes.items()
    ]
    results = {"num_problems": 24, "num_samples": num_samples, "temperature": 1.0}
    results |= {"max_tokens": 96, "confidence": 0.95, "checkpoints": checkpoints}
    (run_dir / "evaluate").mkdir(exist_ok=True)
    (run_dir / "evaluate" / "results.json").write_text(json.dumps(results))
