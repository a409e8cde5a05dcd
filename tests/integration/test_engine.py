"""The engine against transformers, before and after weights change: no stand-in anywhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pear_ray.embedded.paths import embedded_path
from pear_ray.engines import weights as canary
from pear_ray.engines.hf_scorer import reference_logprobs
from pear_ray.engines.policy import load_policy
from pear_ray.engines.vllm import weights as transfer
from pear_ray.engines.vllm.spec import Sampling
from pear_ray.errors import WeightSyncError

STUDENT = embedded_path("student")
PROMPTS = [list(range(10, 40)), [12, 50, 51], list(range(60, 20, -1))]


def sampling(seed: int, *, temperature: float = 1.0) -> Sampling:
    return Sampling(num_samples=3, temperature=temperature, max_tokens=24, seed=seed)


@pytest.fixture
def policy(engine: Any) -> Any:
    """The student in training, with the engine on the same weights before and after the test."""
    fresh = load_policy(STUDENT)
    engine.weight_sender(fresh).publish_weights()
    yield fresh
    engine.weight_sender(load_policy(STUDENT)).publish_weights()


@torch.no_grad()
def own_logits(policy: Any, ids: torch.Tensor) -> torch.Tensor:
    """[position, vocab] of one row, by transformers' own attention; the policy is left with it."""
    policy.causal_lm.set_attn_implementation("sdpa")
    return policy.causal_lm(ids, use_cache=False).logits[0]


def perturb(policy: Any, *, size: float = 0.05) -> None:
    """Move every parameter, so that no stale one can hide."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


@pytest.mark.usefixtures("policy")  # whatever tests before it have left in the engine
def test_scores_are_those_of_transformers(engine: Any) -> None:
    scored = engine.score(PROMPTS)
    for ours, theirs in zip(scored, reference_logprobs(STUDENT, PROMPTS), strict=True):
        assert ours[0] == 0.0
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
def test_sampled_logprobs_are_of_the_distribution_sampled_from(
    engine: Any, policy: Any, temperature: float
) -> None:
    groups = engine.generate(PROMPTS, [sampling(5, temperature=temperature)] * len(PROMPTS))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for one in group:
            ids = torch.tensor([prompt + one.token_ids])
            logits = own_logits(policy, ids)[len(prompt) - 1 : -1]
            chosen = (logits / temperature).log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
            np.testing.assert_allclose(one.behavior_logprobs, chosen.squeeze(1), atol=1e-5)


def test_seeded_samples_do_not_depend_on_the_rest_of_the_batch(engine: Any) -> None:
    together = engine.generate(PROMPTS, [sampling(seed) for seed in (1, 2, 3)])
    alone = engine.generate(PROMPTS[1:2], [sampling(2)])
    assert [one.token_ids for one in together[1]] == [one.token_ids for one in alone[0]]
    other = engine.generate(PROMPTS[1:2], [sampling(4)])
    assert [one.token_ids for one in other[0]] != [one.token_ids for one in alone[0]]


def test_many_seeded_prompts_do_not_need_a_cut_prefill(engine: Any) -> None:
    """More prompt tokens than one prefill holds: vLLM's cut of a seeded request fails on CPU."""
    prompts = [[10 + i % 50] * 150 for i in range(40)]
    groups = engine.generate(prompts, [sampling(i) for i in range(40)])
    assert [len(group) for group in groups] == [3] * 40


def test_published_weights_are_the_engines(engine: Any, policy: Any) -> None:
    perturb(policy)
    before = engine.score(PROMPTS)
    engine.weight_sender(policy).publish_weights()
    batch = canary.canary_batch(policy.causal_lm.config.vocab_size, device=torch.device("cpu"))
    assert canary.canary_gap(engine, canary.canary_logprobs(policy, batch), batch) < 1e-5
    moved = max(np.abs(a - b).max() for a, b in zip(before, engine.score(PROMPTS), strict=True))
    assert moved > 0.1  # the perturbation was worth noticing


def test_a_stale_tied_head_is_caught(
    engine: Any, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own fault on CPU, planted by taking our mend away."""
    perturb(policy, size=0.01)
    monkeypatch.setattr(transfer, "repack_heads", lambda before: None)
    engine.weight_sender(policy).publish_weights()
    batch = canary.canary_batch(policy.causal_lm.config.vocab_size, device=torch.device("cpu"))
    gap = canary.canary_gap(engine, canary.canary_logprobs(policy, batch), batch)
    with pytest.raises(WeightSyncError, match="does not hold the trainer's weights"):
        canary.check_gap(gap, max_gap=canary.MAX_GAP["float32"], where="step 1, rank 0")


def test_the_prefix_cache_forgets_old_weights(engine: Any, policy: Any) -> None:
    """Prompts longer than vLLM's CPU cache block (128 tokens), or the fault does not show."""
    prompt = [10 + i % 60 for i in range(150)]
    engine.generate([prompt], [sampling(1)])
    perturb(policy)
    engine.weight_sender(policy).publish_weights()
    (one, *_), *_ = engine.generate([prompt], [sampling(1)])
    ids = torch.tensor([prompt + one.token_ids])
    logprobs = own_logits(policy, ids)[149:-1].log_softmax(-1)
    chosen = logprobs.gather(1, ids[0, 150:, None]).squeeze(1)
    np.testing.assert_allclose(one.behavior_logprobs, chosen, atol=1e-5)


def test_a_checkpoint_is_loaded_and_checked(engine: Any, policy: Any, tmp_path: Path) -> None:
    perturb(policy)
    policy.causal_lm.save_pretrained(tmp_path)
    assert canary.load_checkpoint(engine, tmp_path, max_gap=1e-4) < 1e-5
