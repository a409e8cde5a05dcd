"""What each backend keeps, makes whole and reduces, on the toy model of 340 parameters by hand."""

from typing import Any

import pytest
from pydantic import TypeAdapter

from pear_ray.config.backends import BackendConfig
from pear_ray.memory.activations import Microbatch
from pear_ray.memory.items import Item
from pear_ray.memory.model_shape import ModelShape
from pear_ray.memory.spread import spread_of
from pear_ray.memory.trainer_plan import TrainerPlan
from pear_ray.memory.training import trainer_moments

P = 340


def plan(toy: ModelShape, backend: dict[str, Any], **changes: Any) -> TrainerPlan:
    given = {"num_trainers": 2, "device": "cpu", "dtype": "float32"} | changes
    return TrainerPlan(
        shape=toy,
        batch=Microbatch(num_tokens=16, setting="sft.microbatch_tokens"),
        backend=TypeAdapter(BackendConfig).validate_python(backend),
        **given,
    )


def total(items: tuple[Item, ...]) -> int:
    return sum(item.num_bytes for item in items)


def test_ddp_has_all_of_it_and_gradients_twice(toy: ModelShape) -> None:
    found = spread_of(plan(toy, {"kind": "ddp"}))
    assert (total(found.kept), total(found.gradients)) == ((4 + 8 + 4) * P, 4 * P)
    assert total(found.whole) == 0
    assert found.update_parameters == 0  # fused on a CPU
    on_cuda = spread_of(plan(toy, {"kind": "ddp"}, device="cuda"))
    assert on_cuda.update_parameters == P
    names = [each.name for each in trainer_moments(plan(toy, {"kind": "ddp"}))]
    assert "the export" not in names  # rank 0 has it already


def test_ddp_rounds_whole_parameters_under_autocast(toy: ModelShape) -> None:
    on_cuda = plan(toy, {"kind": "ddp"}, device="cuda", dtype="bfloat16")
    assert total(spread_of(on_cuda).whole) == 2 * P


def test_groups_are_copies_of_each_other(toy: ModelShape) -> None:
    hybrid = spread_of(plan(toy, {"kind": "fsdp", "shard_over": 2}, num_trainers=4))
    all_ranks = spread_of(plan(toy, {"kind": "fsdp"}, num_trainers=2))
    assert total(hybrid.kept) == total(all_ranks.kept) == 12 * P // 2
    assert total(hybrid.layer) == total(all_ranks.layer)


def test_an_average_is_split_as_the_parameters_are(toy: ModelShape) -> None:
    for backend, more in (({"kind": "fsdp"}, 2 * P), ({"kind": "ddp"}, 4 * P)):
        with_it = spread_of(plan(toy, backend, keeps_average=True))
        assert total(with_it.kept) - total(spread_of(plan(toy, backend)).kept) == more


def test_offloaded_state_is_in_the_hosts_memory(toy: ModelShape) -> None:
    backend = {"kind": "fsdp", "cpu_offload": True}
    found = spread_of(plan(toy, backend, device="cuda", dtype="bfloat16"))
    assert (found.kept, found.gradients, found.update_parameters) == ((), (), 0)
    assert total(found.kept_on_host) == 16 * P // 2
    assert total(found.whole) == 2 * 84  # what computes is gathered on the device all the same


@pytest.mark.parametrize(
    ("stage", "kept", "gradients", "whole", "reducing"),
    [
        # parameters; a float32 partition and two moments; gradients, which move into the bucket; a
        # flat copy and a partition
        (1, 4 * P + 12 * P // 2, 4 * P, 0, 4 * P + 4 * P // 2),
        # the bucket besides
        (2, 4 * P + 12 * P // 2, 4 * P // 2, 4 * P, 4 * P + 4 * P // 2),
        # parameters in half, all of them gathered, the bucket kept
        (3, 4 * P // 2 + 12 * P // 2 + 4 * P + 4 * P, 4 * P // 2, 0, 4 * P + 4 * P // 2),
    ],
)
def test_zero_stages(
    toy: ModelShape, stage: int, kept: int, gradients: int, whole: int, reducing: int
) -> None:
    found = spread_of(plan(toy, {"kind": "deepspeed", "zero_stage": stage}))
    assert (total(found.kept), total(found.gradients)) == (kept, gradients)
    assert (total(found.whole), total(found.reducing)) == (whole, reducing)


@pytest.mark.parametrize(
    ("stage", "offload", "on_host"),
    [
        # a float32 copy with moments, a buffer of weights on their way, gradients: of half each
        (2, "optimizer", (12 + 2 + 2) * P // 2),
        (3, "optimizer", (12 + 2 + 2) * P // 2),
        (3, "all", (12 + 2 + 2 + 2) * P // 2),
    ],
)
def test_zero_offload_on_a_gpu(toy: ModelShape, stage: int, offload: str, on_host: int) -> None:
    backend = {"kind": "deepspeed", "zero_stage": stage, "offload": offload}
    found = spread_of(plan(toy, backend, device="cuda", dtype="bfloat16"))
    assert total(found.kept_on_host) == on_host
    assert found.gradients == ()
    bucket = [item for item in (*found.kept, *found.whole) if "bucket" in item.name]
    assert total(tuple(bucket)) == 2 * 500_000_000  # a GPU gives it at once


def test_candidates_take_a_chunk_and_their_numbers(toy: ModelShape) -> None:
    def backward(num_candidates: int) -> int:
        given = plan(toy, {"kind": "fsdp"}, num_candidates=num_candidates)
        return next(m.num_bytes for m in trainer_moments(given) if m.name == "log-probs, backward")

    # 16 tokens x 4 ids x 37 bytes, and the gradient of the others' logits, 4 x 16 x 10
    assert backward(3) - backward(0) == 16 * 4 * 37 + 640
