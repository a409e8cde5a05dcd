"""Bytes kept for backward, worked out by hand and counted from what autograd saves."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pear_ray.algorithms.logprobs import chosen_logprobs
from pear_ray.engines.batches import Row, collate
from pear_ray.engines.policy import Policy
from pear_ray.memory.activations import (
    LOGPROB_CHUNK_TOKENS,
    Microbatch,
    largest_microbatch,
    layer_bytes_per_token,
    saved_activations,
)
from pear_ray.memory.model_shape import read_shape

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
ROWS, WIDTH = 4, 64


def batch_of(shape: Any, *, tokens: int, width: int) -> int:
    batch = Microbatch(num_tokens=tokens, width=width, setting="")
    return sum(item.num_bytes for item in saved_activations(shape, batch, bytes_each=4))


def test_a_layer_by_hand(toy: Any) -> None:
    # norms 2 x (4 x 8 + 4), into products 2 x 4 x 4, attention (2 x 4 + 2 x 4) x 4 + 2 x 4,
    # MLP 4 x 6 x 4, a row of the mask 8 x 4
    assert layer_bytes_per_token(toy, bytes_each=4, width=8) == 72 + 32 + 72 + 96 + 32
    # without a mask keys and values of one head each, and no mask
    assert layer_bytes_per_token(toy, bytes_each=4, width=0) == 72 + 32 + 56 + 96


def test_a_microbatch_by_hand(toy: Any) -> None:
    # two layers, and 4 x (4 + 2 x 4) + 4 bytes of the last norm and the predicting states
    assert batch_of(toy, tokens=16, width=8) == 16 * (2 * 304 + 52)


def test_checkpointing_keeps_inputs_alone(toy: Any) -> None:
    batch = Microbatch(num_tokens=16, width=8, setting="")
    items = saved_activations(toy, batch, bytes_each=4, checkpointing=True)
    assert [item.num_bytes for item in items] == [16 * 2 * 4 * 4, 16 * 52]


@pytest.mark.parametrize(
    ("num_rows", "microbatch_tokens", "tokens", "width", "is_only"),
    [
        (8, 64, 64, 16, False),  # four of the longest rows
        (8, 24, 24, 12, False),  # one of the longest, or two of 12
        (1, 64, 16, 0, True),  # one row alone has no padding
        (3, 64, 48, 16, True),  # all there are
    ],
)
def test_largest_microbatch(
    num_rows: int, microbatch_tokens: int, tokens: int, width: int, is_only: int
) -> None:
    batch = largest_microbatch(
        microbatch_tokens=microbatch_tokens, max_model_len=16, num_rows=num_rows, setting="s"
    )
    assert (batch.num_tokens, batch.width, batch.is_only) == (tokens, width, is_only)


def test_the_chunk_is_that_of_the_log_probs() -> None:
    parameter = inspect.signature(chosen_logprobs).parameters["chunk_tokens"]
    assert parameter.default == LOGPROB_CHUNK_TOKENS


def saved_bytes(causal_lm: Any, lengths: list[int]) -> int:
    """Bytes of all that autograd saves, parameters left out, every storage once."""
    batch = collate(
        [Row([1] * length, [True] * length, {}) for length in lengths],
        pad_id=0,
        names=(),
        device=torch.device("cpu"),
    )
    parameters = {each.untyped_storage().data_ptr() for each in causal_lm.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # kept: its address stays taken
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs = Policy(causal_lm)(batch, temperature=1.0)
    assert logprobs.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Any]:
    def build(name: str, dtype: torch.dtype) -> Any:
        text = {"Gemma3": "Gemma3Text"}.get(name, name)
        config = getattr(transformers, f"{text}Config")(
            **SIZES, tie_word_embeddings=True, attn_implementation="sdpa"
        )
        config.save_pretrained(tmp_path)
        return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)

    return build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [1, 0])
@pytest.mark.parametrize(
    "name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3"]
)
def test_what_autograd_saves(
    make: Callable[..., Any], tmp_path: Path, name: str, padded: int, dtype: torch.dtype
) -> None:
    causal_lm = make(name, dtype)
    lengths = [WIDTH] * (ROWS - 1) + [WIDTH - padded]
    found = saved_bytes(causal_lm, lengths)
    batch = Microbatch(num_tokens=ROWS * WIDTH, width=WIDTH if padded else 0, setting="")
    shape = read_shape(tmp_path)
    assert shape.num_parameters == sum(each.numel() for each in causal_lm.parameters())
    items = saved_activations(shape, batch, bytes_each=dtype.itemsize)
    predicted = sum(item.num_bytes for item in items)
    # Ids, positions and rotary tables are left out of the formula.
    assert 0 <= found - predicted <= 0.02 * found
