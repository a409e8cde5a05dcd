"""Attention over rows laid end to end without padding: a token sees its own row's past only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from pear_ray.algorithms.packing import cheapest_cuts

QueryKeyValue = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # each [position, head, size]
NAME = "pear_ray_packed"  # as transformers knows it; it makes no mask for a name it does not know
# What one more call of the attention kernel costs, in tokens that it could pad instead.
OVERHEAD_TOKENS = 256
GROUP_TOKENS = 4096  # enough for one call; larger groups only take longer to find
# What a model may pass that changes attention, and that is not done here.
UNSUPPORTED = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True, slots=True)
class Group:
    """Rows next to each other that attend in one call, padded to the longest.

    Attributes:
        begin: The first row's first token in the pack.
        end: Past the last row's last token.
        num_rows: Rows.
        width: Tokens of the longest.
        places: [end - begin] where each token is in [row, width], flat; None without padding.
    """

    begin: int
    end: int
    num_rows: int
    width: int
    places: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the rows of a packed batch begin and end.

    Attributes:
        bounds: [row + 1] int32, the rows' first tokens and the end of the last; for kernels that
            take rows of various lengths.
        longest: Tokens of the longest row.
        groups: The rows cut for kernels that do not.
        shared: Where rows share tokens, how the kernels' rows are made of the positions that the
            model computes; None where each row has all of its own.
    """

    bounds: torch.Tensor
    longest: int
    groups: tuple[Group, ...]
    shared: "SharedPositions | None" = None


@dataclass(frozen=True, slots=True)
class SharedPositions:
    """Rows that begin alike, computed once: what a token is depends on those before it alone.

    Attributes:
        expand: [row token] which position each token of each row is, rows end to end.
        back: [position] the first token that it is, as a place in `expand`.
    """

    expand: torch.Tensor
    back: torch.Tensor


def share_positions(lengths: Sequence[int], shared: Sequence[int]) -> SharedPositions:
    """Positions of rows of `lengths` tokens, the first `shared` of each being the row before's."""
    parts: list[torch.Tensor] = []
    size = 0
    for length, common in zip(lengths, shared, strict=True):
        own = torch.arange(size, size + length - common)
        parts.append(torch.cat([parts[-1][:common], own]) if common else own)
        size += length - common
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist()
    owned = [
        torch.arange(start + common, start + length)
        for start, length, common in zip(starts, lengths, shared, strict=True)
    ]
    return SharedPositions(torch.cat(parts), torch.cat(owned))


def make_packing(
    lengths: Sequence[int], *, device: torch.device, shared: SharedPositions | None = None
) -> Packing:
    """The packing of rows of `lengths` tokens, each above 0, in their order."""
    sizes = torch.tensor(lengths)
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    starts = bounds.tolist()
    longest = max(lengths)
    cuts = cheapest_cuts(
        lengths, max_tokens=max(longest, GROUP_TOKENS), overhead_tokens=OVERHEAD_TOKENS
    )
    groups = []
    for first, end in cuts:
        width = max(lengths[first:end])
        places = None
        if any(length < width for length in lengths[first:end]):
            inside = [
                torch.arange(length) + number * width
                for number, length in enumerate(lengths[first:end])
            ]
            places = torch.cat(inside).to(device)
        groups.append(Group(starts[first], starts[end], end - first, width, places))
    if shared is not None:
        shared = SharedPositions(shared.expand.to(device), shared.back.to(device))
    return Packing(bounds.to(device, torch.int32), longest, tuple(groups), shared)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer, with tensors [1, head, position, size].

    The result is [1, position, head, size], and no attention weights.

    Half precision on CUDA goes to PyTorch's variable-length flash attention; everything else to
    scaled-dot-product attention, group by group.

    Raises:
        ValueError: The model wants of its attention what is not done here.
    """
    unknown = [name for name in UNSUPPORTED if others.get(name) is not None]
    if unknown or others.get("dropout") or attention_mask is not None:
        raise ValueError(f"packed attention takes no mask, no dropout and no {UNSUPPORTED}")
    if not getattr(module, "is_causal", True):
        raise ValueError("packed attention is causal, and this layer is not")
    parts = (query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
    shared = packing.shared
    if shared is not None:
        first, second, third = (each.index_select(0, shared.expand) for each in parts)
        parts = (first, second, third)
    window = sliding_window if sliding_window and sliding_window < packing.longest else None
    attend = _varlen if query.is_cuda and value.dtype is not torch.float32 else _grouped
    found = attend(parts, packing, scaling, window)
    return (found if shared is None else found.index_select(0, shared.back))[None], None


def _varlen(
    parts: QueryKeyValue, packing: Packing, scaling: float | None, window: int | None
) -> torch.Tensor:
    query, key, value = parts
    found = varlen_attn(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        packing.bounds,
        packing.bounds,
        packing.longest,
        packing.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast("torch.Tensor", found)  # without return_aux it is one


# Groups differ from batch to batch in number and padding: a compiled layer would be compiled again
# for each way that they are cut.
@torch.compiler.disable
def _grouped(
    parts: QueryKeyValue, packing: Packing, scaling: float | None, window: int | None
) -> torch.Tensor:
    outputs = []
    for group in packing.groups:
        query, key, value = (each[group.begin : group.end] for each in parts)
        outputs.append(_attend((query, key, value), group, scaling, window))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend(
    parts: QueryKeyValue, group: Group, scaling: float | None, window: int | None
) -> torch.Tensor:
    """Attention of one group, [position, head, size].

    Padding is on the right: no token sees it, so no mask is needed and the kernel without one runs.
    """
    mask = None
    if window is not None and window < group.width:
        near = torch.ones(group.width, group.width, dtype=torch.bool, device=parts[0].device)
        mask = near.tril().triu(1 - window)
    query, key, value = (_rows(each, group) for each in parts)
    found = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    flat = found.transpose(1, 2).flatten(0, 1)
    return flat if group.places is None else flat.index_select(0, group.places)


def _rows(flat: torch.Tensor, group: Group) -> torch.Tensor:
    """[row, head, width, size] of [position, head, size]."""
    if group.places is not None:
        size = (group.num_rows * group.width, *flat.shape[1:])
        flat = flat.new_zeros(size).index_copy(0, group.places, flat)
    return flat.unflatten(0, (group.num_rows, group.width)).transpose(1, 2)


AttentionInterface.register(NAME, packed_attention)
