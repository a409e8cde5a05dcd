"""What is taken off vLLM's way to a token on a CPU changes no token."""

import weakref
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
from vllm.v1.sample.sampler import Sampler

from pear_ray.engines.vllm.cpu_kernels import KernelRMSNorm
from pear_ray.engines.vllm.lean_scheduler import LeanScheduler
from pear_ray.engines.vllm.light_sampler import DRAWN_AT_ONCE, SeedDraws, unranked_logprobs
from pear_ray.engines.vllm.spec import CPU_BLOCK_TOKENS, Sampling

PROMPTS = [list(range(10, 10 + length)) for length in (5, 31, 32, 33, 63)]
LENGTH = 70  # over two of the cache's blocks from any of them


def sampling() -> list[Sampling]:
    return [Sampling(num_samples=2, temperature=1.0, max_tokens=LENGTH, seed=3)] * len(PROMPTS)


def tokens(engine: Any) -> list[list[int]]:
    groups = engine.generate(PROMPTS, sampling())
    return [sample.token_ids for group in groups for sample in group]


def test_cache_is_asked_for_once_per_block(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens as where vLLM asks at every one."""
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    assert isinstance(scheduler, LeanScheduler)
    manager, places = scheduler.kv_cache_manager, []
    allocate = manager.coordinator.allocate_new_blocks

    def counted(request_id: str, need: int, *others: Any) -> Any:
        places.append((need - 1) % CPU_BLOCK_TOKENS)  # of the last token, in its block
        return allocate(request_id, need, *others)

    monkeypatch.setattr(manager.coordinator, "allocate_new_blocks", counted)
    ours = tokens(engine)
    lean = len(places) - 2 * len(PROMPTS)  # but for the prompts
    block = CPU_BLOCK_TOKENS
    begun = [(len(each) + LENGTH - 1) // block - (len(each) - 1) // block for each in PROMPTS]
    assert 0 < lean <= 2 * sum(begun)
    places.clear()
    monkeypatch.delattr(manager, "allocate_slots")  # from here on the class's
    assert tokens(engine) == ours
    assert len(places) > 10 * lean


@pytest.mark.parametrize("vocab_size", [7, 300])
def test_seeds_drawn_ahead_sample_the_same_tokens(vocab_size: int) -> None:
    """Past the numbers drawn at once, and with a row that has no generator."""
    sampler = TopKTopPSampler("processed_logprobs")
    ours, rows = SeedDraws(sampler), (0, 2, 3)
    theirs_of, ours_of = (
        {row: torch.Generator().manual_seed(row + 1) for row in rows} for _ in range(2)
    )
    source = torch.Generator().manual_seed(9)
    for _ in range(DRAWN_AT_ONCE + 3):
        logits = torch.randn(4, vocab_size, generator=source)
        torch.manual_seed(11)
        wanted, wanted_logprobs = sampler.forward_cpu(logits.clone(), theirs_of, None, None)
        torch.manual_seed(11)
        found, logprobs = ours(logits.clone(), ours_of, None, None)
        assert torch.equal(found, wanted)
        torch.testing.assert_close(logprobs, wanted_logprobs, rtol=0, atol=0)


def test_requests_without_a_seed() -> None:
    sampler = TopKTopPSampler("processed_logprobs")
    found = []
    for sample in (SeedDraws(sampler), sampler.forward_cpu):
        torch.manual_seed(11)
        found.append(sample(torch.arange(12.0).view(3, 4).clone(), {}, None, None)[0])
    assert torch.equal(*found)


def test_requests_that_come_and_go_keep_their_numbers() -> None:
    """One that is left out of some batches goes on where it was; one that ends is let go of."""
    sampler = TopKTopPSampler("processed_logprobs")
    ours, logits = SeedDraws(sampler), torch.randn(3, 50)
    theirs_of, ours_of = ([torch.Generator().manual_seed(row) for row in range(3)] for _ in "ab")
    for step in range(2 * DRAWN_AT_ONCE):
        here = [row for row in range(3) if row != step % 4]
        found, wanted = (
            sample(logits[here].clone(), dict(enumerate(of[row] for row in here)), None, None)[0]
            for sample, of in ((ours, ours_of), (sampler.forward_cpu, theirs_of))
        )
        assert torch.equal(found, wanted)
    gone = weakref.ref(ours_of.pop(0))
    ours(logits[:2].clone(), dict(enumerate(ours_of)), None, None)
    assert gone() is None


@pytest.mark.parametrize("top_k", [0, 3])
def test_logprobs_are_vllms_but_for_the_ranks(top_k: int) -> None:
    logprobs = torch.randn(5, 40).log_softmax(-1)
    token_ids = torch.tensor([3, 39, 0, 7, 7])
    found = unranked_logprobs(logprobs, top_k, token_ids)
    wanted = Sampler.gather_logprobs(logprobs, top_k, token_ids)
    assert torch.equal(found.logprob_token_ids, wanted.logprob_token_ids)
    assert torch.equal(found.logprobs, wanted.logprobs)
    ranks = found.selected_token_ranks
    assert ranks.dtype is wanted.selected_token_ranks.dtype
    assert ranks.tolist() == [0] * 5


def test_the_engine_samples_so(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same tokens through vLLM's own ways."""
    runner = engine.llm.llm_engine.model_executor.driver_worker.model_runner
    assert isinstance(runner.sampler.topk_topp_sampler.forward, SeedDraws)
    assert runner.sampler.gather_logprobs is unranked_logprobs
    layers = [each for each in runner.model.modules() if isinstance(each, Attention)]
    assert layers
    assert all(each.use_direct_call for each in layers)
    ours = engine.generate(PROMPTS, sampling())
    monkeypatch.delattr(runner.sampler, "gather_logprobs")  # from here on the class's
    for layer in layers:
        monkeypatch.setattr(layer, "use_direct_call", False)
    assert engine.generate(PROMPTS, sampling()) == ours


def test_norms_of_the_engine_are_the_kernels(engine: Any) -> None:
    """Against vLLM's own operations; queries and keys are a part of a larger tensor."""
    (norms,) = engine.llm.apply_model(
        lambda model: [each for each in model.modules() if isinstance(each, RMSNorm)]
    )
    assert norms
    for norm in norms:
        assert isinstance(norm, KernelRMSNorm)
        width = norm.hidden_size
        whole = torch.randn(6, 3 * 4 * width)
        heads = whole[:, 4 * width : 8 * width].unflatten(1, (4, width))
        torch.testing.assert_close(norm(heads), norm.forward_native(heads))
        hidden, residual = torch.randn(2, 6, width)
        wanted = norm.forward_native(hidden.clone(), residual.clone())
        torch.testing.assert_close(norm(hidden, residual), wanted)
