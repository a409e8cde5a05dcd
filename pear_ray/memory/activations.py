"""What a training microbatch keeps for its backward pass, tensor by tensor as autograd saves it.

Counted from transformers' Llama-like layers over rows laid end to end
(engines.packed_attention), and checked in tests against what autograd saves. `bytes_each` is the
size of a number in the computation: 4 in float32, 2 in bfloat16. Norms compute in float32 whatever
it is.
"""

from dataclasses import dataclass

from pear_ray.algorithms.batch_sizes import ENOUGH_TOKENS, enough_group_tokens
from pear_ray.memory.items import Item
from pear_ray.memory.model_shape import ModelShape

FLOAT32_BYTES = 4
LARGE_BLOCK_BYTES = 32 * 2**20  # from here on glibc's malloc never keeps a freed block


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """The largest microbatch of a stage.

    Attributes:
        num_tokens: Tokens of its rows, end to end.
        setting: Dotted key of the setting that bounds `num_tokens`.
        is_only: Whether a step has one microbatch, so that no gradients are there before it.
    """

    num_tokens: int
    setting: str
    is_only: bool = False


def largest_microbatch(
    *,
    microbatch_tokens: int,
    max_model_len: int,
    num_rows: int,
    device: str,
    packs: bool,
    setting: str,
    width_of_groups: int | None = None,
) -> Microbatch:
    """The most that a trainer puts together of `num_rows` rows.

    Args:
        microbatch_tokens: What the run allows.
        max_model_len: Tokens of the longest row.
        num_rows: Of one rank in a step.
        device: `cpu` or `cuda`.
        packs: Whether rows are laid end to end, which on CPU are no more than is enough for it.
        setting: Dotted key of `microbatch_tokens`.
        width_of_groups: Where rows share prompts: width of the model's states. Prompts are taken
            for short.
    """
    enough = ENOUGH_TOKENS[device]
    if width_of_groups is not None:
        enough = enough_group_tokens(device, hidden_size=width_of_groups)
    all_tokens = num_rows * max_model_len
    most = max(microbatch_tokens, 1)
    if packs:
        most = min(most, max(enough, max_model_len))
    num_tokens = min(most, all_tokens)
    return Microbatch(
        num_tokens=num_tokens,
        setting=setting if num_tokens > max_model_len else "models.max_model_len",
        is_only=all_tokens <= most,
    )


def layer_tensors(shape: ModelShape, *, bytes_each: int) -> list[int]:
    """Bytes per token of each tensor that one decoder layer saves.

    Norms save their float32 input, its inverse root mean square and, but for our own
    (engines.norms), the normed values; what goes into a matrix product is saved as well. Attention
    saves queries, keys, values, its output and one float32 log-sum-exp per head. In float32 rows of
    unequal length are padded to groups for it, and its output is there a second time without
    padding; the padding itself is not counted. Where a model's rows are padded everywhere keys and
    values are repeated for every query head, and its masks are not counted.
    """
    # In bfloat16, which is on CUDA, variable-length attention needs no padding.
    copies = 2 if shape.packs and bytes_each == FLOAT32_BYTES else 1
    keys = shape.key_size if shape.packs else shape.query_size
    normed = _normed_bytes(shape, bytes_each=bytes_each)
    norms = [shape.hidden_size] * shape.num_norms
    if shape.has_qk_norm:
        norms += [shape.query_size, shape.key_size]
    return [
        *(size for norm in norms for size in (FLOAT32_BYTES * norm, normed * norm)),
        *[bytes_each * shape.hidden_size] * 2,  # into the products of attention and MLP
        *[bytes_each * shape.query_size] * (1 + copies),  # queries, attention's output
        *[bytes_each * keys] * 2,
        *[bytes_each * shape.intermediate_size] * 4,  # gate, its activation, up, their product
        FLOAT32_BYTES * _numbers_per_token(shape),
    ]


def layer_bytes_per_token(shape: ModelShape, *, bytes_each: int) -> int:
    """Bytes that one decoder layer saves per token of a microbatch."""
    return sum(layer_tensors(shape, bytes_each=bytes_each))


def small_block_bytes(shape: ModelShape, batch: Microbatch, *, bytes_each: int) -> int:
    """Of what all layers save for a microbatch, the bytes in tensors that glibc's heap holds."""
    sizes = layer_tensors(shape, bytes_each=bytes_each)
    tokens = batch.num_tokens
    return shape.num_layers * sum(
        size * tokens for size in sizes if size * tokens < LARGE_BLOCK_BYTES
    )


def saved_activations(
    shape: ModelShape, batch: Microbatch, *, bytes_each: int, checkpointing: bool = False
) -> list[Item]:
    """What the decoder and the gathering of its predicting states keep until backward.

    Args:
        shape: The model.
        batch: The microbatch.
        bytes_each: Bytes of a number in the computation.
        checkpointing: Layers keep their input alone, and are computed again one at a time.
    """
    tokens, hidden = batch.num_tokens, shape.hidden_size
    per_layer = layer_bytes_per_token(shape, bytes_each=bytes_each)
    normed = _normed_bytes(shape, bytes_each=bytes_each)
    last = hidden * (FLOAT32_BYTES + normed + bytes_each) + FLOAT32_BYTES
    items = [
        Item(
            name="activations of the last norm and the predicting states",
            num_bytes=tokens * last,
            formula=f"{last:,} bytes x {tokens:,} tokens",
            setting=batch.setting,
        )
    ]
    if not checkpointing:
        return [
            Item(
                name="activations of the layers",
                num_bytes=shape.num_layers * per_layer * tokens,
                formula=f"{per_layer:,} bytes x {tokens:,} tokens x {shape.num_layers} layers",
                setting=batch.setting,
            ),
            *items,
        ]
    return [
        Item(
            name="inputs of the layers",
            num_bytes=shape.num_layers * hidden * bytes_each * tokens,
            formula=f"{hidden * bytes_each:,} bytes x {tokens:,} tokens "
            f"x {shape.num_layers} layers",
            setting=batch.setting,
        ),
        *items,
    ]


def layer_gradient_activations(shape: ModelShape, batch: Microbatch, *, bytes_each: int) -> Item:
    """Gradients of activations inside a layer, at their most: in its MLP.

    The product of gate and up has just been let go of, and gradients of it and of its two factors
    are there, beside those of the layer's output and of its residual stream.
    """
    per_token = (2 * shape.intermediate_size + 2 * shape.hidden_size) * bytes_each
    return Item(
        name="gradients inside a layer",
        num_bytes=per_token * batch.num_tokens,
        formula=f"{per_token:,} bytes x {batch.num_tokens:,} tokens",
        setting=batch.setting,
    )


def _normed_bytes(shape: ModelShape, *, bytes_each: int) -> int:
    """Bytes per element of the normed values that a norm saves beside its float32 input."""
    if shape.has_float32_norms:  # Gemma's, which are not those of engines.norms
        return FLOAT32_BYTES
    return 0 if bytes_each == FLOAT32_BYTES else bytes_each


def _numbers_per_token(shape: ModelShape) -> int:
    """A log-sum-exp per query head, and an inverse root mean square per norm and normed head."""
    normed_heads = shape.num_heads + shape.num_key_value_heads if shape.has_qk_norm else 0
    return shape.num_heads + shape.num_norms + normed_heads
