"""Rows of token ids as padded tensors, and the flat view of their loss tokens for losses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pear_ray.algorithms.packing import length_sorted_microbatches

# What one more microbatch costs: on a CPU little beside its matrix products, so rows of other
# lengths go apart rather than being padded; a GPU wants them full.
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
    """A microbatch on a device: padded inputs, and flat tensors over its loss tokens only.

    Attributes:
        input_ids: [row, seq], padded on the right.
        attention_mask: [row, seq], True at real tokens.
        positions: [token] flat index into [row, seq] of the position that predicts each loss token.
        chosen_ids: [token] the loss tokens themselves.
        sequence_ids: [token] row of each loss token, ascending.
        aligned: [token] float32 each.
        candidate_ids: [token, candidate], or None without; -1 where the policy has no such id.
        candidate_logprobs: [token, candidate] float32, of whoever gave the candidates.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
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
    lengths: Sequence[int], *, max_tokens: int, device: torch.device
) -> list[list[int]]:
    """Which rows go together, so that the device wastes least; see `length_sorted_microbatches`."""
    overhead = OVERHEAD_TOKENS[device.type]
    return length_sorted_microbatches(lengths, max_tokens=max_tokens, overhead_tokens=overhead)


def collate(
    rows: Sequence[Row],
    *,
    pad_id: int,
    names: Sequence[str],
    device: torch.device,
    num_candidates: int = 0,
) -> TokenBatch:
    """`rows` as one padded batch; `names` are the aligned numbers that every row has.

    With `num_candidates` every row has so many `candidates` for each of its loss tokens.

    An empty `rows` gives a batch of one pad token with no loss token: a rank that runs out of rows
    still has to take part in the collectives of the others' forward and backward passes.
    """
    if not rows:
        rows = [Row(token_ids=[pad_id], loss_mask=[False], aligned={name: [0.0] for name in names})]
    width = max(len(row.token_ids) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.bool)
    loss_mask = torch.zeros((len(rows), width), dtype=torch.bool)
    aligned = {name: torch.zeros((len(rows), width)) for name in names}
    for index, row in enumerate(rows):
        length = len(row.token_ids)
        input_ids[index, :length] = torch.as_tensor(row.token_ids)
        attention_mask[index, :length] = True
        loss_mask[index, 1:length] = torch.as_tensor(row.loss_mask)[1:]
        for name in names:
            aligned[name][index, :length] = torch.as_tensor(row.aligned[name], dtype=torch.float32)
    chosen = loss_mask.flatten().nonzero().squeeze(-1)
    flat = TokenBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        positions=chosen - 1,  # position t-1 predicts token t, in the same row because t >= 1
        chosen_ids=input_ids.flatten()[chosen],
        sequence_ids=chosen // width,
        aligned={name: values.flatten()[chosen] for name, values in aligned.items()},
        **_candidates(rows, num_candidates),
    )
    return _to(flat, device)


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
    return TokenBatch(**tensors, aligned=aligned)
