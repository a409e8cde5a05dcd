"""Model locations: what a config may name, where it is on disk, and whether it can be used."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pear_ray.artifacts.manifest import file_fingerprint, folder_fingerprint
from pear_ray.embedded.paths import embedded_path
from pear_ray.engines.gguf import ORIGIN_FILE, convert_gguf_package
from pear_ray.errors import ConfigError, InputError

EMBEDDED = "embedded:"
GGUF_PACKAGE = "gguf:"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def resolve_model(location: str) -> Path:
    """The checked folder that `location` names.

    Args:
        location: A folder; `embedded:student` or another that is shipped; `gguf:PACKAGE` for the
            GGUF file inside an installed Python package; or a hub name.

    Raises:
        InputError: There is no such model, or its folder cannot be used.
    """
    if location.startswith(EMBEDDED):
        folder = embedded_path(location.removeprefix(EMBEDDED))
    elif location.startswith(GGUF_PACKAGE):
        folder = convert_gguf_package(location.removeprefix(GGUF_PACKAGE))
    elif Path(location).expanduser().is_dir():
        folder = Path(location).expanduser().resolve()
    elif location.startswith((".", "/", "~")):
        raise InputError(
            f"{location}: no such model folder; give a folder with safetensors weights"
        )
    else:
        folder = _from_hub(location)
    check_model_folder(folder)
    return folder


def config_folder(location: str) -> Path:
    """The folder with the config.json that `location` names, whether or not its weights are there.

    Of a hub name no more than that file is downloaded.

    Raises:
        InputError: There is no such model.
    """
    if location.startswith((EMBEDDED, GGUF_PACKAGE)):
        return resolve_model(location)
    folder = Path(location).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if location.startswith((".", "/", "~")):
        raise InputError(f"{location}: no such model folder; give one with a config.json")
    import huggingface_hub  # noqa: PLC0415 - slow to import, and only hub names need it

    try:
        return Path(huggingface_hub.hf_hub_download(location, "config.json")).parent
    except (OSError, ValueError) as error:
        raise _hub_error(location, error) from error


def resolve_behavior(behavior: str | dict[str, str] | None) -> dict[str, Path]:
    """The checked folder of each source's behavior model; the source `*` is any.

    Of a corpus that brings all its log-probs there is none.

    Raises:
        InputError: As `resolve_model`; the message names the source.
    """
    if behavior is None:
        return {}
    if isinstance(behavior, str):
        return {"*": resolve_model(behavior)}
    found = {}
    for source, location in behavior.items():
        try:
            found[source] = resolve_model(location)
        except (ConfigError, InputError) as error:
            raise type(error)(f"source {source!r}: {error}") from error
    return found


def by_source_name(behavior: Mapping[str, Path]) -> dict[str, Path]:
    """Behavior models by the source that what they sample is of: any one's is the model's name."""
    return {model.name if source == "*" else source: model for source, model in behavior.items()}


def check_model_folder(folder: Path) -> None:
    """See that `folder` holds a config, a tokenizer with a chat template, and safetensors weights.

    Raises:
        InputError: Something is missing, the weights are pickles, which are never loaded, or the
            tokenizer gives ids that the model has no embeddings for.
    """
    names = {path.name for path in folder.iterdir()}
    if "config.json" not in names:
        raise InputError(f"{folder}: no config.json, so this is not a Hugging Face model folder")
    if not any(name.endswith(".safetensors") for name in names):
        pickled = sorted(name for name in names if name.endswith(PICKLED_SUFFIXES))
        if pickled:
            raise InputError(
                f"{folder}: only pickled weights ({', '.join(pickled)}), which can run code when "
                "loaded; convert them with save_pretrained(..., safe_serialization=True)"
            )
        raise InputError(f"{folder}: no *.safetensors weights; save the model there first")
    if not names.intersection(TOKENIZER_FILES):
        raise InputError(
            f"{folder}: no tokenizer ({', '.join(TOKENIZER_FILES)}); save the model's tokenizer "
            "into the same folder"
        )
    if "chat_template.jinja" not in names and not _template_inside(folder):
        raise InputError(
            f"{folder}: the tokenizer has no chat template, so prompts cannot be written; "
            "add chat_template.jinja beside it"
        )
    _check_ids(folder)


def max_positions(folder: Path) -> int | None:
    """Longest sequence that the model's own config allows, where it says."""
    return _read_json(folder / "config.json").get("max_position_embeddings")


def vocab_size(folder: Path) -> int:
    """How many ids the model of `folder` has embeddings for.

    Raises:
        InputError: Its config does not say.
    """
    size = _read_json(folder / "config.json").get("vocab_size")
    if not isinstance(size, int):
        raise InputError(f"{folder}/config.json: no vocab_size; this is not a language model")
    return size


def num_attention_heads(folder: Path) -> int | None:
    """Attention heads of the model of `folder`, where its config says."""
    return _read_json(folder / "config.json").get("num_attention_heads")


def vocabulary_fingerprint(folder: Path) -> str:
    """Identity of a tokenizer: two models with the same one give every text the same ids."""
    file = next(folder / name for name in TOKENIZER_FILES if (folder / name).exists())
    if file.suffix != ".json":
        return file.read_bytes().hex()[:64]
    tree = _read_json(file)
    return json.dumps([tree.get("model", tree), tree.get("added_tokens")], sort_keys=True)


def provenance(folder: Path) -> dict[str, str]:
    """What a score was made with: identities of weights, tokenizer and template, quantisation.

    `origin` names the quantised file that the weights were made of, where they were.
    """
    quantisation = _read_json(folder / "config.json").get("quantization_config") or {}
    template, origin = folder / "chat_template.jinja", folder / ORIGIN_FILE
    return {
        "model": str(folder),
        "fingerprint": model_fingerprint(folder),
        "vocabulary": hashlib.sha256(vocabulary_fingerprint(folder).encode()).hexdigest()[:20],
        "template": file_fingerprint(
            template if template.exists() else folder / "tokenizer_config.json"
        ),
        "quantisation": str(quantisation.get("quant_method", "none")),
        "origin": _read_json(origin).get("gguf", "") if origin.exists() else "",
    }


def model_fingerprint(folder: Path) -> str:
    """Identity of a model: weights, config, tokenizer and template."""
    return folder_fingerprint(folder)


def _check_ids(folder: Path) -> None:
    """See that every piece of text has ids that the model knows.

    Added tokens beyond the embeddings are let through here: published models have such (Gemma 3's
    `<image_soft_token>` at 1B), and no text holds one. `check_prompt_ids` sees those that matter.
    """
    config, tokenizer = _read_json(folder / "config.json"), folder / "tokenizer.json"
    size = config.get("vocab_size")
    if not isinstance(size, int):
        return
    for name in ("eos_token_id", "pad_token_id"):
        found = config.get(name)
        for token_id in found if isinstance(found, list) else [found]:
            if isinstance(token_id, int) and token_id >= size:
                raise InputError(
                    f"{folder}/config.json: {name}={token_id} is outside of vocab_size={size}; "
                    "give it an id that the model has an embedding for"
                )
    if tokenizer.exists():
        largest = _largest_id(_read_json(tokenizer).get("model") or {})
        if largest >= size:
            raise InputError(
                f"{folder}: the tokenizer has ids up to {largest}, the model embeddings for {size} "
                "(config.json: vocab_size): they are not of one model; save the model's own "
                "tokenizer beside it, or resize its embeddings"
            )


def _largest_id(model: dict[str, Any]) -> int:
    """Of a tokenizer.json's own vocabulary, without added tokens; -1 of an empty one."""
    vocab = model.get("vocab") or {}
    # A dict of ids, or (Unigram) a list in the order of ids.
    return max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab) - 1


def check_prompt_ids(prompts: Iterable[Sequence[int]], folder: Path, **special: int) -> None:
    """See that the model of `folder` has embeddings for the ids of `prompts` and for `special`.

    Raises:
        InputError: It has not; the message says which id.
    """
    size = vocab_size(folder)
    largest = special | {"a prompt's largest id": max(map(max, prompts), default=0)}
    for name, token_id in largest.items():
        if token_id >= size:
            raise InputError(
                f"{folder}: {name} is {token_id}, and the model has embeddings for {size} ids "
                "(config.json: vocab_size); resize its embeddings to its tokenizer's length, or "
                "take a tokenizer and template without added tokens"
            )


def _template_inside(folder: Path) -> bool:
    file = folder / "tokenizer_config.json"
    return file.exists() and "chat_template" in _read_json(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise InputError(f"{file}: not valid JSON ({error}); save the model again") from error
    if not isinstance(tree, dict):
        raise InputError(f"{file}: expected an object, got {type(tree).__name__}")
    return tree


def _from_hub(name: str) -> Path:
    import huggingface_hub  # noqa: PLC0415 - slow to import, and only hub names need it

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
            )
        )
    except (OSError, ValueError) as error:
        raise _hub_error(name, error) from error


def _hub_error(name: str, error: Exception) -> InputError:
    # huggingface_hub's own (offline, missing repository, bad name) are OSErrors or ValueErrors.
    return InputError(
        f"{name!r}: neither a folder here nor a model that the hub gave "
        f"({type(error).__name__}); check the name, the network and HF_HUB_OFFLINE"
    )
