"""The `pear` command. Importing it and asking for help load no torch, ray or vllm."""

import argparse
import errno
import importlib
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pear_ray import __version__
from pear_ray.config.run import RunConfig, load_run
from pear_ray.config.study_plan import load_study
from pear_ray.errors import DISK_FULL, ConfigError, PearRayError
from pear_ray.records import ON_DEMAND_STAGES, STAGES

COMPARISON = "compare.html"
SHOWN_ROWS = 3  # by `pear inspect`
PAGES = {
    "diagnose": "diagnose/diagnose.html",
    "ready": "ready/ready.html",
}  # what to look at, where it is not the report
GPUS = ("h100", "h200", "a100", "l4")  # of memory.pace, which is not imported for --help
BYTES_OF = {
    f"{letter}{infix}B": base**power
    for infix, base in (("i", 1024), ("", 1000))
    for power, letter in enumerate("KMGT", start=1)
}
INTERRUPTED = 130  # the shell's convention for a Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code.

    0: done. 1: a stage failed. 2: the config or an input cannot be used, and nothing was started.
    """
    parsed = _parser().parse_args(arguments)
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
    if parsed.command in {"study", "status", "compare"}:
        return _beyond_one_run(parsed)
    if parsed.command == "inspect":
        _quieten()
        inspection = importlib.import_module("pear_ray.inspection")
        return inspection.run_inspect(
            parsed.artifact, num_rows=parsed.rows, step=parsed.step, html=parsed.html
        )
    config = load_run(parsed.run_file, parsed.overrides)
    if parsed.command == "plan":
        plan = importlib.import_module("pear_ray.plan")
        durations = importlib.import_module("pear_ray.memory.durations")
        return plan.run_plan(
            config,
            device_bytes=parsed.device_memory,
            device=parsed.device,
            workload=durations.Workload(
                num_rows=parsed.rows,
                row_tokens=parsed.row_tokens or config.models.max_model_len // 2,
                completion_tokens=parsed.completion_tokens,
            ),
            as_json=parsed.json,
        )
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
    if parsed.command == "study":
        return _study(parsed)
    if parsed.command == "status":
        return _status(parsed.run_dir)
    return _compare(parsed.run_dirs, out=parsed.out, as_json=parsed.json)


def _status(run_dir: Path) -> int:
    from rich.console import Console

    from pear_ray.telemetry.status import render_status

    Console().print(render_status(run_dir))
    return 0


def _compare(run_dirs: Sequence[Path], *, out: Path | None, as_json: bool) -> int:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pear", description="From an offline corpus to an RL-tuned model on one Ray cluster."
    )
    parser.add_argument("--version", action="version", version=f"pear-ray {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    helps = {
        "run": "all stages in order, passing over what is complete and current",
        "collect": "the corpus: sampled from the behavior model, or read from a file",
        "score": "behavior log-probs of the corpus's tokens",
        "sft": "PEAR-weighted supervised fine-tuning",
        "rl": "GRPO from the SFT checkpoint",
        "evaluate": "pass@k of every checkpoint",
        "report": "one HTML file of what the run did",
        "diagnose": "before training: what PEAR would do with the scored corpus",
        "ready": "before RL: the hand-over gate, and what RL would make of the SFT checkpoint",
    }
    for name in ("run", *STAGES, *ON_DEMAND_STAGES):
        command = commands.add_parser(name, help=helps[name], description=helps[name])
        _add_run(command)
        command.add_argument(
            "--dry-run", action="store_true", help="check everything, print the plan, start nothing"
        )
        command.add_argument(
            "--reuse",
            type=Path,
            action="append",
            default=[],
            metavar="RUN_DIR",
            help="take stages from there that are complete and of the same settings and inputs; "
            "may be given again",
        )
        command.set_defaults(stage=name)
        if name == "rl":
            _add_halves(command)
    _add_plan(commands)
    _add_study(commands)
    status = commands.add_parser("status", help="where a run is, from any terminal")
    status.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    _add_compare(commands)
    inspect = commands.add_parser("inspect", help="what an artifact holds, token by token")
    inspect.add_argument(
        "artifact", type=Path, metavar="ARTIFACT", help="a stage's folder, or a Parquet file"
    )
    inspect.add_argument(
        "--rows",
        type=_count,
        default=SHOWN_ROWS,
        metavar="N",
        help=f"rows to show, or groups of rollouts ({SHOWN_ROWS})",
    )
    inspect.add_argument(
        "--step", type=_count, metavar="N", help="of rollouts, the step to show (the last)"
    )
    inspect.add_argument("--html", type=Path, metavar="FILE", help="write the same as one page")
    doctor = commands.add_parser("doctor", help="check this machine and the installation")
    doctor.add_argument("--quick", action="store_true", help="do not start Ray and an engine")
    return parser


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    says = "what each phase will take of a device's memory and of time, and what mends the former"
    plan = commands.add_parser("plan", help=says, description=says)
    _add_run(plan)
    plan.add_argument(
        "--device-memory",
        type=_num_bytes,
        metavar="SIZE",
        help="of a GPU, such as 80GiB; on CPU, of one worker (this machine's share of it)",
    )
    plan.add_argument("--device", choices=GPUS, help="the GPU, for times and memory")
    for option, metavar, of in (
        ("--rows", "N", "rows of the corpus"),
        ("--row-tokens", "N", "mean tokens of a row (half of models.max_model_len)"),
        ("--completion-tokens", "N", "mean tokens of a sampled completion (half of max_tokens)"),
    ):
        plan.add_argument(option, type=_count, metavar=metavar, help=of)
    plan.add_argument("--json", action="store_true", help="for machines")


def _add_study(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    says = "several SFTs with the same RL, over seeds and with controls: which ends best"
    study = commands.add_parser("study", help=says, description=says)
    study.add_argument("study_file", type=Path, metavar="STUDY.yaml")
    study.add_argument("overrides", nargs="*", metavar="key=value", help="such as seeds=[1,2]")
    what = study.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="show its runs, start nothing")
    what.add_argument(
        "--report", action="store_true", help="only write the report of what is done so far"
    )


def _add_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    says = "several runs on one page: what differs in their settings, how they end, their curves"
    compare = commands.add_parser("compare", help=says, description=says)
    compare.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    compare.add_argument("--out", type=Path, metavar="FILE.html", help=f"the page ({COMPARISON})")
    compare.add_argument(
        "--json", action="store_true", help="print the table for machines, and write no page"
    )


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_file", type=Path, metavar="RUN.yaml")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as sft.num_epochs=2"
    )


def _add_halves(command: argparse.ArgumentParser) -> None:
    half = command.add_mutually_exclusive_group()
    for flag, stage, says in (
        (
            "--rollouts-only",
            "rl_rollouts",
            "sample and reward num_steps batches, and train nothing",
        ),
        ("--train-only", "rl_train", "train on saved rollouts, and start no engine"),
    ):
        half.add_argument(flag, dest="stage", action="store_const", const=stage, help=says)
    command.add_argument(
        "--rollouts",
        type=Path,
        metavar="FOLDER",
        help="with --train-only: where they are (those of --rollouts-only, or else of `pear rl`)",
    )


def _num_bytes(text: str) -> int:
    """An argument that is a size: a number with a unit."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]i?B)", text)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it as 80GiB or 24GB")
    return round(float(found[1]) * BYTES_OF[found[2]])


def _count(text: str) -> int:
    """An argument that counts something: 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rows; use 0 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
