"""A model folder that cannot be used is refused by what it lacks."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pear_ray.engines.model_files import (
    config_folder,
    max_positions,
    model_fingerprint,
    provenance,
    resolve_model,
    vocabulary_fingerprint,
)
from pear_ray.errors import ConfigError, InputError


def pickled_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("config.json"), "no config.json"),
        (without("tokenizer.json"), "no tokenizer"),
        (without("model.safetensors"), r"no \*\.safetensors weights"),
        (pickled_only, r"only pickled weights \(pytorch_model\.bin\)"),
        (without("chat_template.jinja"), "no chat template"),
    ],
)
def test_an_unusable_folder(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    assert resolve_model(str(folder)) == folder.resolve()
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        resolve_model(str(folder))
    assert str(folder) in str(caught.value)


def test_a_template_inside_the_tokenizer_config_is_enough(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    file = folder / "tokenizer_config.json"
    tree = json.loads(file.read_text(encoding="utf-8")) | {"chat_template": "{{ messages }}"}
    file.write_text(json.dumps(tree), encoding="utf-8")
    assert resolve_model(str(folder)) == folder.resolve()


def test_safetensors_beside_a_pickle_are_used(folder: Path) -> None:
    (folder / "training.pt").write_bytes(b"never read")
    assert resolve_model(str(folder)) == folder.resolve()


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model folder"):
        resolve_model(str(tmp_path / "absent"))


def test_a_config_is_enough_to_plan_with(folder: Path) -> None:
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    assert config_folder(str(folder)) == folder
    with pytest.raises(InputError, match=r"no \*\.safetensors weights"):
        resolve_model(str(folder))
    with pytest.raises(InputError, match="no such model folder; give one with a config"):
        config_folder(str(folder / "absent"))


def test_a_name_that_is_neither_folder_nor_on_the_hub() -> None:
    with pytest.raises(InputError, match="neither a folder here nor a model that the hub gave"):
        resolve_model("nobody-here/no-such-model")


def test_unknown_embedded_model() -> None:
    with pytest.raises(ConfigError, match="use embedded:student or embedded:teacher"):
        resolve_model("embedded:pupil")


def test_a_package_without_weights() -> None:
    with pytest.raises(InputError, match="no such package is installed"):
        resolve_model("gguf:no_such_package_anywhere")


def test_broken_json_is_named(folder: Path) -> None:
    (folder / "config.json").write_text('{"max_position', encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.json: not valid JSON"):
        max_positions(folder)
    (folder / "tokenizer.json").write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json: expected an object, got list"):
        vocabulary_fingerprint(folder)


def test_max_positions(folder: Path) -> None:
    assert max_positions(folder) == 256
    (folder / "config.json").write_text("{}", encoding="utf-8")
    assert max_positions(folder) is None


def test_vocabulary_differs_by_ids_and_by_added_tokens_only(folder: Path, student: Path) -> None:
    file = folder / "tokenizer.json"
    tree = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(tree | {"truncation": None}, indent=4), encoding="utf-8")
    assert vocabulary_fingerprint(folder) == vocabulary_fingerprint(student)
    vocab = tree["model"]["vocab"]
    swapped = vocab | {"a": vocab["b"], "b": vocab["a"]}
    file.write_text(json.dumps(tree | {"model": tree["model"] | {"vocab": swapped}}))
    assert vocabulary_fingerprint(folder) != vocabulary_fingerprint(student)
    file.write_text(json.dumps(tree | {"added_tokens": tree["added_tokens"][:-1]}))
    assert vocabulary_fingerprint(folder) != vocabulary_fingerprint(student)


def test_model_fingerprint_sees_one_byte(folder: Path, student: Path) -> None:
    assert model_fingerprint(folder) == model_fingerprint(student)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert model_fingerprint(folder) != model_fingerprint(student)


def test_provenance_says_what_a_score_was_made_with(folder: Path) -> None:
    found = provenance(folder)
    assert found["model"] == str(folder)
    assert (found["quantisation"], found["origin"]) == ("none", "")
    (folder / "origin.json").write_text('{"gguf": "model.Q4_1.gguf"}', encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "awq"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    changed = provenance(folder)
    assert (changed["quantisation"], changed["origin"]) == ("awq", "model.Q4_1.gguf")
    assert changed["template"] != found["template"]
    assert changed["vocabulary"] == found["vocabulary"]
    assert changed["fingerprint"] != found["fingerprint"]
