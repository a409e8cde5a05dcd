"""Adapters: where they go, what they begin with, and what is left of them on disk."""

import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config

from pear_ray.config.lora import LoraConfig
from pear_ray.engines.batches import Row, collate
from pear_ray.engines.lora import adapt, file_names, left_out, merged, write_adapter
from pear_ray.engines.policy import Policy, load_policy
from pear_ray.engines.target_modules import check_target_modules
from pear_ray.engines.trainer import write_model
from pear_ray.errors import ConfigError, InputError

KINDS = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


def trained(policy: Policy) -> dict[str, torch.nn.Parameter]:
    return {name: each for name, each in policy.named_parameters() if each.requires_grad}


def adapted(student: Path, *, seed: int = 0, **settings: object) -> Policy:
    policy = load_policy(student)
    adapt(policy, LoraConfig(**settings), base=student, seed=seed)
    return policy


@torch.no_grad()
def logprobs(policy: Policy) -> torch.Tensor:
    ids = [5, 60, 70, 80, 90, 257]
    batch = collate(
        [Row(ids, [True] * len(ids), {})], pad_id=256, names=(), device=torch.device("cpu")
    )
    return policy(batch, temperature=1.0)


@torch.no_grad()
def moved(policy: Policy) -> Policy:
    """With a B that is not zero."""
    torch.manual_seed(7)
    for parameter in trained(policy).values():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return policy


def test_only_adapters_train_and_the_model_begins_as_it_was(student: Path) -> None:
    policy = adapted(student, rank=3, target_modules=["q_proj", "layers.1.mlp.up_proj"])
    config = policy.causal_lm.config
    hidden, layers = config.hidden_size, config.num_hidden_layers
    heads = config.num_attention_heads * config.head_dim
    inner = config.intermediate_size
    # A is 3 x in, B is out x 3.
    expected = layers * 3 * (hidden + heads) + 3 * (hidden + inner)
    assert sum(each.numel() for each in trained(policy).values()) == expected
    assert all("lora_" in name for name in trained(policy))
    assert torch.equal(logprobs(policy), logprobs(load_policy(student)))


def test_adapters_begin_as_the_seed_says(student: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = trained(adapted(student, seed=4))
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's draws move
    torch.manual_seed(2)  # another rank, another past
    again, other = trained(adapted(student, seed=4)), trained(adapted(student, seed=5))
    assert all(torch.equal(each, again[name]) for name, each in first.items())
    drawn = [name for name in first if "lora_A" in name]
    assert len(drawn) == len(first) / 2
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


@pytest.mark.parametrize("head", ["tied", "its own"])
def test_the_merged_model_and_the_adapter_are_what_was_trained(
    student: Path, tmp_path: Path, head: str
) -> None:
    base = student if head == "tied" else untied(student, tmp_path / "untied")
    policy = moved(adapted(base, rank=4, alpha=6.0))
    weights = {name: each.detach() for name, each in trained(policy).items()}
    write_adapter(policy, weights, tmp_path / "adapter")
    whole = merged(base, tmp_path / "adapter")
    write_model(whole, whole.state_dict(), tmp_path / "model", lambda _: None)
    expected = logprobs(policy)
    assert (expected - logprobs(load_policy(base))).abs().max() > 0.1
    written = logprobs(load_policy(tmp_path / "model"))
    torch.testing.assert_close(written, expected, atol=1e-5, rtol=0)
    by_peft = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")  # finds its base
    torch.testing.assert_close(
        logprobs(Policy(by_peft.get_base_model())), expected, atol=1e-5, rtol=0
    )
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "model"))
    assert before.keys() == after.keys()
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_left_out_the_model_is_what_it_was(student: Path) -> None:
    policy, base = moved(adapted(student, rank=4)), load_policy(student)
    with_them = logprobs(policy)
    with left_out(policy):
        assert torch.equal(logprobs(policy), logprobs(base))
        assert all(each.requires_grad for each in trained(policy).values())
    assert not torch.equal(with_them, logprobs(base))
    assert torch.equal(logprobs(policy), with_them)


def test_left_out_also_where_what_is_inside_raises(student: Path) -> None:
    policy = moved(adapted(student, rank=4))
    with_them = logprobs(policy)
    with pytest.raises(ValueError, match="inside"), left_out(policy):
        raise ValueError("inside")
    assert torch.equal(logprobs(policy), with_them)


def test_weights_have_the_names_of_the_file(student: Path) -> None:
    policy = adapted(student, rank=2, target_modules=["q_proj", "layers.1.mlp.up_proj"])
    names = file_names(policy.causal_lm)
    assert list(names) == [name for name, _ in load_policy(student).causal_lm.named_parameters()]
    others = {name: own for name, own in names.items() if name != own}
    assert others["model.layers.1.mlp.up_proj.weight"] == (
        "model.layers.1.mlp.up_proj.base_layer.weight"
    )
    assert len(others) == policy.causal_lm.config.num_hidden_layers + 1


def untied(student: Path, folder: Path) -> Path:
    """The student with a head of its own."""
    shutil.copytree(student, folder)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(2 * model.model.embed_tokens.weight.detach())
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("target", ["q_proj", "self_attn.q_proj", "model.layers.0.mlp.up_proj"])
def test_the_end_of_a_layers_name_will_do(student: Path, target: str) -> None:
    check_target_modules(student, [target], key="sft.lora")


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["proj"], "is called 'proj'"),
        (["mlp"], "is called 'mlp'"),
        (["embed_tokens"], "is called 'embed_tokens'"),
        (["q_proj", "gate"], f"is called 'gate'; did you mean 'gate_proj'?; there are {KINDS} ("),
        (["layers.9.mlp.up_proj"], "is called 'layers.9.mlp.up_proj'"),
    ],
)
def test_layers_that_are_not_there(student: Path, targets: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_target_modules(student, targets, key="sft.lora")
    assert words in str(caught.value)


def test_layers_are_known_without_weights(tmp_path: Path) -> None:
    """Of a model that would take 64 GB."""
    Qwen3Config(hidden_size=8192, num_hidden_layers=24).save_pretrained(tmp_path)
    check_target_modules(tmp_path, ["q_proj"], key="sft.lora")
    with pytest.raises(ConfigError, match=f"there are {KINDS} "):
        check_target_modules(tmp_path, ["wq"], key="sft.lora")


def test_a_config_that_makes_no_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no-such-model"}', encoding="utf-8")
    with pytest.raises(InputError, match="transformers cannot make a model of this config"):
        check_target_modules(folder, ["q_proj"], key="sft.lora")
