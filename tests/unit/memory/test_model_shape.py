"""Parameters counted from a config by hand, from headers, and refused where neither does."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_model import TOY

from pear_ray.embedded.paths import embedded_path
from pear_ray.errors import InputError
from pear_ray.memory.headers import read_headers
from pear_ray.memory.model_shape import ModelShape, read_shape

QWEN3_0_6B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(tree: dict[str, Any], **tensors: tuple[int, ...]) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(tree), encoding="utf-8")
        if tensors:
            write_safetensors(tmp_path / "model.safetensors", tensors)
        return tmp_path

    return write


def write_safetensors(file: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A file with a header only: its tensors' data is never read."""
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors.items():
        size = 2
        for each in shape:
            size *= each
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)


def test_a_toy_by_hand(toy: ModelShape) -> None:
    # queries and output 2 x 4 x 4, keys and values 2 x 4 x 2, MLP 3 x 4 x 6, norms 2 x 4
    assert toy.layer_parameters == 32 + 16 + 72 + 8
    assert toy.num_parameters == 2 * 10 * 4 + 2 * 128 + 4
    assert toy.outside_parameters == 84
    assert (toy.query_size, toy.key_size) == (4, 2)
    assert toy.estimated == ""


def test_qwen3_0_6b(write: Callable[..., Path]) -> None:
    assert read_shape(write(QWEN3_0_6B)).num_parameters == 596_049_920


def test_qwen2_0_5b_has_biases(write: Callable[..., Path]) -> None:
    tree = QWEN3_0_6B | {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    assert read_shape(write(tree)).num_parameters == 494_032_768


def test_llama_3_8b(write: Callable[..., Path]) -> None:
    tree = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    shape = read_shape(write(tree))
    assert shape.num_parameters == 8_030_261_248
    assert (shape.head_dim, shape.is_tied) == (128, False)


def test_gemmas_defaults(write: Callable[..., Path]) -> None:
    tree = TOY | {"model_type": "gemma2"}
    del tree["head_dim"], tree["tie_word_embeddings"]
    shape = read_shape(write(tree))
    assert (shape.head_dim, shape.is_tied, shape.num_norms) == (256, True, 4)


def test_the_embedded_student_as_its_file_has_it() -> None:
    folder = embedded_path("student")
    in_file = sum(header.num_elements for header in read_headers(folder).values())
    shape = read_shape(folder)
    assert shape.num_parameters == in_file == 386_400
    assert shape.estimated == ""


def toy_tensors(**more: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    layers = {f"model.layers.{n}.all": (128,) for n in range(2)}
    return {"model.embed_tokens.weight": (10, 4), "model.norm.weight": (4,), **layers, **more}


def test_headers_count_before_the_config(write: Callable[..., Path]) -> None:
    folder = write(TOY, **toy_tensors(**{"lm_head.weight": (10, 4)}))
    assert read_shape(folder).estimated == ""
    folder = write(TOY, **toy_tensors(**{"lm_head.weight": (10, 4), "extra": (7,)}))
    shape = read_shape(folder)
    assert shape.num_parameters == 340 + 7
    assert "hold 347 parameters, a llama of these sizes has 340" in shape.estimated


def test_a_tied_head_in_the_file_counts_once(write: Callable[..., Path]) -> None:
    tree = TOY | {"tie_word_embeddings": True}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": (1,)}
    folder = write(tree, **toy_tensors(**{"lm_head.weight": (10, 4)}, **buffer))
    shape = read_shape(folder)
    assert (shape.num_parameters, shape.estimated) == (300, "")


def test_another_family_is_counted_from_headers(write: Callable[..., Path]) -> None:
    tree = TOY | {"model_type": "phi3"}
    shape = read_shape(write(tree, **toy_tensors()))
    assert (shape.num_parameters, shape.layer_parameters) == (300, 128)
    assert "model_type 'phi3' is taken for a dense decoder" in shape.estimated


def test_a_language_model_beside_a_vision_tower(write: Callable[..., Path]) -> None:
    tree = {"model_type": "gemma3", "text_config": TOY | {"model_type": "gemma3_text"}}
    assert read_shape(write(tree)).num_norms == 4


def test_a_quantised_models_weights_are_its_files(write: Callable[..., Path]) -> None:
    tree = TOY | {"quantization_config": {"quant_method": "fp8"}}
    shape = read_shape(write(tree, packed=(50,)))
    assert (shape.num_parameters, shape.quantised_bytes) == (340, 100)
    assert shape.estimated.startswith("quantised")


def test_shards_are_those_of_the_index(write: Callable[..., Path]) -> None:
    folder = write(TOY)
    write_safetensors(folder / "a.safetensors", {"one": (3,)})
    write_safetensors(folder / "b.safetensors", {"two": (4,)})
    write_safetensors(folder / "consolidated.safetensors", {"one": (3,), "two": (4,)})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"one": "a.safetensors", "two": "b.safetensors"}}))
    assert sorted(read_headers(folder)) == ["one", "two"]
    (folder / "b.safetensors").unlink()
    assert read_headers(folder) == {}  # a download that is not complete says nothing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is None, wanted a whole number above 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"intermediate_size": [6, 6]}, r"intermediate_size is \[6, 6\]"),
        ({"model_type": "mixtral"}, "'mixtral' is not one of llama, mistral, .* put its safe"),
    ],
)
def test_what_cannot_be_counted(
    write: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_shape(write(TOY | changes))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 not safetensors at all", b"\x02" + 7 * b"\0"])
def test_a_file_that_is_not_safetensors(write: Callable[..., Path], data: bytes) -> None:
    folder = write(TOY)
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=r"model\.safetensors: "):
        read_shape(folder)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        read_shape(tmp_path)
