"""A trainer's moments on the toy model, worked out by hand."""

from typing import Any

import pytest

from pear_ray.config.lora import LoraConfig
from pear_ray.embedded.paths import embedded_path
from pear_ray.engines.lora import adapt
from pear_ray.engines.policy import load_policy
from pear_ray.memory.activations import Microbatch
from pear_ray.memory.adapters import adapter_parameters
from pear_ray.memory.items import Moment
from pear_ray.memory.model_shape import ModelShape, read_shape
from pear_ray.memory.trainer_plan import TrainerPlan
from pear_ray.memory.training import trainer_moments

STATE = 680 + 1360  # 4 and 8 bytes x 340 parameters / 2
GRADIENTS = 680
ROOT = 4 * 84  # both embeddings and the last norm
SAVED = 16 * 2 * 240 + 16 * 36  # test_activations.py
STEP = STATE + GRADIENTS + ROOT + SAVED


def moments(toy: ModelShape, **changes: Any) -> dict[str, Moment]:
    batch = Microbatch(num_tokens=16, setting="sft.microbatch_tokens")
    given = {"num_trainers": 2, "batch": batch, "device": "cpu", "dtype": "float32"} | changes
    return {each.name: each for each in trainer_moments(TrainerPlan(shape=toy, **given))}


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        ("loading and sharding", 4 * 340 + 680),
        # last hidden states, and the chunk's logits twice
        ("log-probs, forward", STEP + 16 * 16 + 8 * 16 * 10),
        # the head's gradient, that of the states, and the chunk's logits once
        ("log-probs, backward", STEP + 160 + 16 * 16 + 4 * 16 * 10),
        # the head's gradient, a layer five times, (2 x 6 + 2 x 4) x 4 bytes for each token
        ("a layer, backward", STEP + 160 + 5 * 4 * 128 + 16 * 80),
        ("the optimizer step", STATE + GRADIENTS),  # fused: no temporaries
        ("the export", STATE + 4 * 340 + 160),
    ],
)
def test_moments_by_hand(toy: ModelShape, name: str, num_bytes: int) -> None:
    assert moments(toy)[name].num_bytes == num_bytes


def test_one_trainer_gathers_from_nobody(toy: ModelShape) -> None:
    alone = moments(toy, num_trainers=1)
    assert "the export" not in alone  # what it holds is the whole model
    assert alone["loading and sharding"].num_bytes == 2 * 4 * 340
    layer = 2 * (STATE + GRADIENTS) + ROOT + SAVED + 160 + 3 * 4 * 128 + 16 * 80
    assert alone["a layer, backward"].num_bytes == layer


def test_the_only_microbatch_of_a_step_finds_no_gradients(toy: ModelShape) -> None:
    batch = Microbatch(num_tokens=16, setting="", is_only=True)
    one, many = moments(toy, batch=batch), moments(toy)
    for name in ("log-probs, forward", "log-probs, backward", "a layer, backward"):
        assert many[name].num_bytes - one[name].num_bytes == GRADIENTS
    assert one["the optimizer step"].num_bytes == many["the optimizer step"].num_bytes


def test_checkpointing_computes_one_layer_again(toy: ModelShape) -> None:
    with_it, without = moments(toy, checkpointing=True), moments(toy)
    inputs, layers = 16 * 2 * 16, 16 * 2 * 240
    fewer = without["log-probs, backward"].num_bytes - with_it["log-probs, backward"].num_bytes
    assert fewer == layers - inputs
    fewer = without["a layer, backward"].num_bytes - with_it["a layer, backward"].num_bytes
    assert fewer == layers - inputs - 16 * 240


def test_bfloat16_halves_passes_on_cuda_and_nothing_on_cpu(toy: ModelShape) -> None:
    assert moments(toy, dtype="bfloat16") == moments(toy)
    on_cuda = moments(toy, dtype="bfloat16", device="cuda")
    items = {item.name: item for item in on_cuda["log-probs, backward"].items}
    assert items["embedding and head, gathered"].num_bytes == ROOT // 2
    assert items["parameters"].num_bytes == 680  # kept in float32
    # float32 logits, and their bfloat16 gradient
    assert items["logits of one chunk"].num_bytes == 6 * 16 * 10


def test_the_state_is_split_and_the_activations_are_not(toy: ModelShape) -> None:
    two, four = moments(toy), moments(toy, num_trainers=4)
    name = "log-probs, backward"
    assert two[name].num_bytes - four[name].num_bytes == (STATE + GRADIENTS) // 2


def test_adapters_by_hand(toy: ModelShape) -> None:
    """Rank 1 on queries (4 in, 4 out) and the way down (6 in, 4 out), in two layers."""
    lora = LoraConfig(rank=1, target_modules=["q_proj", "down_proj"])
    count = 2 * (8 + 10)
    one = moments(toy, lora=lora)
    state = (4 * (340 + count) + 8 * count) // 2
    step = state + 4 * count // 2 + ROOT + SAVED + 4 * 16 * 4  # B's input in four adapters
    assert {name: each.num_bytes for name, each in one.items()} == {
        "loading and sharding": 4 * (340 + count) * 3 // 2,  # whole, and its share
        "log-probs, forward": step + 16 * 16 + 8 * 16 * 10,
        "log-probs, backward": step + 16 * 16 + 4 * 16 * 10,  # the head has no gradient
        # a layer and the next one twice; gradients of its adapters and what they are reduced in
        "a layer, backward": step + 3 * 4 * (128 + 18) + 2 * 4 * 18 + 16 * 80,
        "the optimizer step": state + 4 * count // 2,
        "the export": state + 4 * 340 + 160,
    }
    alone = moments(toy, lora=lora, num_trainers=1)
    assert alone["the export"].num_bytes == 2 * state + 4 * 340 + 160


@pytest.mark.parametrize("names", [["q_proj", "v_proj"], ["k_proj", "mlp.down_proj"], None])
def test_adapters_are_counted_as_peft_makes_them(names: list[str] | None) -> None:
    lora = LoraConfig(rank=5, target_modules=names or "all-linear")
    policy = load_policy(embedded_path("student"))
    adapt(policy, lora, base=embedded_path("student"), seed=0)
    made = sum(each.numel() for each in policy.parameters() if each.requires_grad)
    assert adapter_parameters(read_shape(embedded_path("student")), lora) == made
