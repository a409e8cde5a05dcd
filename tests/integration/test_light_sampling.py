"""What is taken off vLLM's way to a token on a CPU changes no token."""

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from vllm.logprobs import FlatLogprobs
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists, LogprobsTensors
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
from vllm.v1.sample.sampler import Sampler

from pear_ray.engines.vllm import cpu_kernels
from pear_ray.engines.vllm.cpu_kernels import KernelRMSNorm, choose_product
from pear_ray.engines.vllm.lean_scheduler import LeanScheduler
from pear_ray.engines.vllm.light_sampler import (
    DRAWN_AT_ONCE,
    ListedLogprobs,
    SeedDraws,
    unranked_logprobs,
)
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


@pytest.mark.parametrize("top_k", [0, 3])
def test_a_requests_logprobs_are_those_of_vllms_arrays(top_k: int) -> None:
    """By vLLM's own processor: of one position, and of several, cut once more."""
    logprobs = torch.randn(6, 40).log_softmax(-1)
    listed = unranked_logprobs(logprobs, top_k, torch.arange(6)).tolists()
    arrays = LogprobsTensors(*unranked_logprobs(logprobs, top_k, torch.arange(6))).tolists()
    assert isinstance(listed, ListedLogprobs)
    assert isinstance(arrays.logprobs, np.ndarray)
    found, wanted = (
        [
            taken(lists.slice_request(4, 1), top_k),
            taken(lists.slice_request(1, 3), top_k),
            taken(lists.slice_request(1, 3).slice_request(0, 2), top_k),
        ]
        for lists in (listed, arrays)
    )
    assert found == wanted
    assert [len(each) for each in found] == [1, 3, 2]


def taken(lists: LogprobsLists, top_k: int) -> FlatLogprobs:
    """What vLLM's processor makes of what is a request's."""
    into = FlatLogprobs()
    processor = LogprobsProcessor(None, into, None, 0.0, top_k, None)
    processor._update_sample_logprobs(lists)
    return into


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


def test_products_of_the_engine_are_those_of_narrow_layers(engine: Any) -> None:
    (layers,) = engine.llm.apply_model(
        lambda model: [each for each in model.modules() if isinstance(each, LinearBase)]
    )
    assert layers
    for layer in layers:
        assert layer.cpu_linear.__module__ == cpu_kernels.__name__
        assert not layer.weight.numel()


@pytest.mark.parametrize("keeps_weight", [True, False])
def test_a_narrow_product_is_vllms(*, keeps_weight: bool) -> None:
    """With and without a bias, of rows in one dimension and in two, and from the weight's copy."""
    weight, bias, x = torch.randn(48, 32), torch.randn(48), torch.randn(2, 5, 32)
    layers = [torch.nn.Linear(32, 48) for _ in range(2)]
    for layer, choose in zip(layers, (choose_product, cpu_kernels._vllms_choice), strict=True):
        layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        choose(layer, remove_weight=not keeps_weight)
        assert layer.weight.numel() == keeps_weight * weight.numel()
        layer.weight.fill_(torch.nan)
    ours, theirs = (layer.cpu_linear for layer in layers)
    for rows in (x, x[0]):
        for added in (None, bias):
            found = ours(rows, layers[0].weight, added)
            torch.testing.assert_close(found, theirs(rows, layers[1].weight, added))
            torch.testing.assert_close(found, torch.nn.functional.linear(rows, weight, added))
    unit = torch.eye(32)[3:4]
    assert torch.equal(ours(unit, layers[0].weight, None)[0], weight[:, 3])


@pytest.mark.parametrize("kind", ["wide", "bfloat16"])
def test_other_products_are_left_to_vllm(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(cpu_kernels, "NARROW_NUMBERS", 32 * 48 - (kind == "wide"))
    layer = torch.nn.Linear(32, 48, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    layer.requires_grad_(requires_grad=False)
    choose_product(layer, remove_weight=True)
    assert layer.cpu_linear.__module__ != cpu_kernels.__name__
