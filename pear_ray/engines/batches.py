"""Rows of token ids laid end to end, and the flat view of their loss tokens for losses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from pear_ray.algorithms.batch_sizes import ENOUGH_TOKENS, enough_group_tokens
from pear_ray.algorithms.packing import (
    group_microbatches,
    length_sorted_microbatches,
    packed_microbatches,
)
from pear_ray.engines.packed_attention import Packing, make_packing, share_positions

# What one more microbatch costs where rows are padded.
OVERHEAD_TOKENS = {"cpu": 64, "cuda": 4096}


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence to train on.

    Attributes:
        token_ids: Prompt and completion.
        loss_mask: True where a token trains. The first token never does: nothing predicts it.
        aligned: Per-token numbers by name, each as long as `token_ids` (behavior log-probs, ...).
        candidates: For each loss token, one after the other, the ids and the log-probs of the same
            number of candidates; None without.
    """

    token_ids: Sequence[int]
    loss_mask: Sequence[bool]
    aligned: Mapping[str, Sequence[float]]
    candidates: tuple[Sequence[int], Sequence[float]] | None = None


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """A microbatch on a device: its rows end to end, and flat tensors over its loss tokens only.

    Attributes:
        input_ids: [position], no padding; what rows share, once.
        position_ids: [position], from 0 in each row.
        packing: Where the rows begin and end.
        positions: [token] index into [position] of what predicts each loss token.
        chosen_ids: [token] the loss tokens themselves.
        sequence_ids: [token] row of each loss token, ascending.
        aligned: [token] float32 each.
        candidate_ids: [token, candidate], or None without; -1 where the policy has no such id.
        candidate_logprobs: [token, candidate] float32, of whoever gave the candidates.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    packing: Packing
    positions: torch.Tensor
    chosen_ids: torch.Tensor
    sequence_ids: torch.Tensor
    aligned: dict[str, torch.Tensor]
    candidate_ids: torch.Tensor | None = None
    candidate_logprobs: torch.Tensor | None = None

    @property
    def loss_mask(self) -> torch.Tensor:
        """[token], all True: only loss tokens are in the flat view."""
        return torch.ones_like(self.chosen_ids, dtype=torch.bool)

    @property
    def num_loss_tokens(self) -> int:
        """Loss tokens in the batch."""
        return self.chosen_ids.numel()


def plan_microbatches(
    lengths: Sequence[int], *, max_tokens: int, device: torch.device, packs: bool
) -> list[list[int]]:
    """Which rows go together, so that the device wastes least; `packs` as the policy has it."""
    if not packs:
        return length_sorted_microbatches(
            lengths, max_tokens=max_tokens, overhead_tokens=OVERHEAD_TOKENS[device.type]
        )
    enough = min(max_tokens, max(ENOUGH_TOKENS[device.type], *lengths, 0))
    return packed_microbatches(lengths, max_tokens=enough)


def plan_group_microbatches(
    lengths: Sequence[int],
    prompt_lengths: Sequence[int],
    *,
    group_size: int,
    max_tokens: int,
    device: torch.device,
    hidden_size: int,
) -> list[list[int]]:
    """Which rows of a policy that packs go together: groups stay together, to share prompts.

    Args:
        lengths: Tokens per row, groups one after the other.
        prompt_lengths: Those of its prompt.
        group_size: Rows of one prompt.
        max_tokens: Most tokens of one microbatch, shared ones counted for each row.
        device: Where it is computed.
        hidden_size: Width of the policy's states.
    """
    enough = enough_group_tokens(device.type, hidden_size=hidden_size)
    enough = min(max_tokens, max(enough, *lengths, 0))
    return group_microbatches(
        lengths, prompt_lengths, group_size=group_size, max_tokens=max_tokens, enough=enough
    )


def collate(
    rows: Sequence[Row],
    *,
    pad_id: int,
    names: Sequence[str],
    device: torch.device,
    num_candidates: int = 0,
    shares_prompts: bool = False,
) -> TokenBatch:
    """`rows` as one batch; `names` are the aligned numbers that every row has.

    With `shares_prompts` a prompt that the row before has too is not computed again: for policies
    that pack.

    With `num_candidates` every row has so many `candidates` for each of its loss tokens.

    An empty `rows` gives a batch of two pad tokens with no loss token: a rank that runs out of rows
    still has to take part in the collectives of the others' forward and backward passes.
    """
    if not rows:
        # Two, because a compiled layer would be compiled again for a length of 1.
        none = {name: [0.0] * 2 for name in names}
        rows = [Row(token_ids=[pad_id] * 2, loss_mask=[False] * 2, aligned=none)]
    lengths = [len(row.token_ids) for row in rows]
    input_ids = _end_to_end([row.token_ids for row in rows], torch.long)
    counts = torch.tensor(lengths)
    sequence_ids = torch.arange(len(rows)).repeat_interleave(counts)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    position_ids = torch.arange(len(starts)) - starts
    loss_mask = _end_to_end([row.loss_mask for row in rows], torch.bool) & (position_ids > 0)
    chosen = loss_mask.nonzero().squeeze(-1)
    aligned = {
        name: _end_to_end([row.aligned[name] for row in rows], torch.float32)[chosen]
        for name in names
    }
    common = _shared_prompts(rows) if shares_prompts else []
    shared = share_positions(lengths, common) if any(common) else None
    predicting = chosen - 1  # position t-1 predicts token t, in the same row because t >= 1
    batch = TokenBatch(
        input_ids=input_ids if shared is None else input_ids[shared.back],
        position_ids=position_ids if shared is None else position_ids[shared.back],
        packing=make_packing(lengths, device=device, shared=shared),
        positions=predicting if shared is None else shared.expand[predicting],
        chosen_ids=input_ids[chosen],
        sequence_ids=sequence_ids[chosen],
        aligned=aligned,
        **_candidates(rows, num_candidates),
    )
    return _to(batch, device)


def _shared_prompts(rows: Sequence[Row]) -> list[int]:
    """Of each row how many tokens of its prompt the row before has as its prompt too: all or 0."""
    prompts = [row.token_ids[: _prompt_tokens(row)] for row in rows]
    pairs = zip([[], *prompts[:-1]], prompts, strict=True)
    return [len(prompt) if prompt == before else 0 for before, prompt in pairs]


def _prompt_tokens(row: Row) -> int:
    return row.loss_mask.index(True) if True in row.loss_mask else 0


def _end_to_end(columns: Sequence[Sequence[Any]], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([*chain.from_iterable(columns)], dtype=dtype)


def _candidates(rows: Sequence[Row], num_candidates: int) -> dict[str, torch.Tensor]:
    if not num_candidates:
        return {}
    found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for row in rows:
        # The first token never trains, whatever the mask says, and has no row in the flat view.
        skipped = num_candidates if row.loss_mask[0] else 0
        for into, values in zip(found, row.candidates or ([], []), strict=True):
            into.append(torch.as_tensor(values)[skipped:].reshape(-1, num_candidates))
    ids, logprobs = (torch.cat(each) for each in found)
    return {"candidate_ids": ids.long(), "candidate_logprobs": logprobs.float()}


def _to(batch: TokenBatch, device: torch.device) -> TokenBatch:
    if device.type == "cpu":
        return batch
    tensors = {
        name: value.to(device)
        for name in TokenBatch.__slots__
        if isinstance(value := getattr(batch, name), torch.Tensor)
    }
    aligned = {name: values.to(device) for name, values in batch.aligned.items()}
    return TokenBatch(**tensors, packing=batch.packing, aligned=aligned)
