"""An engine's items on the toy model, worked out by hand."""

import dataclasses
from typing import Any

import pytest

from pear_ray.memory.engine import (
    EnginePlan,
    engine_reload,
    engine_resident,
    engine_sampling,
    engine_scoring,
    engine_shortage,
    kv_bytes_per_token,
)
from pear_ray.memory.items import GIB
from pear_ray.memory.model_shape import ModelShape


def engine(toy: ModelShape, **changes: Any) -> EnginePlan:
    given = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 16,
        "kv_cache_gib": 1,
        "gpu_memory_fraction": 0.5,
        "device_bytes": None,
        "num_sequences": 3,
    }
    return EnginePlan(shape=toy, **(given | changes))


def sizes(items: Any) -> dict[str, int]:
    return {item.name: item.num_bytes for item in items}


def test_what_stays(toy: ModelShape) -> None:
    assert sizes(engine_resident(engine(toy))) == {
        "engine's weights": 4 * 340,
        "packed copies of embedding and head": 2 * 4 * 40,
        "KV cache": GIB,
    }
    halves = sizes(engine_resident(engine(toy, dtype="bfloat16")))
    assert halves["engine's weights"] == 2 * 340


def test_keys_and_values_of_a_token(toy: ModelShape) -> None:
    assert kv_bytes_per_token(engine(toy)) == 2 * 2 * 2 * 4  # both, two layers, one head of 2


def test_scoring_a_chunk(toy: ModelShape) -> None:
    layers, logprobs = engine_scoring(engine(toy, chunk_tokens=8))
    kept = 130 * 3 * 16  # three rows of the greatest length
    assert layers.num_bytes == kept + 8 * (2 * 4 + 3 * 6) * 4
    assert logprobs.num_bytes == kept + 8 * 4 * 4 + 9 * 8 * 10


def test_bfloat16_on_cpu_casts_the_head_in_every_pass(toy: ModelShape) -> None:
    moments = {each.name: each for each in engine_sampling(engine(toy, dtype="bfloat16"))}
    found = sizes(moments["logits in the engine"].items)
    assert found["head cast to float32"] == 4 * 40
    assert found["logits as they are made"] == 4 * 3 * 10


def test_sampling_passes_are_as_wide_as_the_engine_allows(toy: ModelShape) -> None:
    layers, logprobs = engine_sampling(engine(toy))
    assert layers.num_bytes == 4096 * (2 * 4 + 3 * 6) * 4
    assert sizes(logprobs.items)["logits of the sequences"] == 9 * 3 * 10
    wide = engine(toy, max_model_len=5000, num_sequences=1000)
    layers, logprobs = engine_sampling(wide)
    assert layers.num_bytes == 5001 * (2 * 4 + 3 * 6) * 4
    assert sizes(logprobs.items)["logits of the sequences"] == 9 * 256 * 10


def test_a_reload_repacks_on_cpu(toy: ModelShape) -> None:
    assert sizes(engine_reload(engine(toy))) == {
        "engine's embedding while it is loaded again": 2 * 4 * 40
    }


def test_a_cache_for_less_than_one_sequence(toy: ModelShape) -> None:
    longest = GIB // 32 - 1  # scoring asks for one token more
    assert engine_shortage(engine(toy, max_model_len=longest)) is None
    shortage = engine_shortage(engine(toy, max_model_len=longest + 1))
    assert shortage is not None
    assert shortage.setting == "cluster.kv_cache_gib"


@pytest.mark.parametrize(("more", "is_short"), [(0, False), (-2, True)])
def test_a_share_of_a_gpu_for_less_than_one_sequence(
    toy: ModelShape, more: int, is_short: int
) -> None:
    # weights, a pass (its logits are more than its layers), one sequence and a token more
    needed = 4 * 340 + 8 * 16 + 720 + 17 * 32
    plan = engine(toy, device="cuda", chunk_tokens=8, device_bytes=2 * needed + more)
    [share] = engine_resident(plan)
    assert share.num_bytes == needed + more // 2
    assert bool(engine_shortage(plan)) == is_short


def test_devices_share_a_model_but_not_its_logits(toy: ModelShape) -> None:
    two_heads = dataclasses.replace(toy, num_key_value_heads=2)
    one, two = (engine(two_heads, chunk_tokens=8, tensor_parallel_size=n) for n in (1, 2))
    assert sizes(engine_resident(two))["engine's weights"] == 2 * 340
    assert kv_bytes_per_token(two) == kv_bytes_per_token(one) // 2
    assert engine_scoring(two)[1] == engine_scoring(one)[1]
    # a head cannot be split: both devices keep it
    assert kv_bytes_per_token(engine(toy, tensor_parallel_size=2)) == kv_bytes_per_token(
        engine(toy)
    )


def test_candidates_are_kept_in_parts(toy: ModelShape) -> None:
    def kept(**changes: Any) -> dict[str, int]:
        return sizes(engine_scoring(engine(toy, chunk_tokens=8, **changes))[1].items)

    few = kept(top_k=4)
    assert few["log-probs of a block, as vLLM keeps them"] == 130 * 3 * 16 * 5
    assert few["candidates of a block"] == 8 * 3 * 16 * 4
    many = kept(top_k=1000, num_sequences=1000)
    assert many["log-probs of a block, as vLLM keeps them"] == 130 * 2**21
