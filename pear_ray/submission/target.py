"""What is to run on the cluster, checked before anything is sent. Imports no Ray."""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pear_ray.config.run import dump_run, load_run
from pear_ray.config.study_plan import load_study
from pear_ray.errors import ConfigError, InputError
from pear_ray.records import ON_DEMAND_STAGES, STAGES

WHOLE_RUN = "run"
STUDY = "study"
SENT_STAGES = (WHOLE_RUN, *STAGES, *ON_DEMAND_STAGES)
HASH_LENGTH = 12  # of hexadecimal digits: enough to tell configs of one name apart
ROOT_MARKS = (".git", "pyproject.toml")  # what a working tree has at its top


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A run, or a study, that is to run on a cluster.

    Attributes:
        name: Of the run or study: its folder's name.
        stage: `run` for all stages, `study`, or one stage.
        config_hash: Of the fully resolved config.
        output_dir: Where its folder goes, as the cluster's machines see it.
        root: Top of the working tree that is sent.
        entrypoint: The command, from the top of that tree.
        reads: Relative paths that the config names and that are there on this machine.
    """

    name: str
    stage: str
    config_hash: str
    output_dir: str
    root: Path
    entrypoint: str
    reads: tuple[str, ...]

    @property
    def metadata(self) -> dict[str, str]:
        """What the dashboard shows of the job, and what later commands know it by."""
        return {
            "job_name": self.name,
            "run": self.name,
            "stage": self.stage,
            "config": self.config_hash,
        }


def load_target(
    run_file: Path, overrides: Sequence[str], *, stage: str = WHOLE_RUN, is_study: bool = False
) -> Target:
    """Read and check the run file, or the study's, and say how it is run on a cluster.

    Raises:
        ConfigError: As `load_run`; or its output folder cannot be reached from every machine.
        InputError: The file lies in no working tree.
    """
    if is_study:
        plan = load_study(run_file, overrides)
        name, output_dir, stage = plan.study.name, plan.study.output_dir, STUDY
        config = plan.shared_run()
        text = plan.study.model_dump_json() + dump_run(config)
    else:
        config = load_run(run_file, overrides)
        name, output_dir = config.name, config.output_dir
        text = dump_run(config)
    _check_output_dir(output_dir)
    root = working_tree(run_file)
    return Target(
        name=name,
        stage=stage,
        config_hash=hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH],
        output_dir=output_dir,
        root=root,
        entrypoint=_entrypoint(root, run_file, overrides, stage),
        reads=tuple(sorted(_local_paths(json.loads(config.model_dump_json()), root))),
    )


def working_tree(run_file: Path) -> Path:
    """The folder that is sent: the nearest one around `run_file` with a .git or pyproject.toml.

    Raises:
        InputError: There is none.
    """
    for folder in run_file.resolve().parents:
        if any((folder / mark).exists() for mark in ROOT_MARKS):
            return folder
    raise InputError(
        f"{run_file}: no folder around it has a {' or a '.join(ROOT_MARKS)}, so what to send to "
        "the cluster is not known; put the run file into your working tree, e.g. jobs/runs/"
    )


def _check_output_dir(output_dir: str) -> None:
    if "://" in output_dir or Path(output_dir).expanduser().is_absolute():
        return
    raise ConfigError(
        f"output_dir={output_dir!r} is relative, and on a cluster that is a folder inside Ray's "
        "own copy of the working tree, which ends with it; give a path that every machine mounts, "
        "e.g. output_dir=/shared/outputs"
    )


def _entrypoint(root: Path, run_file: Path, overrides: Sequence[str], stage: str) -> str:
    """The command; without our `jobs/` in the tree, the one of the package that is installed."""
    script = root / "jobs" / f"{stage}.py"
    program = [f"jobs/{stage}.py"] if script.is_file() else ["-m", "pear_ray", stage]
    where = run_file.resolve().relative_to(root)
    return shlex.join(["python", *program, where.as_posix(), *overrides])


def _local_paths(tree: Any, root: Path) -> set[str]:
    """Every text in a config that is a relative path which is there."""
    if isinstance(tree, Mapping):
        return {path for value in tree.values() for path in _local_paths(value, root)}
    if isinstance(tree, list):
        return {path for value in tree for path in _local_paths(value, root)}
    if not isinstance(tree, str) or "/" not in tree or ":" in tree or tree.startswith(("/", "~")):
        return set()
    return {tree} if (root / tree).exists() else set()
