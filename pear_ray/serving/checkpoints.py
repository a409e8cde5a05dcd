"""What `pear serve` is given, on disk: which folder is meant, and whether it can be served."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pear_ray.artifacts.manifest import UNFINISHED_FILE, read_manifest
from pear_ray.artifacts.run_dir import IDENTITY_FILE
from pear_ray.engines.model_files import resolve_model
from pear_ray.errors import ConfigError, InputError
from pear_ray.memory.headers import read_headers
from pear_ray.serving.settings import ServedAdapter, ServedModel

MODEL, ADAPTER = "model", "adapter"  # of a stage's folder
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in an adapter's file, as peft writes it
HALVES = (".lora_A.weight", ".lora_B.weight")
RECORD_FILE = "handover.json"  # engines.handover.record says so
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_RANK = 512  # vLLM's largest


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter that was found whole: its folder, its rank, and the base it was trained on."""

    folder: Path
    rank: int
    base: str


def served_models(
    checkpoints: Sequence[str], named: Sequence[str], adapters: Sequence[str]
) -> list[ServedModel]:
    """The models of a command line, each checked, with the adapters that go on them.

    Args:
        checkpoints: Locations; their names come from their folders.
        named: `NAME=LOCATION`.
        adapters: `NAME=FOLDER`, or `NAME=FOLDER@MODEL` for the served model that it goes on.

    Raises:
        ConfigError: No model, a name that cannot be one, or one given twice.
        InputError: A location that is no model, an adapter that is none or fits no served model.
    """
    found = [(default_name(each), each) for each in checkpoints]
    found += [_split(each, option="--name") for each in named]
    if not found:
        raise ConfigError("nothing to serve; give a CHECKPOINT, such as outputs/demo/rl")
    loras = [_split(each, option="--lora") for each in adapters]
    _check_names([name for name, _ in (*found, *loras)])
    models = [
        ServedModel(name=name, folder=str(checkpoint_folder(location))) for name, location in found
    ]
    return _with_adapters(models, loras)


def checkpoint_folder(location: str) -> Path:
    """The checked model folder of `location`: a run, a stage of one, a model, or `embedded:NAME`.

    Raises:
        InputError: It is not there, not finished, or not a model.
        HandoverError: It is not what its trainer exported.
    """
    folder = Path(location).expanduser()
    if (folder / ADAPTER_CONFIG).exists():
        raise InputError(
            f"{location}: an adapter, no model; serve the model that it is on, with --lora "
            f"NAME={location}"
        )
    if (folder / IDENTITY_FILE).exists():
        folder = _of_run(folder)
    if (folder / MODEL / "config.json").exists() or (folder / UNFINISHED_FILE).exists():
        _check_finished(folder)
        folder = folder / MODEL
    elif folder.is_dir() and read_manifest(folder):
        raise InputError(f"{location}: the stage {folder.name!r} leaves no model; serve rl or sft")
    found = resolve_model(str(folder) if folder.is_dir() else location)
    read_headers(found)  # a file that is cut off is an error here, not in an actor's log
    if (found / RECORD_FILE).exists():
        # Loads torch: what can be refused without it is refused by here.
        from pear_ray.engines.handover.files import check_files  # noqa: PLC0415

        check_files(found, found)
    return found


def default_name(location: str) -> str:
    """What a model is called where no name is given: `demo-rl` for outputs/demo/rl, and so on."""
    folder = Path(location).expanduser()
    if not folder.is_dir():
        return location.rpartition(":")[2].rpartition("/")[2]
    folder = folder.resolve()
    if folder.name == MODEL and (folder.parent.parent / IDENTITY_FILE).exists():
        folder = folder.parent
    if (folder / IDENTITY_FILE).exists():
        folder = folder / "rl"
    if (folder.parent / IDENTITY_FILE).exists():
        return f"{folder.parent.name}-{folder.name}"
    return folder.name


def adapter_files(location: str) -> AdapterFiles:
    """The checked adapter of `location`: a folder as peft writes it, or a stage's that has one.

    Raises:
        InputError: It is none, is pickled, or does what vLLM cannot.
    """
    folder = Path(location).expanduser()
    if (folder / ADAPTER / ADAPTER_CONFIG).exists():
        _check_finished(folder)
        folder = folder / ADAPTER
    folder = folder.resolve()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).exists():
            raise InputError(
                f"{location}: no {name}, so this is no adapter that can be served; give a folder "
                "as peft saves it, in safetensors (of a run: outputs/NAME/sft/adapter)"
            )
    config = _read_json(folder / ADAPTER_CONFIG)
    rank = config.get("r")
    odd = [key for key in ("use_dora", "modules_to_save", "rank_pattern") if config.get(key)]
    if odd or config.get("bias", "none") != "none":
        raise InputError(
            f"{location}: an adapter with {', '.join(odd) or 'bias'}, which vLLM does not serve; "
            "merge it into its model and serve that"
        )
    if not isinstance(rank, int) or not 0 < rank <= MAX_RANK:
        raise InputError(f"{location}: rank r={rank!r}; it must be 1 to {MAX_RANK}")
    return AdapterFiles(folder, rank, str(config.get("base_model_name_or_path") or ""))


def _with_adapters(
    models: Sequence[ServedModel], loras: Sequence[tuple[str, str]]
) -> list[ServedModel]:
    placed: dict[str, list[tuple[ServedAdapter, int]]] = {model.name: [] for model in models}
    for name, where in loras:
        location, _, wanted = where.rpartition("@") if "@" in where else (where, "", "")
        files = adapter_files(location)
        model = _base_of(name, files, models, wanted=wanted)
        _check_fits(name, files, model)
        adapter = ServedAdapter(name=name, folder=str(files.folder))
        placed[model.name].append((adapter, files.rank))
    return [
        model.model_copy(
            update={
                "adapters": [adapter for adapter, _ in placed[model.name]],
                "max_lora_rank": max((rank for _, rank in placed[model.name]), default=0),
            }
        )
        for model in models
    ]


def _base_of(
    name: str, files: AdapterFiles, models: Sequence[ServedModel], *, wanted: str
) -> ServedModel:
    """The model that an adapter was trained on, or the one that is asked for by name."""
    for model in models:
        if model.name == wanted or (not wanted and _same_folder(model.folder, files.base)):
            return model
    served = ", ".join(f"{model.name} ({model.folder})" for model in models)
    if wanted:
        raise ConfigError(f"--lora {name}=...@{wanted}: no such model is served, only {served}")
    raise InputError(
        f"--lora {name}={files.folder}: trained on {files.base or 'a model it does not name'}, and "
        f"served are {served}; serve that model too, or say which it goes on: "
        f"--lora {name}={files.folder}@{models[0].name}"
    )


def _check_fits(name: str, files: AdapterFiles, model: ServedModel) -> None:
    """See that each of an adapter's matrices has a weight of its shape in the model."""
    weights = read_headers(Path(model.folder))
    found = read_headers(files.folder)
    for tensor, header in found.items():
        half = next((each for each in HALVES if tensor.endswith(each)), None)
        weight = tensor.removeprefix(PREFIX).removesuffix(half or "") + ".weight"
        shape = weights[weight].shape if weight in weights else None
        # A is [rank, in] and B [out, rank], of a weight [out, in].
        side = 1 if half == HALVES[0] else 0
        if half is None or shape is None or shape[side] != header.shape[side]:
            raise InputError(
                f"--lora {name}={files.folder}: {tensor} {list(header.shape)} fits no weight of "
                f"{model.name} ({weight}: {list(shape) if shape else 'none'}); give the adapter's "
                "own model"
            )


def _of_run(folder: Path) -> Path:
    if read_manifest(folder / "rl"):
        return folder / "rl"
    instead = f"; serve {folder / 'sft'}" if read_manifest(folder / "sft") else ""
    raise InputError(f"{folder}: this run has no finished rl stage{instead or '; run it first'}")


def _check_finished(stage: Path) -> None:
    if read_manifest(stage) is None:
        raise InputError(
            f"{stage}: the stage is not finished (no manifest.json), so what is there may be half "
            "of a checkpoint; let `pear run` go on to its end, or serve another stage"
        )


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} cannot be a model's name; use letters, digits, `.`, `_` and `-`, 64 at "
                "most: --name NAME=CHECKPOINT"
            )
        if names.count(name) > 1:
            raise ConfigError(
                f"two models are called {name!r}; tell them apart: --name NAME=CHECKPOINT"
            )


def _split(text: str, *, option: str) -> tuple[str, str]:
    name, equals, location = text.partition("=")
    if not (name and equals and location):
        raise ConfigError(f"{option} {text!r}: write it as {option} NAME=FOLDER")
    return name, location


def _same_folder(one: str, other: str) -> bool:
    return bool(other) and Path(one).resolve() == Path(other).expanduser().resolve()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error}); save the adapter again") from error
    if not isinstance(tree, dict):
        raise InputError(f"{file}: expected an object, got {type(tree).__name__}")
    return tree
