"""A compiled policy gives the log-probs and gradients of the same policy op by op."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM

from pear_ray.config.lora import LoraConfig
from pear_ray.engines import packed_attention
from pear_ray.engines.batches import Row, TokenBatch, collate
from pear_ray.engines.compiling import check_compiler, compile_layers
from pear_ray.engines.lora import adapt, left_out
from pear_ray.engines.policy import Policy, checkpoint_activations, load_policy
from pear_ray.errors import EngineError

COMPILES = shutil.which(os.environ.get("CXX", "g++")) is not None
# Rows of various numbers and lengths: one alone, all alike, some to pad, none at all.
FIRST = [[17, 17, 5, 40, 3, 12], [30]]
OTHERS = [[9, 80, 22, 22], [50, 50], [], [7, 8, 9, 10, 11]]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batch_of(lengths: list[int], *, shares: bool = False) -> TokenBatch:
    generator = torch.Generator().manual_seed(sum(lengths))
    prompt = [5, 60, 70]
    rows = [
        Row(
            prompt + torch.randint(5, 250, (length,), generator=generator).tolist(),
            [False] * len(prompt) + [True] * length,
            {},
        )
        for length in lengths
    ]
    return collate(rows, pad_id=256, names=(), device=torch.device("cpu"), shares_prompts=shares)


def passes(policy: Policy, batch: TokenBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    policy.zero_grad()
    logprobs = policy(batch, temperature=1.0)
    logprobs.square().sum().backward()
    named = policy.named_parameters()
    return logprobs.detach(), {
        name: each.grad.clone() for name, each in named if each.requires_grad
    }


def compare(ours: Policy, plain: Policy, batch: TokenBatch) -> None:
    (found, gradients), (wanted, expected) = passes(ours, batch), passes(plain, batch)
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)
    assert gradients.keys() == expected.keys()  # the names of an uncompiled policy
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("recomputes", [pytest.param(False, marks=pytest.mark.slow), True])
def test_rows_of_changing_lengths_share_their_graphs(student: Path, recomputes: bool) -> None:  # noqa: FBT001
    ours, plain = load_policy(student), load_policy(student)
    if recomputes:
        checkpoint_activations(ours)
    compile_layers(ours, device="cpu", backend="aot_eager")
    for lengths in FIRST:
        compare(ours, plain, batch_of(lengths))
    num_graphs = counters["stats"]["unique_graphs"]
    # Before and after attention, which is not compiled on CPU, of all layers together; one of them
    # again where one group is all rows; two of the head.
    assert num_graphs <= 9
    for lengths in OTHERS:
        compare(ours, plain, batch_of(lengths))
    batch = batch_of(FIRST[0])
    with torch.no_grad():
        without = ours(batch, temperature=1.0)
    assert not without.requires_grad
    assert torch.equal(without, ours(batch, temperature=1.0))  # as RL's ratios want
    assert counters["stats"]["unique_graphs"] == num_graphs
    assert ours.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.slow
def test_shared_prompts(student: Path) -> None:
    """As RL takes its groups: another graph for the rows' tokens, no other numbers."""
    ours, plain = load_policy(student), load_policy(student)
    compile_layers(ours, device="cpu", backend="aot_eager")
    for lengths in ([3, 5, 4], [9, 2, 7, 7]):
        compare(ours, plain, batch_of(lengths, shares=True))


@pytest.mark.slow
def test_adapters(student: Path) -> None:
    ours, plain = load_policy(student), load_policy(student)
    for policy in (ours, plain):
        adapt(policy, LoraConfig(rank=2), base=student, seed=1)
    compile_layers(ours, device="cpu", backend="aot_eager")
    for lengths in FIRST:
        compare(ours, plain, batch_of(lengths))


@torch.no_grad()
def test_adapters_that_are_left_out(student: Path) -> None:
    policy, base, batch = load_policy(student), load_policy(student), batch_of([9, 4])
    adapt(policy, LoraConfig(rank=4), base=student, seed=0)
    for parameter in policy.parameters():
        if parameter.requires_grad:  # a B that is not zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    with_them, without = (each(batch, temperature=1.0) for each in (policy, base))
    compile_layers(policy, device="cpu", backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(policy(batch, temperature=1.0), with_them, atol=1e-5, rtol=0)
        with left_out(policy):
            torch.testing.assert_close(policy(batch, temperature=1.0), without, atol=1e-5, rtol=0)
    assert (with_them - without).abs().max() > 1e-3


def test_a_layer_is_one_graph_where_attention_has_a_kernel_for_rows(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's flash attention breaks no graph, and no length compiles again: on tensors without
    data, whose kernels a machine without a GPU has too."""
    meta = torch.device("meta")
    with meta:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(student)).bfloat16()
    model.set_attn_implementation(packed_attention.NAME)
    monkeypatch.setattr(packed_attention, "_grouped", packed_attention._varlen)
    compile_layers(Policy(model), device="cpu", backend="aot_eager")
    for lengths in ([64], [40, 9, 7], [5, 5], [30, 1, 4, 5]):
        ids = torch.zeros(1, sum(lengths), dtype=torch.long, device=meta)
        packing = packed_attention.make_packing(lengths, device=meta)
        decoder = model.get_decoder()
        found = decoder(input_ids=ids, position_ids=ids, use_cache=False, packing=packing)
        found.last_hidden_state.sum().backward()
        assert (counters["stats"]["unique_graphs"], counters["graph_break"]) == (1, {})


@pytest.mark.slow
@pytest.mark.skipif(not COMPILES, reason="needs a C++ compiler")
def test_generated_code(student: Path) -> None:
    ours, plain = load_policy(student), load_policy(student)
    compile_layers(ours, device="cpu")
    for lengths in FIRST + OTHERS:
        compare(ours, plain, batch_of(lengths))


@pytest.mark.parametrize(("device", "name"), [("cpu", "CXX"), ("cuda", "CC")])
def test_a_machine_without_a_compiler_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, name: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(name, raising=False)
    with pytest.raises(EngineError, match=f"or name one in {name}.*compile=false"):
        check_compiler(device)
    compiler = tmp_path / "my-compiler"
    compiler.touch(mode=0o755)
    monkeypatch.setenv(name, "my-compiler")
    check_compiler(device)
