"""vLLM's sampler on a CPU without what costs time there and changes no token.

vLLM draws one random number for each request and token by itself: of 64 requests beside a small
model that is a thirtieth of a rollout's time. And it ranks every token among all of the vocabulary,
which nothing here reads, by a function that it has compiled at its first call: 2 s in every process
with an engine, 10 s on a machine that has not compiled it yet.
"""

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

DRAWN_AT_ONCE = 64
LIMIT = 2**31  # what vLLM draws below


class SeedDraws:
    """Stands in for the `forward` of a `TopKTopPSampler`, and samples the same tokens."""

    def __init__(self, sampler: TopKTopPSampler) -> None:
        self._sampler = sampler
        self._draws: WeakKeyDictionary[torch.Generator, Iterator[int]] = WeakKeyDictionary()

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
        seeds = torch.randint(LIMIT, (len(logits),))  # as vLLM: for rows without a generator
        rows = list(generators)
        seeds[rows] = torch.tensor([next(self._of(generators[row])) for row in rows])
        exact = logits.float()
        # vLLM's kernel: Gumbel noise of each row's seed, and the largest.
        tokens = torch.ops._C.fused_gumbel_argmax(exact, seeds)  # noqa: SLF001
        return tokens, exact.log_softmax(-1)

    def _of(self, generator: torch.Generator) -> Iterator[int]:
        found = self._draws.get(generator)
        if found is None:
            found = self._draws[generator] = _drawn(generator)
        return found


def _drawn(generator: torch.Generator) -> Iterator[int]:
    """What `generator` gives one by one."""
    while True:
        yield from torch.randint(LIMIT, (DRAWN_AT_ONCE,), generator=generator).tolist()


def unranked_logprobs(
    logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor
) -> LogprobsTensors:
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
    return LogprobsTensors(ids.to(torch.int32), found, torch.zeros_like(token_ids))


def lighten(worker: Any) -> None:
    """Have a worker of vLLM sample so."""
    sampler = worker.model_runner.sampler
    sampler.topk_topp_sampler.forward = SeedDraws(sampler.topk_topp_sampler)
    sampler.gather_logprobs = unranked_logprobs
