"""What the `pear` command takes: its commands and their arguments. Imports nothing heavy."""

import argparse
import re
from pathlib import Path

from pear_ray import __version__
from pear_ray.records import ON_DEMAND_STAGES, STAGES

SHOWN_ROWS = 3  # by `pear inspect`
GPUS = ("h100", "h200", "a100", "l4")  # of memory.pace, which is not imported for --help
COMPARISON = "compare.html"
BYTES_OF = {
    f"{letter}{infix}B": base**power
    for infix, base in (("i", 1024), ("", 1000))
    for power, letter in enumerate("KMGT", start=1)
}


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    pear = argparse.ArgumentParser(
        prog="pear", description="From an offline corpus to an RL-tuned model on one Ray cluster."
    )
    pear.add_argument("--version", action="version", version=f"pear-ray {__version__}")
    commands = pear.add_subparsers(dest="command", required=True, metavar="COMMAND")
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
    status.add_argument("run_dir", metavar="RUN_DIR", help="a folder, or s3://BUCKET/FOLDER/NAME")
    _add_compare(commands)
    _add_jobs(commands)
    _add_serve(commands)
    _add_inspect(commands)
    doctor = commands.add_parser("doctor", help="check this machine and the installation")
    doctor.add_argument("--quick", action="store_true", help="do not start Ray and an engine")
    return pear


def _add_inspect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    inspect = commands.add_parser("inspect", help="what an artifact holds, token by token")
    inspect.add_argument(
        "artifact", metavar="ARTIFACT", help="a stage's folder, or a Parquet file; also on s3://"
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
    plan.add_argument(
        "--cluster",
        type=Path,
        metavar="FILE",
        help="a cluster file: which stages fit on which nodes, how long, and at what cost",
    )
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
    compare.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="folders, or s3://...")
    compare.add_argument("--out", type=Path, metavar="FILE.html", help=f"the page ({COMPARISON})")
    compare.add_argument(
        "--json", action="store_true", help="print the table for machines, and write no page"
    )


def _add_jobs(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    says = "run it as a job on a cluster that is there; again, where it was, if it ran before"
    submit = commands.add_parser("submit", help=says, description=says)
    _add_run(submit)
    what = submit.add_mutually_exclusive_group()
    stages = ("run", *STAGES, *ON_DEMAND_STAGES)
    what.add_argument("--stage", choices=stages, default="run", help="one stage only (all)")
    what.add_argument("--study", action="store_true", help="the file is a study's")
    submit.add_argument("--follow", action="store_true", help="write its log until it ends")
    submit.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME",
        help="a variable of this environment that the job gets, such as HF_TOKEN; may be given "
        "again",
    )
    jobs = commands.add_parser("jobs", help="the jobs of a cluster, and where each is")
    logs = commands.add_parser("logs", help="what a job has written")
    logs.add_argument("--follow", action="store_true", help="until it ends")
    stop = commands.add_parser("stop", help="have a job checkpoint and end")
    for command in (logs, stop):
        command.add_argument("job", metavar="RUN|ID", help="the newest job of a run, or its id")
    for command in (submit, jobs, logs, stop):
        command.add_argument(
            "--address",
            metavar="URL",
            help="of the dashboard (RAY_API_SERVER_ADDRESS, RAY_ADDRESS or this machine's)",
        )


def _add_serve(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    says = "checkpoints behind an OpenAI-compatible address"
    add = commands.add_parser("serve", help=says, description=says).add_argument
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help="a run, a stage of it, or a model")
    for option, metavar, of in (
        ("--name", "NAME=CHECKPOINT", "another model, by a name of your own"),
        ("--lora", "NAME=ADAPTER[@MODEL]", "an adapter, by a name of its own, on a served model"),
    ):
        add(option, action="append", default=[], metavar=metavar, help=f"{of}; may be given again")
    add("--host", default="127.0.0.1", help="where to listen; beyond loopback a key is needed")
    add("--port", type=_positive, default=8000, help="where to listen (8000)")
    add("--min-replicas", type=_positive, default=1, metavar="N", help="of each model (1)")
    add("--max-replicas", type=_positive, metavar="N", help="under load (as --min-replicas)")
    add("--tensor-parallel-size", type=_positive, default=1, metavar="N", help="GPUs of a replica")
    add("--device", choices=("cpu", "cuda"), help="cuda where this machine has a GPU")
    add("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, else bfloat16")
    add("--address", metavar="HOST:PORT", help="of a running Ray cluster, or auto; none starts one")
    add("--dry-run", action="store_true", help="check everything, write serve.yaml, start nothing")


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


def _positive(text: str) -> int:
    """An argument that is a whole number from 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
