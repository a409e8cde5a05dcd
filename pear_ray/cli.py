"""The `pear` command. Importing it and asking for help load no torch, ray or vllm."""

import argparse
import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pear_ray.arguments import COMPARISON, parser
from pear_ray.config.run import RunConfig, load_run
from pear_ray.config.study_plan import load_study
from pear_ray.errors import DISK_FULL, ConfigError, PearRayError

PAGES = {
    "diagnose": "diagnose/diagnose.html",
    "ready": "ready/ready.html",
}  # what to look at, where it is not the report
JOB_COMMANDS = ("submit", "jobs", "logs", "stop")
INTERRUPTED = 130  # the shell's convention for a Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code.

    0: done. 1: a stage failed. 2: the config or an input cannot be used, and nothing was started.
    """
    parsed = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        return _dispatch(parsed)
    except PearRayError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.stderr.write(f"{DISK_FULL} ({error.filename}); free some and run the same command\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to go on\n")
        return INTERRUPTED


def _dispatch(parsed: argparse.Namespace) -> int:
    if parsed.command == "doctor":
        return importlib.import_module("pear_ray.doctor").run_doctor(quick=parsed.quick)
    if parsed.command in {"study", "status", "compare", "serve", *JOB_COMMANDS}:
        return _beyond_one_run(parsed)
    if parsed.command == "inspect":
        _quieten()
        inspection = importlib.import_module("pear_ray.inspection")
        reading = importlib.import_module("pear_ray.artifacts.stored.reading")
        return inspection.run_inspect(
            reading.see_artifact(parsed.artifact),
            num_rows=parsed.rows,
            step=parsed.step,
            html=parsed.html,
        )
    config = load_run(parsed.run_file, parsed.overrides)
    if parsed.command == "plan":
        return _plan(parsed, config)
    only = None if parsed.command == "run" else parsed.stage
    rollouts = _rollouts(parsed)
    if parsed.dry_run:
        return _dry_run(config, only=only, reuse_from=parsed.reuse, rollouts=rollouts)
    _quieten()
    pipeline = importlib.import_module("pear_ray.pipeline")
    run_dir = pipeline.run(config, only=only, reuse_from=parsed.reuse, rollouts=rollouts)
    if only == "rl_rollouts":
        summary = importlib.import_module("pear_ray.reporting.rollouts.summary")
        sys.stdout.write(summary.summary_text(run_dir / only))
    if only == "ready":
        readiness = importlib.import_module("pear_ray.reporting.readiness.page")
        sys.stdout.write(readiness.readiness_text(run_dir / only))
    page = PAGES.get(parsed.stage, "report/report.html")
    sys.stdout.write(f"run folder: {run_dir}\n")
    if (run_dir / page).exists():
        sys.stdout.write(f"report:     {run_dir / page}\n")
    return 0


def _plan(parsed: argparse.Namespace, config: RunConfig) -> int:
    durations = importlib.import_module("pear_ray.memory.durations")
    workload = durations.Workload(
        num_rows=parsed.rows,
        row_tokens=parsed.row_tokens or config.models.max_model_len // 2,
        completion_tokens=parsed.completion_tokens,
    )
    if parsed.cluster is None:
        plan = importlib.import_module("pear_ray.plan")
        return plan.run_plan(
            config,
            device_bytes=parsed.device_memory,
            device=parsed.device,
            workload=workload,
            as_json=parsed.json,
        )
    for option, value in (("--device", parsed.device), ("--device-memory", parsed.device_memory)):
        if value is not None:
            raise ConfigError(
                f"{option} and --cluster {parsed.cluster}: the file says what GPUs there are; "
                f"leave {option} out"
            )
    cluster_plan = importlib.import_module("pear_ray.cluster_plan")
    return cluster_plan.run_cluster_plan(
        config, parsed.cluster, workload=workload, as_json=parsed.json
    )


def _study(parsed: argparse.Namespace) -> int:
    plan = load_study(parsed.study_file, parsed.overrides)
    study = importlib.import_module("pear_ray.study.runner")
    if parsed.dry_run:
        sys.stdout.write(study.describe(plan))
        return 0
    _quieten()
    study_dir = study.study_path(plan) if parsed.report else study.run_study(plan)
    page = importlib.import_module("pear_ray.reporting.study.page")
    written = page.write_study_report(study_dir)
    sys.stdout.write(
        f"{page.study_text(study_dir)}study folder: {study_dir}\nreport:       {written}\n"
    )
    return 0


def _beyond_one_run(parsed: argparse.Namespace) -> int:
    if parsed.command in JOB_COMMANDS:
        return _on_cluster(parsed)
    if parsed.command == "study":
        return _study(parsed)
    if parsed.command == "status":
        return _status(parsed.run_dir)
    if parsed.command == "serve":
        return _serve(parsed)
    return _compare(parsed.run_dirs, out=parsed.out, as_json=parsed.json)


def _on_cluster(parsed: argparse.Namespace) -> int:
    address = parsed.address
    if parsed.command == "submit":
        # Before Ray is imported, which takes longer than to say what is wrong with the file.
        target = importlib.import_module("pear_ray.submission.target").load_target(
            parsed.run_file, parsed.overrides, stage=parsed.stage, is_study=parsed.study
        )
        commands = importlib.import_module("pear_ray.submission.commands")
        return commands.submit(target, address=address, follow_it=parsed.follow, secrets=parsed.env)
    commands = importlib.import_module("pear_ray.submission.commands")
    if parsed.command == "jobs":
        return commands.list_jobs(address=address)
    if parsed.command == "logs":
        return commands.logs(parsed.job, address=address, follow_it=parsed.follow)
    return commands.stop(parsed.job, address=address)


def _serve(parsed: argparse.Namespace) -> int:
    _quieten()
    checks = importlib.import_module("pear_ray.serving.order")
    order = checks.ServeOrder(
        checkpoints=parsed.checkpoints,
        named=parsed.name,
        adapters=parsed.lora,
        host=parsed.host,
        port=parsed.port,
        min_replicas=parsed.min_replicas,
        max_replicas=parsed.max_replicas,
        tensor_parallel_size=parsed.tensor_parallel_size,
        device=parsed.device,
        dtype=parsed.dtype,
        address=parsed.address,
    )
    settings = checks.check_order(order)
    if parsed.dry_run:
        production = importlib.import_module("pear_ray.serving.production")
        file = production.write_serve_yaml(settings, host=order.host, port=order.port)
        sys.stdout.write(f"checked: {', '.join(settings.names)}\nwritten: {file}\n")
        return 0
    if checks.is_local(order):
        os.environ.update(checks.local_environment(order))
    return importlib.import_module("pear_ray.serving.start").run_serve(settings, order)


def _status(location: str) -> int:
    from rich.console import Console

    from pear_ray.artifacts.stored.location import is_uri, without_query
    from pear_ray.artifacts.stored.reading import see_run
    from pear_ray.telemetry.status import LOCK_FILE, process_alive, render_status

    seen = see_run(location)
    alive, place = process_alive(seen.path / LOCK_FILE), ""
    if is_uri(location):
        alive, place = seen.is_driven, without_query(location)
    Console().print(render_status(seen.path, alive=alive, place=place))
    return 0


def _compare(locations: Sequence[str], *, out: Path | None, as_json: bool) -> int:
    reading = importlib.import_module("pear_ray.artifacts.stored.reading")
    run_dirs = [reading.see_artifact(location) for location in locations]
    compare_page = importlib.import_module("pear_ray.reporting.comparison.page")
    if as_json:
        sys.stdout.write(compare_page.comparison_json(run_dirs))
    if out or not as_json:
        page = out or Path(COMPARISON)
        compare_page.write_comparison(run_dirs, page)
        sys.stderr.write(f"comparison: {page}\n")
    return 0


def _dry_run(
    config: RunConfig, *, only: str | None, reuse_from: Sequence[Path], rollouts: Path | None
) -> int:
    dry_run = importlib.import_module("pear_ray.dry_run")
    text = dry_run.describe(config, only=only, reuse_from=reuse_from, rollouts=rollouts)
    sys.stdout.write(text)
    return 0


def _rollouts(parsed: argparse.Namespace) -> Path | None:
    """What `pear rl --train-only` is to train on, where that is said."""
    if parsed.command != "rl" or parsed.rollouts is None:
        return None
    if parsed.stage != "rl_train":
        raise ConfigError(
            f"--rollouts {parsed.rollouts}: only `pear rl RUN.yaml --train-only` trains on saved "
            "rollouts; add that flag, or leave --rollouts out"
        )
    return parsed.rollouts


def _quieten() -> None:
    """Keep library chatter off the live view; what a variable already says stays."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    sys.exit(main())
