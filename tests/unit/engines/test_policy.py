"""The policy computes the log-probs that transformers computes, at any temperature."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pear_ray.engines.batches import Row, collate
from pear_ray.engines.hf_scorer import reference_logprobs
from pear_ray.engines.policy import Policy, _guard_log_probs, load_policy
from pear_ray.errors import EngineError, InputError

ROWS = [[5, 60, 70, 80, 90, 257], [7, 33, 257]]


def row(ids: list[int]) -> Row:
    return Row(ids, [True] * len(ids), {})


@pytest.fixture(scope="module")
def policy(student: Path) -> Policy:
    return load_policy(student)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_log_probs_are_those_of_log_softmax(
    policy: Policy, student: Path, temperature: float
) -> None:
    """Rows end to end in one batch give what each row alone gives."""
    batch = collate([row(ids) for ids in ROWS], pad_id=256, names=(), device=torch.device("cpu"))
    with torch.no_grad():
        ours = policy(batch, temperature=temperature)
        theirs = []
        plain = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
        for ids in ROWS:
            logits = plain(torch.tensor([ids])).logits[0, :-1]
            logprobs = (logits / temperature).log_softmax(-1)
            theirs.append(logprobs.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1))
    torch.testing.assert_close(ours, torch.cat(theirs), atol=1e-5, rtol=0)


def test_log_probs_are_the_audits(policy: Policy, student: Path) -> None:
    batch = collate([row(ROWS[0])], pad_id=256, names=(), device=torch.device("cpu"))
    with torch.no_grad():
        ours = policy(batch, temperature=1.0).tolist()
    (theirs,) = reference_logprobs(student, ROWS[:1])
    assert theirs[0] == 0.0
    assert ours == pytest.approx(theirs[1:], abs=1e-5)


def test_an_empty_batch_gives_no_log_probs_and_zero_gradients(student: Path) -> None:
    policy = load_policy(student)
    batch = collate([], pad_id=256, names=(), device=torch.device("cpu"))
    logprobs = policy(batch, temperature=1.0)
    assert logprobs.tolist() == []
    logprobs.sum().backward()
    gradients = [p.grad for p in policy.parameters()]
    assert all(gradient is not None for gradient in gradients)
    assert all(not gradient.any() for gradient in gradients)


def test_a_model_that_changes_its_logits_is_refused(student: Path) -> None:
    causal_lm = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    _guard_log_probs(Policy(causal_lm), student)
    hidden = causal_lm.config.hidden_size
    biased = torch.nn.Linear(hidden, causal_lm.config.vocab_size)
    with torch.no_grad():
        biased.weight.copy_(causal_lm.lm_head.weight)
        biased.bias.copy_(torch.linspace(0, 5, causal_lm.config.vocab_size))
    causal_lm.lm_head = biased
    with pytest.raises(EngineError, match="changes its logits after the output layer"):
        _guard_log_probs(Policy(causal_lm), student)


def test_a_folder_that_transformers_cannot_load(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no-such-model"}', encoding="utf-8")
    with pytest.raises(InputError, match="transformers cannot load this model"):
        load_policy(folder)


def test_half_written_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="transformers cannot load this model"):
        load_policy(folder)
