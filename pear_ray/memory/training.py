"""What a trainer holds: its share of the state that FSDP2 splits, and what a step adds to it."""

from dataclasses import dataclass

from pear_ray.config.sections import compute_dtype
from pear_ray.memory.activations import (
    FLOAT32_BYTES,
    LOGPROB_CHUNK_TOKENS,
    Microbatch,
    layer_bytes_per_token,
    layer_gradient_activations,
    saved_activations,
)
from pear_ray.memory.items import Item, Moment, moment
from pear_ray.memory.model_shape import ModelShape

TRAINERS = "cluster.num_trainers"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerPlan:
    """One rank of a training group.

    Attributes:
        shape: The policy's shape.
        num_trainers: Ranks that FSDP2 splits parameters, gradients and moments over.
        batch: The largest microbatch.
        device: `cpu` or `cuda`.
        dtype: As `models.dtype`.
        checkpointing: Whether layers are computed again in backward.
    """

    shape: ModelShape
    num_trainers: int
    batch: Microbatch
    device: str
    dtype: str
    checkpointing: bool = False

    @property
    def bytes_each(self) -> int:
        """Bytes of a number in forward and backward passes."""
        narrow = compute_dtype(self.dtype, device=self.device) == "bfloat16"
        return 2 if narrow else FLOAT32_BYTES


def trainer_moments(plan: TrainerPlan) -> list[Moment]:
    """The moments of a training stage at which memory may be at its highest."""
    step = [
        _loading(plan),
        _logprobs_forward(plan),
        _logprobs_backward(plan),
        _layer_backward(plan),
        _optimizer_step(plan),
    ]
    return [*step, _export(plan)] if plan.num_trainers > 1 else step


def trainer_state(plan: TrainerPlan, *, gradients: bool) -> list[Item]:
    """What a rank keeps between steps, and where asked for the gradients that a step adds up."""
    total, ranks = plan.shape.num_parameters, plan.num_trainers

    def share(name: str, bytes_per_parameter: int) -> Item:
        return Item(
            name=name,
            num_bytes=bytes_per_parameter * total // ranks,
            formula=f"{bytes_per_parameter} bytes x {total:,} parameters / {ranks} trainers",
            setting=TRAINERS,
        )

    state = [share("parameters", FLOAT32_BYTES), share("AdamW's moments", 2 * FLOAT32_BYTES)]
    return [*state, share("gradients", FLOAT32_BYTES)] if gradients else state


def gathered_root(plan: TrainerPlan) -> Item:
    """The unit around the layers, which stays whole from the first layer's forward to the end."""
    num_parameters = plan.shape.outside_parameters
    return Item(
        name="embedding and head, gathered",
        num_bytes=plan.bytes_each * num_parameters,
        formula=f"{plan.bytes_each} bytes x {num_parameters:,} parameters outside the layers",
    )


def _loading(plan: TrainerPlan) -> Moment:
    """Every rank loads the whole model before it is split."""
    total, ranks = plan.shape.num_parameters, plan.num_trainers
    whole = Item(
        name="whole model while it is loaded",
        num_bytes=FLOAT32_BYTES * total,
        formula=f"{FLOAT32_BYTES} bytes x {total:,} parameters, on every rank",
    )
    shards = Item(
        name="parameters",
        num_bytes=FLOAT32_BYTES * total // ranks,
        formula=f"{FLOAT32_BYTES} bytes x {total:,} parameters / {ranks} trainers",
        setting=TRAINERS,
    )
    return moment("loading and sharding", [whole, shards])


def _logprobs_forward(plan: TrainerPlan) -> Moment:
    """All activations are saved, and the first chunk's logits are there with their exponentials."""
    hidden = plan.shape.hidden_size * plan.bytes_each
    last = Item(
        name="last hidden states",
        num_bytes=hidden * plan.batch.num_tokens,
        formula=f"{hidden:,} bytes x {plan.batch.num_tokens:,} tokens",
        setting=plan.batch.setting,
    )
    chunk = _logits_chunk(plan, bytes_each=2 * FLOAT32_BYTES)
    return moment("log-probs, forward", _step_state(plan), [last, chunk])


def _logprobs_backward(plan: TrainerPlan) -> Moment:
    """The head's gradient is summed over chunks; one chunk's product is as large again."""
    size, hidden = plan.shape.embedding_parameters, plan.shape.hidden_size * plan.bytes_each
    head = Item(
        name="head's gradient, and one chunk's part of it",
        num_bytes=2 * FLOAT32_BYTES * size,
        formula=f"2 x {FLOAT32_BYTES} bytes x {size:,} parameters of the head",
    )
    states = Item(
        name="gradient of the predicting states",
        num_bytes=hidden * plan.batch.num_tokens,
        formula=f"{hidden:,} bytes x {plan.batch.num_tokens:,} tokens",
        setting=plan.batch.setting,
    )
    # On CUDA the products in bfloat16 take a copy of the chunk in it.
    narrow = plan.bytes_each if plan.bytes_each < FLOAT32_BYTES else 0
    chunk = _logits_chunk(plan, bytes_each=FLOAT32_BYTES + narrow)
    return moment("log-probs, backward", _step_state(plan), [head, states, chunk])


def _layer_backward(plan: TrainerPlan) -> Moment:
    """The last layer: nothing let go of yet but the head's part, and the head's gradient kept."""
    shape, each = plan.shape, plan.bytes_each
    head = Item(
        name="head's gradient",
        num_bytes=each * shape.embedding_parameters,
        formula=f"{each} bytes x {shape.embedding_parameters:,} parameters of the head",
    )
    # Its parameters, its gradients, and where there is somebody to reduce with, the next layer's
    # parameters as they are received, twice: the buffer and what is copied out of it.
    copies = 2 if plan.num_trainers == 1 else 4
    layer = Item(
        name="a layer gathered, and its gradients",
        num_bytes=(copies * each + FLOAT32_BYTES) * shape.layer_parameters,
        formula=f"({copies} x {each} + {FLOAT32_BYTES}) bytes x {shape.layer_parameters:,} "
        "parameters of a layer: whole, its gradients, the buffer they are reduced in"
        + ("" if plan.num_trainers == 1 else ", the next layer as it comes"),
    )
    inside = [layer_gradient_activations(shape, plan.batch, bytes_each=each)]
    if plan.checkpointing:
        per_token = layer_bytes_per_token(shape, bytes_each=each, width=plan.batch.width)
        tokens = plan.batch.num_tokens
        again = Item(
            name="activations of the layer that is computed again",
            num_bytes=per_token * tokens,
            formula=f"{per_token:,} bytes x {tokens:,} tokens",
            setting=plan.batch.setting,
        )
        inside.append(again)
    return moment("a layer, backward", _step_state(plan), [head, layer], inside)


def _optimizer_step(plan: TrainerPlan) -> Moment:
    """AdamW's temporaries: two of the largest tensor on CPU, one of every tensor on CUDA.

    PyTorch updates tensor by tensor on CPU, and all of them together (foreach) on CUDA.
    """
    shape, ranks = plan.shape, plan.num_trainers
    copies, size, which = (
        (1, shape.num_parameters, "parameters")
        if plan.device == "cuda"
        else (2, shape.embedding_parameters, "parameters of the embedding")
    )
    update = Item(
        name="temporaries of the update",
        num_bytes=copies * FLOAT32_BYTES * size // ranks,
        formula=f"{copies} x {FLOAT32_BYTES} bytes x {size:,} {which} / {ranks} trainers",
        setting=TRAINERS,
    )
    return moment("the optimizer step", trainer_state(plan, gradients=True), [update])


def _export(plan: TrainerPlan) -> Moment:
    """Rank 0 gathers the whole model, tensor by tensor, in the host's memory."""
    total, largest = plan.shape.num_parameters, plan.shape.embedding_parameters
    on_device = plan.device == "cpu"
    whole = Item(
        name="whole model on rank 0",
        num_bytes=FLOAT32_BYTES * total if on_device else 0,
        formula=f"{FLOAT32_BYTES} bytes x {total:,} parameters",
    )
    tensor = Item(
        name="a tensor as it is gathered",
        num_bytes=FLOAT32_BYTES * largest,
        formula=f"{FLOAT32_BYTES} bytes x {largest:,} parameters of the embedding",
    )
    return moment("the export", trainer_state(plan, gradients=False), [whole, tensor])


def _step_state(plan: TrainerPlan) -> list[Item]:
    """What is held from the end of a forward pass to the beginning of its backward pass."""
    return [
        *trainer_state(plan, gradients=not plan.batch.is_only),
        gathered_root(plan),
        *saved_activations(
            plan.shape,
            plan.batch,
            bytes_each=plan.bytes_each,
            checkpointing=plan.checkpointing,
        ),
    ]


def _logits_chunk(plan: TrainerPlan, *, bytes_each: int) -> Item:
    tokens = min(LOGPROB_CHUNK_TOKENS, plan.batch.num_tokens)
    return Item(
        name="logits of one chunk",
        num_bytes=bytes_each * tokens * plan.shape.vocab_size,
        formula=f"{bytes_each} bytes x {tokens} tokens x {plan.shape.vocab_size:,} vocabulary",
    )
