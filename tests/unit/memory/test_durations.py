"""Seconds of each phase, worked out by hand on the toy model of 340 parameters."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pear_ray.config.run import RunConfig, load_run
from pear_ray.memory.durations import (
    DECODE_STEP_S,
    MICROBATCH_S,
    START_S,
    UPDATE_S,
    Duration,
    Part,
    Workload,
    forward_flops,
    num_rows,
    plan_durations,
)
from pear_ray.memory.model_shape import ModelShape
from pear_ray.memory.pace import DEVICES, Pace, pace_of_gpu, pace_of_this_machine
from pear_ray.memory.phases import ModelShapes
from pear_ray.memory.time_words import duration_words, time_lines

DEMO = Path(__file__).parents[3] / "jobs" / "runs" / "demo.yaml"
PACE = Pace(
    flops_per_s=1e6,
    bytes_per_s=1e5,
    training_share=0.5,
    prefill_share=0.25,
    decoding_share=0.5,
    words="",
)
WORK = Workload(num_rows=10, row_tokens=20, completion_tokens=8)
FORWARD = 20 * (2 * 340 + 4 * 2 * 4 * 20)  # two layers, queries 4 wide


def run(*overrides: str) -> RunConfig:
    return load_run(DEMO, ["cluster.num_trainers=1", "cluster.num_samplers=1", *overrides])


def seconds(toy: ModelShape, *overrides: str, **changes: Any) -> dict[str, dict[str, float]]:
    shapes = ModelShapes(policy=toy, behavior={"*": toy})
    pace = dataclasses.replace(PACE, **changes)
    found = plan_durations(run(*overrides), shapes, pace, WORK)
    return {each.phase: {part.name: part.seconds for part in each.parts} for each in found}


def test_a_pass_over_a_row(toy: ModelShape) -> None:
    assert forward_flops(toy, 20) == FORWARD


def test_scoring_is_one_pass(toy: ModelShape) -> None:
    assert seconds(toy)["score"] == {
        "scoring": pytest.approx(10 * FORWARD / 0.25e6),
        "start": START_S["score"],
    }
    halved = seconds(toy, "cluster.num_samplers=2")["score"]["scoring"]
    assert halved == pytest.approx(5 * FORWARD / 0.25e6)


def test_training_is_three_passes_and_four_with_checkpointing(toy: ModelShape) -> None:
    epochs = ("sft.num_epochs=2", "sft.global_batch_size=4")
    plain = seconds(toy, *epochs)["sft"]
    assert plain["training"] == pytest.approx(2 * 10 * 3 * FORWARD / 0.5e6)
    # 4 + 4 + 2 rows, and all four of 20 tokens in a microbatch
    assert plain["beside computing"] == pytest.approx(2 * 3 * (UPDATE_S + MICROBATCH_S))
    again = seconds(toy, *epochs, "sft.activation_checkpointing=true")["sft"]
    assert again["training"] == pytest.approx(plain["training"] * 4 / 3)


def test_rl_has_the_passes_that_its_loss_wants(toy: ModelShape) -> None:
    plain = seconds(toy)["rl"]["training"]
    passes = {
        "rl.activation_checkpointing=true": 4,
        "rl.updates_per_batch=2": 4,
        "rl.kl={measure: true}": 4,
        "rl.kl={coefficient: 0.1, estimator: k1, placement: reward}": 5,
    }
    for override, number in passes.items():
        found = seconds(toy, override)["rl"]["training"]
        assert found == pytest.approx(plain * number / 3), override


def test_each_microbatch_takes_time_beside_computing(toy: ModelShape) -> None:
    """64 prompts of 12 tokens, 8 completions of 8 each: 4,864 computed, of 10,240 in the rows."""
    steps = ("rl.num_steps=3", "rl.prompts_per_step=64", "rl.group_size=8")
    wide = dataclasses.replace(toy, hidden_size=256)  # 2,304 of its tokens are enough
    padded = dataclasses.replace(toy, packs=False)  # up to rl.microbatch_tokens, 8,192
    fewer = ("rl.microbatch_tokens=512", "models.max_model_len=256")
    for shape, overrides, microbatches in (
        (wide, (), 3),
        (toy, (), 2),  # of no more than rl.microbatch_tokens
        (wide, fewer, 20),
        (toy, fewer, 20),
        (padded, (), 2),
    ):
        found = seconds(shape, *steps, *overrides)["rl"]["beside computing"]
        assert found == pytest.approx(3 * (UPDATE_S + microbatches * MICROBATCH_S))


def test_sfts_microbatches_hold_what_is_enough(toy: ModelShape) -> None:
    """128 rows of 20 tokens: two full microbatches and half a one, of 1,024 tokens."""
    shapes = ModelShapes(policy=toy, behavior={"*": toy})
    work = dataclasses.replace(WORK, num_rows=128)
    config = run("sft.global_batch_size=128", "sft.num_epochs=1")
    (sft,) = (each for each in plan_durations(config, shapes, PACE, work) if each.phase == "sft")
    parts = {part.name: part.seconds for part in sft.parts}
    assert parts["beside computing"] == pytest.approx(UPDATE_S + 3 * MICROBATCH_S)


def test_a_control_of_the_step_is_a_pass_more(toy: ModelShape) -> None:
    plain = seconds(toy)["sft"]["training"]
    controls = {
        control: seconds(toy, f"sft.weights.control={control}")["sft"]["training"] / plain
        for control in ("shuffled", "position_profile", "likelihood_only")
    }
    assert controls == pytest.approx(
        {"shuffled": 4 / 3, "position_profile": 4 / 3, "likelihood_only": 1}
    )


def test_no_sft_takes_its_start_alone(toy: ModelShape) -> None:
    found = seconds(toy, "sft.num_epochs=0", "sft.objective=psft")["sft"]
    assert {name: value for name, value in found.items() if value} == {"start": START_S["sft"]}


def test_the_initial_policy_is_scored_where_it_is_asked_for(toy: ModelShape) -> None:
    assert "scores of the initial policy" not in seconds(toy)["sft"]
    found = seconds(toy, "sft.objective=psft")["sft"]
    assert found["scores of the initial policy"] == pytest.approx(10 * FORWARD / 0.25e6)


def test_decoding_is_bound_by_whichever_is_slower(toy: ModelShape) -> None:
    small = ("rl.num_steps=3", "rl.prompts_per_step=2", "rl.group_size=2")
    # 3 steps x 8 tokens of 4 sequences; read are the weights and 4 x 16 cached tokens of 2 layers,
    # 2 wide, keys and values, in float32
    by_bytes = 4 * (340 + 4 * 16 * 2 * 2 * 2) / 0.5e5
    by_flops = 2 * 340 * 4 / 0.25e6
    assert by_bytes > by_flops
    assert seconds(toy, *small)["rl"]["decoding"] == pytest.approx(24 * (by_bytes + DECODE_STEP_S))
    fast = seconds(toy, *small, bytes_per_s=1e12)["rl"]["decoding"]
    assert fast == pytest.approx(24 * (by_flops + DECODE_STEP_S))


def test_an_engine_over_two_devices_takes_half_as_long(toy: ModelShape) -> None:
    stages = {"collect": "corpus", "evaluate": "evaluate"}
    one = seconds(toy)
    two = seconds(toy, *(f"{each}.tensor_parallel_size=2" for each in stages.values()))
    for stage in stages:
        assert two[stage]["prompts"] == pytest.approx(one[stage]["prompts"] / 2)
        steps = one[stage]["decoding"] / 2 - two[stage]["decoding"]
        assert steps < 0  # a decoding step's own time stays
    # Of RL's two ranks each has half the sequences, or both have all of them together.
    apart, shared = (
        seconds(toy, "cluster.num_trainers=2", f"rl.tensor_parallel_size={size}")["rl"]["prompts"]
        for size in (1, 2)
    )
    assert shared == pytest.approx(apart)


def test_a_gpu_has_no_measured_start(toy: ModelShape) -> None:
    found = seconds(toy, "cluster.device=cuda", "models.dtype=bfloat16")
    assert all("start" not in parts for parts in found.values())
    assert "beside computing" not in found["sft"]


def test_rows_nobody_counted() -> None:
    unknown = Workload(num_rows=None, row_tokens=20, completion_tokens=None)
    assert num_rows(run(), unknown) == 600 * 2  # all samples of the demo
    assert num_rows(run(), WORK) == 10


def test_the_words_say_what_is_assumed() -> None:
    config = run("cluster.device=cuda", "models.dtype=bfloat16")
    pace = pace_of_gpu(DEVICES["h100"], "bfloat16")
    day = Duration(phase="sft", parts=(Part(name="training", seconds=1.0, formula="f"),))
    lines = "\n".join(time_lines(config, [day], pace, WORK))
    assert "989 TFLOP/s in bfloat16, 3.35 TB/s (NVIDIA H100 Tensor Core GPU data sheet)" in lines
    assert "assumed: 14% of that FLOP/s in training" in lines
    assert "not known; say which GPU" in "\n".join(time_lines(config, [], None, WORK))


@pytest.mark.parametrize(
    ("number", "words"),
    [(0.25, "0.25 s"), (90.0, "90 s"), (150.0, "2.5 min"), (7200.0, "2.0 h")],
)
def test_durations_for_people(number: float, words: str) -> None:
    assert duration_words(number) == words


def test_this_machine_is_measured() -> None:
    pace = pace_of_this_machine(1)
    assert 1e8 < pace.flops_per_s < 1e14
    assert 1e8 < pace.bytes_per_s < 1e13


def test_only_the_checkpoints_that_are_evaluated_take_time(toy: ModelShape) -> None:
    all_three = seconds(toy)["evaluate"]["prompts"]
    two = seconds(toy, "evaluate.checkpoints=[sft, rl]")["evaluate"]["prompts"]
    assert all_three == pytest.approx(200 * 8 * 3 * forward_flops(toy, 12) / 0.25e6)
    assert two == pytest.approx(all_three * 2 / 3)
