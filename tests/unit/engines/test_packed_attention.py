"""Rows end to end give the log-probs and gradients that transformers gives them padded."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from pear_ray.engines import packed_attention
from pear_ray.engines.batches import Row, collate
from pear_ray.engines.packed_attention import make_packing
from pear_ray.engines.packed_attention import packed_attention as attend
from pear_ray.engines.policy import Policy, checkpoint_activations, load_policy

LENGTHS = [17, 17, 5, 40, 3, 1, 12]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 70,
    "pad_token_id": 0,
}
PACKING: dict[str, PreTrainedConfig] = {
    "qwen3": Qwen3Config(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "llama": LlamaConfig(**SMALL),
    "mistral, sliding": MistralConfig(**SMALL, sliding_window=6),
    "qwen3-moe": Qwen3MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}
PADDING: dict[str, PreTrainedConfig] = {
    "gemma2, soft-capped": Gemma2Config(
        **SMALL, query_pre_attn_scalar=8, final_logit_softcapping=None
    ),
    "lfm2, convolutions": Lfm2Config(
        **{name: value for name, value in SMALL.items() if name != "head_dim"},
        layer_types=["conv", "full_attention"],
    ),
}


def rows_of(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 70, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture
def made(tmp_path: Path) -> Callable[[PreTrainedConfig], Path]:
    def make(config: PreTrainedConfig) -> Path:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        return tmp_path

    return make


def padded_reference(folder: Path, rows: list[list[int]]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Log-probs and gradients of their sum of squares, by transformers on padded rows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logprobs = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1].log_softmax(-1)
    chosen = logprobs.gather(2, ids[:, 1:, None])[:, :, 0][mask[:, 1:].bool()]
    chosen.square().sum().backward()
    return chosen.detach(), {name: p.grad for name, p in model.named_parameters()}


def check(policy: Policy, folder: Path) -> None:
    rows = rows_of(LENGTHS)
    batch = collate(
        [Row(row, [True] * len(row), {}) for row in rows],
        pad_id=0,
        names=(),
        device=torch.device("cpu"),
    )
    logprobs = policy(batch, temperature=1.0)
    logprobs.square().sum().backward()
    expected, gradients = padded_reference(folder, rows)
    torch.testing.assert_close(logprobs.detach(), expected, atol=2e-6, rtol=1e-5)
    found = dict(policy.causal_lm.named_parameters())
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        if gradient is None:  # an expert that no token chose
            assert found[name].grad is None or not found[name].grad.any()
            continue
        assert (found[name].grad - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("name", PACKING)
def test_packed_equals_padded(made: Callable[[PreTrainedConfig], Path], name: str) -> None:
    folder = made(PACKING[name])
    policy = load_policy(folder)
    assert policy.packs
    check(policy, folder)


SHARED = [  # token ids, tokens of the prompt: two groups, a row with a prompt of its own between
    ([5, 6, 7, 20, 21], 3),
    ([5, 6, 7, 30], 3),
    ([5, 6, 7, 20, 40, 41, 42], 3),
    ([5, 6, 20, 21], 2),
    ([9, 50, 51], 1),
    ([9, 52], 1),
]


def shared_rows() -> list[Row]:
    return [Row(ids, [n >= prompt for n in range(len(ids))], {}) for ids, prompt in SHARED]


@pytest.mark.parametrize("name", PACKING)
def test_a_prompt_is_computed_once_for_its_rows(
    made: Callable[[PreTrainedConfig], Path], name: str
) -> None:
    """The log-probs and gradients of rows that have all of their own."""
    folder = made(PACKING[name])
    found = []
    for shares in (False, True):
        policy = load_policy(folder)
        batch = collate(
            shared_rows(), pad_id=0, names=(), device=torch.device("cpu"), shares_prompts=shares
        )
        logprobs = policy(batch, temperature=1.0)
        logprobs.square().sum().backward()
        gradients = dict(policy.causal_lm.named_parameters())
        found.append((logprobs.detach(), {key: each.grad for key, each in gradients.items()}))
    (whole, expected), (once, gradients) = found
    torch.testing.assert_close(once, whole, atol=2e-6, rtol=1e-5)
    for key, gradient in expected.items():
        if gradient is not None:
            assert (gradients[key] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, key


def test_shared_positions_by_hand() -> None:
    batch = collate(
        shared_rows(), pad_id=0, names=(), device=torch.device("cpu"), shares_prompts=True
    )
    assert batch.input_ids.tolist() == [
        *(5, 6, 7, 20, 21),
        30,
        *(20, 40, 41, 42),
        *(5, 6, 20, 21),
        *(9, 50, 51),
        52,
    ]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 3, 4, 5, 6, 0, 1, 2, 3, 0, 1, 2, 1]
    # 30 and the second 20 are predicted by the first row's 7, and 52 by the only 9.
    assert batch.positions.tolist() == [2, 3, 2, 2, 6, 7, 8, 11, 12, 14, 15, 14]
    assert batch.sequence_ids.tolist() == [0, 0, 1, 2, 2, 2, 2, 3, 3, 4, 4, 5]


def test_packed_equals_padded_when_activations_are_computed_again(
    made: Callable[[PreTrainedConfig], Path],
) -> None:
    folder = made(PACKING["qwen3"])
    policy = load_policy(folder)
    checkpoint_activations(policy)
    check(policy, folder)


@pytest.mark.parametrize("name", PADDING)
def test_what_cannot_be_packed_is_padded(
    made: Callable[[PreTrainedConfig], Path], name: str
) -> None:
    folder = made(PADDING[name])
    policy = load_policy(folder)
    assert not policy.packs
    check(policy, folder)


@pytest.mark.parametrize("overhead", [0, 20, 10_000])
def test_groups_do_not_change_attention(monkeypatch: pytest.MonkeyPatch, overhead: int) -> None:
    """However rows are grouped, each attends as it does alone."""
    monkeypatch.setattr(packed_attention, "OVERHEAD_TOKENS", overhead)
    packing = make_packing(LENGTHS, device=torch.device("cpu"))
    assert sum(group.num_rows for group in packing.groups) == len(LENGTHS)
    assert (len(packing.groups) == 1) == (overhead == 10_000)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 4, sum(LENGTHS), 8, generator=generator)
    key, value = torch.randn(2, 1, 2, sum(LENGTHS), 8, generator=generator)
    found, _ = attend(torch.nn.Identity(), query, key, value, None, packing=packing)
    for begin, end in itertools.pairwise(packing.bounds.tolist()):
        alone = functional.scaled_dot_product_attention(
            query[:, :, begin:end],
            key[:, :, begin:end],
            value[:, :, begin:end],
            is_causal=True,
            enable_gqa=True,
        )
        torch.testing.assert_close(found[:, begin:end], alone.transpose(1, 2))


def test_the_flash_kernel_of_gpus_takes_what_it_is_given() -> None:
    """By its signature and shapes alone: meta tensors need no GPU, and compute nothing."""
    query = torch.empty(20, 4, 64, device="meta", dtype=torch.bfloat16)
    key = torch.empty(20, 2, 64, device="meta", dtype=torch.bfloat16)
    bounds = torch.empty(3, device="meta", dtype=torch.int32)
    packing = packed_attention.Packing(bounds, 12, ())
    found = packed_attention._varlen((query, key, key), packing, 0.125, 8)
    assert (found.shape, found.dtype) == (query.shape, torch.bfloat16)


def test_attention_that_is_not_understood_is_refused() -> None:
    packing = make_packing([2], device=torch.device("cpu"))
    tensor = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="softcap"):
        attend(torch.nn.Identity(), tensor, tensor, tensor, None, packing=packing, softcap=30.0)
    with pytest.raises(ValueError, match="dropout"):
        attend(torch.nn.Identity(), tensor, tensor, tensor, None, packing=packing, dropout=0.1)


def test_the_exported_config_does_not_know_of_packing(
    made: Callable[[PreTrainedConfig], Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    policy = load_policy(made(PACKING["qwen3"]))
    out = tmp_path_factory.mktemp("out")
    policy.causal_lm.save_pretrained(out)
    assert packed_attention.NAME not in (out / "config.json").read_text(encoding="utf-8")
