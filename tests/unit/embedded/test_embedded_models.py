"""The shipped folders: small, complete, loadable without pickle, and as quality.json says."""

import hashlib
import json
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from pear_ray.embedded import EMBEDDED_NAMES, embedded_path
from pear_ray.errors import ConfigError

MAX_TOTAL_BYTES = 5_000_000
FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
PACKAGE = embedded_path("student").parent


def quality() -> dict:
    return json.loads((PACKAGE / "quality.json").read_text())


def test_names() -> None:
    assert embedded_path("embedded:teacher") == embedded_path("teacher") == PACKAGE / "teacher"
    with pytest.raises(ConfigError, match=r"`embedded:pupil`; use embedded:student or"):
        embedded_path("embedded:pupil")


@pytest.mark.parametrize("name", EMBEDDED_NAMES)
def test_a_folder_has_these_files_and_no_pickle(name: str) -> None:
    assert {path.name for path in embedded_path(name).iterdir()} == FILES


def test_both_models_are_small() -> None:
    sizes = [f.stat().st_size for name in EMBEDDED_NAMES for f in embedded_path(name).iterdir()]
    assert sum(sizes) < MAX_TOTAL_BYTES


@pytest.mark.parametrize("name", EMBEDDED_NAMES)
def test_quality_is_of_these_weights(name: str) -> None:
    weights = (embedded_path(name) / "model.safetensors").read_bytes()
    assert quality()["models"][name]["sha256"] == hashlib.sha256(weights).hexdigest()


def test_the_teacher_plays_the_demonstration_game_and_the_student_barely_does() -> None:
    student, teacher = (quality()["models"][name]["games"]["chain_sum"] for name in EMBEDDED_NAMES)
    assert teacher["pass_at_1"] > 0.5
    assert 0.01 < student["pass_at_1"] < 0.1 < student["pass_at_8"] < 0.5


@pytest.mark.parametrize("name", EMBEDDED_NAMES)
def test_the_model_is_qwen3_in_float32_with_tied_embeddings(name: str) -> None:
    folder = embedded_path(name)
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.tie_word_embeddings) == ("qwen3", True)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - safe_open has no `in`
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    assert {str(p.dtype) for p in model.parameters()} == {"torch.float32"}
    count = sum(p.numel() for p in model.parameters())
    assert count == quality()["models"][name]["num_parameters"]


def test_both_have_one_tokenizer() -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        texts = {Path(embedded_path(name) / file).read_text() for name in EMBEDDED_NAMES}
        assert len(texts) == 1


@pytest.mark.parametrize("name", EMBEDDED_NAMES)
def test_no_sampling_default_is_shipped(name: str) -> None:
    # An engine would take a top-k from here, and behavior log-probs would not be the model's own.
    generation = json.loads((embedded_path(name) / "generation_config.json").read_text())
    assert set(generation) == {"eos_token_id", "pad_token_id"}
