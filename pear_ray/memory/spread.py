"""What a backend keeps on one rank, what it makes whole for a step, and where it reduces gradients.

FSDP2 and DDP as PyTorch's documentation has them; DeepSpeed's buffers as its source of 0.19 makes
them with the settings of engines.deepspeed_trainer (its defaults), checked against measured peaks
on CPU (benchmarks/results/plan.json).
"""

from dataclasses import dataclass
from typing import assert_never

from pear_ray.config.backends import (
    PARAMETERS_SPLIT,
    DdpBackend,
    DeepSpeedBackend,
    FsdpBackend,
)
from pear_ray.memory.activations import FLOAT32_BYTES
from pear_ray.memory.items import Item
from pear_ray.memory.trainer_plan import TRAINERS, TrainerPlan

BUCKET = 500_000_000  # numbers in DeepSpeed's reduce bucket (its default)
MAX_LIVE = 1_000_000_000  # parameters that ZeRO-3 keeps whole at once (its default)
SPLITS_GRADIENTS = 2  # the ZeRO stage
MOMENTS, PARAMETERS = "AdamW's moments", "parameters"  # names of items


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A rank's part of the model, by when it is there and where.

    Attributes:
        kept: On the device from step to step.
        gradients: On the device while a step adds them up.
        whole: On the device from a step's first forward pass to its last backward pass.
        layer: Beside a layer's backward pass.
        reducing: Beside all else when gradients are reduced, activations being gone.
        for_update: On the device while AdamW updates.
        update_parameters: Numbers that AdamW makes temporaries of at once.
        kept_on_host: In the host's memory instead, from step to step.
        is_split: Whether a rank holds less than the whole model, so that an export gathers it.
    """

    kept: tuple[Item, ...]
    gradients: tuple[Item, ...]
    whole: tuple[Item, ...] = ()
    layer: tuple[Item, ...] = ()
    reducing: tuple[Item, ...] = ()
    for_update: tuple[Item, ...] = ()
    update_parameters: int = 0
    kept_on_host: tuple[Item, ...] = ()
    is_split: bool = True


def spread_of(plan: TrainerPlan) -> Spread:
    """How the plan's backend spreads its model."""
    match plan.backend:
        case FsdpBackend():
            return _fsdp(plan, plan.backend)
        case DdpBackend():
            return _ddp(plan)
        case DeepSpeedBackend():
            return _deepspeed(plan, plan.backend)
        case _:
            assert_never(plan.backend)


def num_shards(plan: TrainerPlan) -> int:
    """Ranks that a parameter is split over."""
    match plan.backend:
        case FsdpBackend():
            return plan.backend.shard_over or plan.num_trainers
        case DdpBackend():
            return 1
        case DeepSpeedBackend():
            splits = plan.backend.zero_stage == PARAMETERS_SPLIT
            return plan.num_trainers if splits else 1
        case _:
            assert_never(plan.backend)


def _fsdp(plan: TrainerPlan, backend: FsdpBackend) -> Spread:
    """Split parameters, moments and gradients; the root whole during a step, a layer in turn."""
    shards = num_shards(plan)
    moments = (_share(MOMENTS, plan, 2 * FLOAT32_BYTES, shards),)
    moved = moments if plan.moments_on_host else ()
    state = (
        _share(PARAMETERS, plan, FLOAT32_BYTES, shards, of_all=True),
        *(() if moved else moments),
        *_average(plan, shards),
    )
    gradients = (_share("gradients", plan, FLOAT32_BYTES, shards),)
    on_host = backend.cpu_offload
    return Spread(
        kept=() if on_host else state,
        gradients=() if on_host else gradients,
        whole=(gathered_root(plan),),
        layer=_gathered_layer(plan, shards),
        for_update=moved,
        update_parameters=0 if on_host else _updated_at_once(plan) // shards,
        kept_on_host=(*state, *gradients) if on_host else moved,
        is_split=plan.num_trainers > 1,
    )


def _gathered_layer(plan: TrainerPlan, shards: int) -> tuple[Item, Item]:
    """A layer in its backward pass, as FSDP2 has it.

    Where there is somebody to reduce with also the next layer's parameters as they are received,
    twice: the buffer and what is copied out of it.
    """
    each, trained = plan.bytes_each, plan.layer_trained
    total = plan.shape.layer_parameters + (trained if plan.lora else 0)
    copies, after = (1, "") if shards == 1 else (3, ", the next layer as it comes")
    return (
        Item(
            name="a layer gathered",
            num_bytes=copies * each * total,
            formula=f"{copies} x {each} bytes x {total:,} parameters of a layer: whole{after}",
        ),
        Item(
            name="a layer's gradients",
            num_bytes=(each + FLOAT32_BYTES) * trained,
            formula=f"({each} + {FLOAT32_BYTES}) bytes x {trained:,} parameters of a layer that "
            "train, and the buffer they are reduced in",
        ),
    )


def _updated_at_once(plan: TrainerPlan) -> int:
    """PyTorch updates all together (foreach) on CUDA, and without temporaries (fused) on CPU.

    On CUDA tensor by tensor where moments come for the update alone.
    """
    if plan.device == "cpu":
        return 0
    return plan.largest_trained if plan.moments_on_host else plan.num_trained


def _ddp(plan: TrainerPlan) -> Spread:
    """All of it on every rank, and gradients a second time in the buckets they are reduced in."""
    each, trained = plan.bytes_each, plan.layer_trained
    kept = [
        _share(PARAMETERS, plan, FLOAT32_BYTES, 1, of_all=True),
        _share(MOMENTS, plan, 2 * FLOAT32_BYTES, 1),
        _share("buckets that gradients are reduced in", plan, FLOAT32_BYTES, 1),
        *_average(plan, 1),
    ]
    narrow = each if each < FLOAT32_BYTES else 0
    whole = Item(
        name="parameters as autocast rounds them",
        num_bytes=narrow * plan.num_parameters,
        formula=f"{narrow} bytes x {plan.num_parameters:,} parameters",
    )
    layer = Item(
        name="a layer's gradients as they are made",
        num_bytes=FLOAT32_BYTES * trained,
        formula=f"{FLOAT32_BYTES} bytes x {trained:,} parameters of a layer that train",
    )
    return Spread(
        kept=tuple(kept),
        gradients=(_share("gradients", plan, FLOAT32_BYTES, 1),),
        whole=(whole,),
        layer=(layer,),
        update_parameters=_updated_at_once(plan),
        is_split=False,
    )


def _deepspeed(plan: TrainerPlan, backend: DeepSpeedBackend) -> Spread:
    """ZeRO: a float32 copy of a rank's partition with its moments; gradients in its own buffers."""
    ranks, each, trained = plan.num_trainers, plan.bytes_each, plan.num_trained
    stage = backend.zero_stage
    weights = _share(PARAMETERS, plan, each, num_shards(plan), of_all=True)
    state = [
        _share("ZeRO's float32 copy of its partition", plan, FLOAT32_BYTES, ranks),
        _share(MOMENTS, plan, 2 * FLOAT32_BYTES, ranks),
    ]
    splits_gradients = stage >= SPLITS_GRADIENTS or backend.offload != "none"
    gradients = _share("gradients", plan, each, ranks if splits_gradients else 1)
    if backend.offload != "none":
        # Stage 3 has a gradient of each partition, the others a partition in the model's dtype.
        state.append(_share("ZeRO's buffer between host and device", plan, each, ranks))
    bucket = _bucket(plan)
    whole, kept = [], []
    if stage == PARAMETERS_SPLIT:
        live = min(plan.num_parameters, MAX_LIVE)
        # What is needed again soon stays whole, from one step to the next.
        kept += [
            Item(
                name="parameters that ZeRO-3 keeps whole",
                num_bytes=each * live,
                formula=f"{each} bytes x {live:,} parameters (at most 1e9)",
            ),
            bucket,  # made once; the other stages make it for each backward pass
        ]
    elif splits_gradients or plan.device == "cuda":
        whole.append(bucket)
    # else gradients move into the bucket, which on CPU takes memory as it is written to
    flat = min(BUCKET, trained)
    reducing = Item(
        name="gradients on their way to other ranks",
        num_bytes=each * flat,
        formula=f"{each} bytes x {flat:,} gradients of a full bucket, in a flat copy",
        setting=TRAINERS if ranks > 1 else None,
    )
    partition = _share("a partition's gradients as they come", plan, each, ranks)
    split_device = plan.device == "cuda" and backend.offload != "none"
    weights_on_host = split_device and backend.offload == "all"
    on_device = [] if weights_on_host else [weights]
    on_host = [weights] if weights_on_host else []
    if split_device:
        on_host += [*state, gradients]
    else:
        on_device += state
    return Spread(
        kept=(*on_device, *kept),
        gradients=() if split_device else (gradients,),
        whole=tuple(whole),
        reducing=(reducing, partition),
        update_parameters=0 if split_device else trained // ranks,
        kept_on_host=tuple(on_host),
        is_split=stage == PARAMETERS_SPLIT,
    )


def gathered_root(plan: TrainerPlan) -> Item:
    """The unit around the layers, which stays whole from the first layer's forward to the end."""
    num_parameters = plan.shape.outside_parameters
    return Item(
        name="embedding and head, gathered",
        num_bytes=plan.bytes_each * num_parameters,
        formula=f"{plan.bytes_each} bytes x {num_parameters:,} parameters outside the layers",
    )


def _bucket(plan: TrainerPlan) -> Item:
    """On CUDA a bucket takes all its memory at once, on CPU as much of it as is written to."""
    each = plan.bytes_each
    numbers = BUCKET if plan.device == "cuda" else min(BUCKET, plan.num_trained)
    return Item(
        name="ZeRO's bucket of gradients",
        num_bytes=each * numbers,
        formula=f"{each} bytes x {numbers:,} gradients (reduce_bucket_size is 5e8)",
    )


def _average(plan: TrainerPlan, shards: int) -> list[Item]:
    if not plan.keeps_average:
        return []
    return [_share("average of the weights", plan, FLOAT32_BYTES, shards)]


def _share(
    name: str, plan: TrainerPlan, bytes_per_parameter: int, shards: int, *, of_all: bool = False
) -> Item:
    """A rank's share of something that trained parameters have, or `of_all` parameters."""
    total = plan.num_parameters if of_all else plan.num_trained
    over = "on every rank" if shards == 1 < plan.num_trainers else f"/ {shards} trainers"
    return Item(
        name=name,
        num_bytes=bytes_per_parameter * total // shards,
        formula=f"{bytes_per_parameter} bytes x {total:,} parameters {over}",
        setting=TRAINERS if shards > 1 or plan.num_trainers == 1 else None,
    )
