"""vLLM's sampler on a CPU without what costs time there and changes no token.

vLLM draws one random number for each request and token by itself: of 64 requests beside a small
model that is a thirtieth of a rollout's time. And it ranks every token among all of the vocabulary,
which nothing here reads, by a function that it has compiled at its first call: 2 s in every process
with an engine, 10 s on a machine that has not compiled it yet. And it takes a batch's log-probs
apart by three slices of an array, and three lists of those, for each request: a fiftieth.
"""

import operator
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.outputs import LogprobsLists, LogprobsTensors
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

DRAWN_AT_ONCE = 64
LIMIT = 2**31  # what vLLM draws below


class SeedDraws:
    """Stands in for the `forward` of a `TopKTopPSampler`, and samples the same tokens."""

    def __init__(self, sampler: TopKTopPSampler) -> None:
        self._sampler = sampler
        # What is left of each one's numbers, the next one last; nothing in it keeps a generator.
        self._drawn: WeakKeyDictionary[torch.Generator, list[int]] = WeakKeyDictionary()
        self._last: tuple[list[torch.Generator], list[list[int]]] = ([], [])

    def __call__(
        self,
        logits: torch.Tensor,
        generators: Mapping[int, torch.Generator],
        k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A token of each row of float32 [row, vocab], and the log-probs of all.

        Args:
            logits: Divided by the temperature.
            generators: By row, of those that have one: its next number seeds the row's noise.
            k: vLLM's own code answers if it is given.
            p: As `k`.
        """
        sampler = self._sampler
        plain = k is None and p is None and not sampler.use_fp64_gumbel
        if not plain or sampler.logprobs_mode != "processed_logprobs":
            return sampler.forward_cpu(logits, generators, k, p)
        rows = list(generators)
        seeds = torch.tensor(self._next(generators.values()), dtype=torch.int64)
        if rows != list(range(len(logits))):
            drawn = seeds
            seeds = torch.randint(LIMIT, (len(logits),))  # as vLLM: for rows without a generator
            seeds[rows] = drawn
        exact = logits.float()
        # vLLM's kernel: Gumbel noise of each row's seed, and the largest.
        tokens = torch.ops._C.fused_gumbel_argmax(exact, seeds)  # noqa: SLF001
        return tokens, exact.log_softmax(-1)

    def _next(self, generators: Iterable[torch.Generator]) -> list[int]:
        """The next number of each."""
        now = list(generators)
        # Mostly the same ones as at the last token: looking each up took longer than the drawing.
        if len(now) != len(self._last[0]) or not all(map(operator.is_, now, self._last[0])):
            self._last = (now, [self._drawn.setdefault(each, []) for each in now])
        for generator, drawn in zip(*self._last, strict=True):
            if not drawn:
                ahead = torch.randint(LIMIT, (DRAWN_AT_ONCE,), generator=generator)
                drawn.extend(ahead.flip(0).tolist())
        return [drawn.pop() for drawn in self._last[1]]


class _Listed(list[Any]):
    """A list where vLLM has an array, and asks for its list."""

    __slots__ = ()

    def tolist(self) -> list[Any]:
        return self


class _Unranked(int):
    """The rank of each token."""

    def tolist(self) -> int:
        return 0


_RANKS = [_Unranked()]


class ListedLogprobs(LogprobsLists):
    """A batch's log-probs, taken apart by requests as lists."""

    __slots__ = ()

    def slice_request(self, req_idx: int, num_positions: int) -> "ListedLogprobs":
        """Those of a request."""
        end = req_idx + num_positions
        return ListedLogprobs(
            self.logprob_token_ids[req_idx:end], self.logprobs[req_idx:end], _RANKS * num_positions
        )


class UnrankedLogprobs(LogprobsTensors):
    """Log-probs whose ranks are all 0."""

    __slots__ = ()

    def tolists(self, cu_num_generated_tokens: list[int] | None = None) -> LogprobsLists:
        """As vLLM's, in lists where each request has one token."""
        if cu_num_generated_tokens is not None:
            return super().tolists(cu_num_generated_tokens)
        rows = (map(_Listed, each.tolist()) for each in (self.logprob_token_ids, self.logprobs))
        ids, logprobs = map(list, rows)
        return ListedLogprobs(ids, logprobs, _RANKS * len(ids))


def unranked_logprobs(
    logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor
) -> UnrankedLogprobs:
    """What a `Sampler` gathers of [row, vocab], with 0 for the rank of each row's token.

    Args:
        logprobs: Of all ids.
        num_logprobs: How many of the likeliest are wanted beside the row's own.
        token_ids: int64 [row].
    """
    ids = token_ids.unsqueeze(-1)
    found = logprobs.gather(-1, ids)
    if num_logprobs:
        likeliest, their_ids = logprobs.topk(num_logprobs, dim=-1)
        ids = torch.cat((ids, their_ids), dim=1)
        found = torch.cat((found, likeliest), dim=1)
    return UnrankedLogprobs(ids.to(torch.int32), found, torch.zeros_like(token_ids))


def lighten(worker: Any) -> None:
    """Have a worker of vLLM, with its model, take no more steps to a token than needed."""
    sampler = worker.model_runner.sampler
    sampler.topk_topp_sampler.forward = SeedDraws(sampler.topk_topp_sampler)
    sampler.gather_logprobs = unranked_logprobs
    for layer in worker.model_runner.model.modules():
        if isinstance(layer, Attention):
            # Otherwise through an operator that hides it from torch.compile, which does not run.
            layer.use_direct_call = True
