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
        take: [row * width] the position of each token of each row; that of the last before
            instead of padding. None where the rows are the positions from `begin` to `end`.
    """

    begin: int
    end: int
    num_rows: int
    width: int
    take: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the rows of a packed batch begin and end.

    Attributes:
        bounds: [row + 1] int32, the rows' first tokens and the end of the last; for kernels that
            take rows of various lengths.
        longest: Tokens of the longest row.
        groups: The rows cut for kernels that do not.
        back: [position] where each is among the groups' tokens, padding counted; None where no
            group has any and no row shares.
        shared: Where rows share tokens, how the kernels' rows are made of the positions that the
            model computes; None where each row has all of its own.
    """

    bounds: torch.Tensor
    longest: int
    groups: tuple[Group, ...]
    back: torch.Tensor | None = None
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
    positions = torch.arange(sum(lengths)) if shared is None else shared.expand
    groups, places, size = [], [], 0
    for first, end in cuts:
        width = max(lengths[first:end])
        padded = any(length < width for length in lengths[first:end])
        inside = torch.arange(width).expand(end - first, width)
        last = sizes[first:end, None] - 1
        real = inside <= last
        places.append(torch.arange(size, size + real.numel())[real.flatten()])
        size += real.numel()
        take = None
        if padded or shared is not None:
            take = positions[bounds[first:end, None] + inside.minimum(last)].flatten().to(device)
        groups.append(Group(starts[first], starts[end], end - first, width, take))
    back = None
    if any(group.take is not None for group in groups):
        back = torch.cat(places)
        back = (back if shared is None else back[shared.back]).to(device)
    if shared is not None:
        shared = SharedPositions(shared.expand.to(device), shared.back.to(device))
    return Packing(bounds.to(device, torch.int32), longest, tuple(groups), back, shared)


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
    # Not [0], which in the backward pass is a tensor of zeros and a copy.
    parts = (_flat(query), _flat(key), _flat(value))
    window = sliding_window if sliding_window and sliding_window < packing.longest else None
    attend = _varlen if query.is_cuda and value.dtype is not torch.float32 else _grouped
    return attend(parts, packing, scaling, window)[None], None


def _flat(heads: torch.Tensor) -> torch.Tensor:
    """[position, head, size] of [1, head, position, size]."""
    return heads.squeeze(0).transpose(0, 1)


def _varlen(
    parts: QueryKeyValue, packing: Packing, scaling: float | None, window: int | None
) -> torch.Tensor:
    shared = packing.shared
    if shared is not None:
        first, second, third = (each.index_select(0, shared.expand) for each in parts)
        parts = (first, second, third)
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
    found = cast("torch.Tensor", found)  # without return_aux it is one
    return found if shared is None else found.index_select(0, shared.back)


# Groups differ from batch to batch in number and padding: a compiled layer would be compiled again
# for each way that they are cut.
@torch.compiler.disable
def _grouped(
    parts: QueryKeyValue, packing: Packing, scaling: float | None, window: int | None
) -> torch.Tensor:
    outputs = [_attend(parts, group, scaling, window) for group in packing.groups]
    found = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return found if packing.back is None else found.index_select(0, packing.back)


def _attend(
    parts: QueryKeyValue, group: Group, scaling: float | None, window: int | None
) -> torch.Tensor:
    """Attention of one group, padding and all, [row * width, head, size].

    Padding is on the right: no token sees it, so no mask is needed and the kernel without one runs.
    What it says itself is thrown away, so it may be any token.
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
    return found.transpose(1, 2).flatten(0, 1)


def _rows(flat: torch.Tensor, group: Group) -> torch.Tensor:
    """[row, head, width, size] of [position, head, size]."""
    rows = flat[group.begin : group.end]
    if group.take is not None:
        rows = flat.index_select(0, group.take)
    return rows.unflatten(0, (group.num_rows, group.width)).transpose(1, 2)


AttentionInterface.register(NAME, packed_attention)
