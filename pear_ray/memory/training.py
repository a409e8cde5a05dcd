"""What a step adds to what a trainer keeps, moment by moment."""

from pear_ray.algorithms.batch_sizes import head_chunk_tokens
from pear_ray.config.backends import FsdpBackend
from pear_ray.memory.activations import (
    FLOAT32_BYTES,
    layer_bytes_per_token,
    layer_gradient_activations,
    saved_activations,
)
from pear_ray.memory.adapters import adapted
from pear_ray.memory.items import Item, Moment, moment
from pear_ray.memory.spread import num_shards, spread_of
from pear_ray.memory.trainer_plan import TRAINERS, TrainerPlan

# Of a candidate of a token: its id twice (int64), whether it is padding, its log-prob as given, as
# the policy has it and that less the normaliser, and the gradient of it twice.
BYTES_PER_CANDIDATE = 2 * 8 + 1 + 3 * FLOAT32_BYTES + 2 * FLOAT32_BYTES


def trainer_moments(plan: TrainerPlan) -> list[Moment]:
    """The moments of a training stage at which memory may be at its highest."""
    step = [
        _loading(plan),
        _logprobs_forward(plan),
        _logprobs_backward(plan),
        _layer_backward(plan),
        _optimizer_step(plan),
    ]
    spread = spread_of(plan)
    if spread.reducing:
        step.append(
            moment(
                "gradients, reduced", spread.kept, spread.gradients, spread.whole, spread.reducing
            )
        )
    # A model that is whole is written as it is; adapters are merged into another copy of it.
    return [*step, _export(plan)] if spread.is_split or plan.lora else step


def trainer_state(plan: TrainerPlan, *, gradients: bool) -> list[Item]:
    """What a rank keeps between steps, and where asked for the gradients that a step adds up."""
    spread = spread_of(plan)
    return [*spread.kept, *spread.gradients] if gradients else [*spread.kept]


def _loading(plan: TrainerPlan) -> Moment:
    """Every rank loads the whole model before it is split: always into the host's memory.

    FSDP2 then takes it to a GPU unit by unit, the largest of which is there whole; other backends
    take all of it.
    """
    total, ranks = plan.num_parameters, num_shards(plan)
    whole = loaded_whole(plan)
    if plan.device == "cuda" and isinstance(plan.backend, FsdpBackend):
        shape = plan.shape
        unit = max(shape.outside_parameters, shape.layer_parameters)
        whole = Item(
            name="a layer, or embedding and head, before it is split",
            num_bytes=FLOAT32_BYTES * unit,
            formula=f"{FLOAT32_BYTES} bytes x {unit:,} parameters",
        )
    shards = Item(
        name="parameters",
        num_bytes=FLOAT32_BYTES * total // ranks,
        formula=f"{FLOAT32_BYTES} bytes x {total:,} parameters / {ranks} trainers",
        setting=TRAINERS,
    )
    return moment("loading and sharding", [whole, shards])


def loaded_whole(plan: TrainerPlan) -> Item:
    """What a rank loads before the model is split."""
    total = plan.num_parameters
    return Item(
        name="whole model while it is loaded",
        num_bytes=FLOAT32_BYTES * total,
        formula=f"{FLOAT32_BYTES} bytes x {total:,} parameters, on every rank",
    )


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
    return moment("log-probs, forward", _step_state(plan), [last, chunk, _candidates(plan)])


def _logprobs_backward(plan: TrainerPlan) -> Moment:
    """The head's gradient is summed over chunks, in place but for bfloat16 on CUDA."""
    size, hidden = plan.shape.embedding_parameters, plan.shape.hidden_size * plan.bytes_each
    is_narrow = plan.bytes_each < FLOAT32_BYTES
    copies = 2 if is_narrow else 1
    head = Item(
        name="head's gradient" + (", and one chunk's part of it" if is_narrow else ""),
        num_bytes=copies * FLOAT32_BYTES * size,
        formula=f"{copies} x {FLOAT32_BYTES} bytes x {size:,} parameters of the head",
    )
    states = Item(
        name="gradient of the predicting states",
        num_bytes=hidden * plan.batch.num_tokens,
        formula=f"{hidden:,} bytes x {plan.batch.num_tokens:,} tokens",
        setting=plan.batch.setting,
    )
    # On CUDA the products in bfloat16 take a copy of the chunk in it.
    narrow = plan.bytes_each if is_narrow else 0
    # What the ids outside the candidates get of the gradient is made beside what they all get.
    rest = FLOAT32_BYTES if plan.num_candidates else 0
    chunk = _logits_chunk(plan, bytes_each=FLOAT32_BYTES + narrow + rest)
    heads = [] if plan.lora else [head]
    items = [*heads, states, chunk, _candidates(plan)]
    return moment("log-probs, backward", _step_state(plan), items)


def _layer_backward(plan: TrainerPlan) -> Moment:
    """The last layer: nothing let go of yet but the head's part, and the head's gradient kept."""
    shape, each = plan.shape, plan.bytes_each
    head = Item(
        name="head's gradient",
        num_bytes=each * shape.embedding_parameters,
        formula=f"{each} bytes x {shape.embedding_parameters:,} parameters of the head",
    )
    inside = [layer_gradient_activations(shape, plan.batch, bytes_each=each)]
    if plan.checkpointing:
        per_token = layer_bytes_per_token(shape, bytes_each=each)
        tokens = plan.batch.num_tokens
        again = Item(
            name="activations of the layer that is computed again",
            num_bytes=per_token * tokens,
            formula=f"{per_token:,} bytes x {tokens:,} tokens",
            setting=plan.batch.setting,
        )
        inside.append(again)
    layer = spread_of(plan).layer
    heads = [] if plan.lora else [head]
    return moment("a layer, backward", _step_state(plan), heads, layer, inside)


def _optimizer_step(plan: TrainerPlan) -> Moment:
    """AdamW's temporaries: one of every tensor at once, or two of each in turn."""
    spread = spread_of(plan)
    copies = 1 if plan.device == "cuda" and not plan.moments_on_host else 2
    numbers = spread.update_parameters
    update = Item(
        name="temporaries of the update",
        num_bytes=copies * FLOAT32_BYTES * numbers,
        formula=f"{copies} x {FLOAT32_BYTES} bytes x {numbers:,} parameters that a rank updates "
        "at once",
        setting=TRAINERS,
    )
    # ZeRO sums up gradients in its own order, and hands them to AdamW as one tensor.
    flat = [item for item in spread.reducing if "partition" in item.name]
    held = [*trainer_state(plan, gradients=True), *spread.for_update]
    return moment("the optimizer step", held, flat, [update])


def _export(plan: TrainerPlan) -> Moment:
    """Rank 0 gathers the whole model in the host's memory, or reads it to merge adapters into."""
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
        *spread_of(plan).whole,
        *_inside_adapters(plan),
        *saved_activations(
            plan.shape,
            plan.batch,
            bytes_each=plan.bytes_each,
            checkpointing=plan.checkpointing,
        ),
    ]


def _inside_adapters(plan: TrainerPlan) -> list[Item]:
    """What goes into B, of every adapter; what goes into A is among the layers' activations."""
    if plan.lora is None or plan.checkpointing:  # in one layer at a time: not worth a line
        return []
    layers = plan.shape.num_layers * len(adapted(plan.shape, plan.lora))
    per_token, tokens = plan.bytes_each * plan.lora.rank, plan.batch.num_tokens
    return [
        Item(
            name="activations inside adapters",
            num_bytes=per_token * tokens * layers,
            formula=f"{per_token:,} bytes x {tokens:,} tokens x {layers} adapters",
            setting=plan.batch.setting,
        )
    ]


def _logits_chunk(plan: TrainerPlan, *, bytes_each: int) -> Item:
    tokens = head_chunk_tokens(plan.device, vocab_size=plan.shape.vocab_size)
    tokens = min(tokens, plan.batch.num_tokens)
    return Item(
        name="logits of one chunk",
        num_bytes=bytes_each * tokens * plan.shape.vocab_size,
        formula=f"{bytes_each} bytes x {tokens} tokens x {plan.shape.vocab_size:,} vocabulary",
    )


def _candidates(plan: TrainerPlan) -> Item:
    ids, tokens = plan.num_candidates and plan.num_candidates + 1, plan.batch.num_tokens
    return Item(
        name="candidates of the tokens, and their log-probs",
        num_bytes=BYTES_PER_CANDIDATE * tokens * ids,
        formula=f"{BYTES_PER_CANDIDATE} bytes x {tokens:,} tokens x {ids} ids, their own among "
        "them",
        setting="score.top_k",
    )
