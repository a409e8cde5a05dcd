"""The halves of RL apart: what rollouts are made of, and which of them a training takes up."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.artifacts.manifest import file_fingerprint, fingerprint, is_current
from pear_ray.artifacts.rollouts import FOLDER, saved_steps
from pear_ray.artifacts.tables import ROLLOUTS, read_table
from pear_ray.config.run import RunConfig
from pear_ray.errors import ArtifactError, InputError

# What of `rl` no rollout depends on; a key that is not among them is taken to matter.
TRAINING_ONLY = frozenset(
    {
        "optimizer",
        "lora",
        "rollouts_ahead",
        "updates_per_batch",
        "advantage",
        "loss",
        "reduction",
        "kl",
        "entropy_coefficient",
        "overlong",
        "mismatch_correction",
        "pass_at_k",
        "microbatch_tokens",
        "activation_checkpointing",
        "checkpoint_every",
        "colocation",
        "save_rollouts_every",
        "max_sync_gap",
        "mismatch_alert",
    }
)


def rollouts_fingerprint(config: RunConfig, inputs: Mapping[str, str]) -> str:
    """Identity of what `--rollouts-only` makes of the SFT artifact and problems named in `inputs`.

    A change of what only trains leaves it alone: the same rollouts serve several trainings.
    """
    tree = rl_settings(config)
    settings = {name: value for name, value in tree.items() if name not in TRAINING_ONLY}
    return fingerprint(stage="rl_rollouts", config=[settings, *_shared(config)], inputs=inputs)


def starting_settings(config: RunConfig) -> dict[str, object]:
    """What of `rl` the readiness report depends on: all but how long RL goes on."""
    return {name: value for name, value in rl_settings(config).items() if name != "num_steps"}


def rl_settings(config: RunConfig) -> dict[str, Any]:
    """The section `rl` as identities have it: less what came later and is not used.

    A run without it is what it was before there was any.
    """
    tree = config.rl.model_dump(mode="json")
    if not tree["activation_checkpointing"]:
        del tree["activation_checkpointing"]
    return tree


def replay_fingerprint(config: RunConfig, rollouts: Path, *, sft: str) -> str:
    """Identity of what `--train-only` makes of the SFT artifact and the folder `rollouts`.

    Raises:
        InputError: `rollouts` do not fit the run; see `rollout_files`.
        ArtifactError: One cannot be read.
    """
    files = rollout_files(rollouts, config)
    return fingerprint(
        stage="rl_train",
        config=[rl_settings(config), *_shared(config)],
        inputs={"sft": sft}
        | {str(number): file_fingerprint(file) for number, file in enumerate(files)},
    )


def find_rollouts(run_dir: Path, given: Path | None, *, current: str) -> Path:
    """The folder of step files to train on: `given`, or the run's own.

    Of those, what `--rollouts-only` left comes first, where it is complete and `current`; then what
    `pear rl` saved, of all its policies.

    Raises:
        InputError: `given` holds no rollouts.
        ArtifactError: The run has none.
    """
    if given is not None:
        for folder in (given, given / FOLDER):
            if saved_steps(folder):
                return folder.resolve()
        raise InputError(
            f"--rollouts {given}: no step-NNNNN.parquet is in it; give the folder of rollouts of a "
            "run, such as outputs/demo/rl/rollouts"
        )
    halves = run_dir / "rl_rollouts"
    if is_current(halves, current):
        return halves / FOLDER
    if saved_steps(run_dir / "rl" / FOLDER):
        return run_dir / "rl" / FOLDER
    raise ArtifactError(
        f"{run_dir}: has no rollouts to train on: rl_rollouts is missing, unfinished or of another "
        "config, and rl/rollouts is empty; run `pear rl RUN.yaml --rollouts-only` first, or give "
        "those of another run with --rollouts"
    )


def rollout_files(folder: Path, config: RunConfig) -> list[Path]:
    """The files that `rl.num_steps` steps train on, in order.

    Raises:
        InputError: There are too few of them, or one has other groups, or another temperature, than
            the run's settings say.
        ArtifactError: One cannot be read.
    """
    steps = saved_steps(folder)
    num_steps = config.rl.num_steps
    if len(steps) < num_steps:
        raise InputError(
            f"{folder}: holds the rollouts of {len(steps)} steps, and rl.num_steps={num_steps} "
            f"wants as many; set rl.num_steps={len(steps)}, or sample more"
        )
    files = list(steps.values())[:num_steps]
    for file in files:
        _check(file, config)
    return files


def _check(file: Path, config: RunConfig) -> None:
    rl = config.rl
    names = ["group", "sample_index", "temperature"]
    table = read_table(file, pa.schema([ROLLOUTS.field(name) for name in names]))
    if missing := set(ROLLOUTS.names) - set(pq.read_schema(file).names):
        raise ArtifactError(
            f"{file}: has no column {', '.join(sorted(missing))}; sample these rollouts again"
        )
    sizes = table.group_by("group").aggregate([("sample_index", "count")])
    found = (sizes.num_rows, set(sizes["sample_index_count"].to_pylist()))
    if found != (rl.prompts_per_step, {rl.group_size}):
        told = " or ".join(map(str, sorted(found[1]))) or "no"
        raise InputError(
            f"{file}: holds {found[0]} groups of {told} completions, and the run wants "
            f"rl.prompts_per_step={rl.prompts_per_step} of rl.group_size={rl.group_size}; set "
            "these two to what the rollouts are"
        )
    temperatures = table["temperature"].unique().to_pylist()
    if temperatures != [rl.temperature]:
        raise InputError(
            f"{file}: sampled at temperature {', '.join(map(str, temperatures))}, and "
            f"rl.temperature={rl.temperature} decides what log-probs are compared with; set it to "
            "the rollouts' own"
        )


def _shared(config: RunConfig) -> list[object]:
    return [config.models.dtype, config.models.max_model_len, config.seed]
