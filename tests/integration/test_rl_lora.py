"""RL that trains adapters: what the engine gets, what is left of it, and exact resume."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from training_runs import parameters_of
from transformers import AutoModelForCausalLM

from pear_ray.distributed import rl_loop
from pear_ray.distributed.train_worker import export
from pear_ray.embedded.paths import embedded_path
from pear_ray.engines import lora, weights
from pear_ray.engines.policy import load_policy
from pear_ray.engines.vllm import held
from pear_ray.errors import WeightSyncError

LORA = {"rank": 4, "alpha": 8.0}
# Adapters take a rate of about ten times that of whole training.
RATE = {"learning_rate": 1e-3, "warmup_fraction": 0.0}


ENGINES: list[Any] = []  # kept: the first engine to end takes vLLM's groups from all


@pytest.fixture(scope="module")
def adapter_engine(process_group: None) -> Any:
    """An engine on the embedded student that takes adapters."""
    from pear_ray.engines.vllm.engine import VllmEngine
    from pear_ray.engines.vllm.spec import EngineSpec

    spec = EngineSpec(
        model=str(embedded_path("student")), dtype="float32", max_model_len=200, max_lora_rank=4
    )
    ENGINES.append(VllmEngine(spec, takes_weights=True))
    return ENGINES[-1]


@pytest.fixture
def start_beside(start_grpo: Any, adapter_engine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As `start_grpo`, with that engine."""
    monkeypatch.setattr(rl_loop, "open_engine", lambda spec: adapter_engine)

    def start(**rl: Any) -> Any:
        return start_grpo(lora=LORA | {"sync": "adapter"}, **rl)

    return start


@pytest.fixture
def adapting(start_grpo: Any) -> Any:
    return start_grpo(lora=LORA, optimizer=RATE)


def published(worker: Any) -> dict[str, torch.Tensor]:
    """All that a sync sends."""
    source = worker.shared.sender._sender.source
    with torch.no_grad():
        return {
            name: tensor.clone()
            for names, tensors in source.iter_groups()
            for name, tensor in zip(names, tensors, strict=True)
        }


def test_a_step_moves_adapters_alone_and_the_engine_has_them_merged(
    adapting: Any, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in parameters_of(adapting)}
    for step in range(2):  # in the first A has no gradient yet, for B is zero
        metrics = adapting.step(step)
        assert metrics["rl/mismatch/max_gap"] < 1e-4
        assert metrics["rl/sync_gap"] < 1e-5
        assert metrics["rl/grad_norm"] > 0
    changed = {n for n, value in parameters_of(adapting) if not torch.equal(value, before[n])}
    assert changed == {name for name in before if "lora_" in name}
    sent = published(adapting)
    export(adapting.trainer, adapting.chat, tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(embedded_path("student"), dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    assert sent.keys() == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(sent[name], each) for name, each in model.named_parameters())
    # What the stage leaves is that as well, under the names of any other export.
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(sent[name], each) for name, each in written.items())
    ids = [adapting.canary.input_ids.tolist()]
    expected = load_policy(tmp_path / "model")(adapting.canary, temperature=1.0)
    found = torch.from_numpy(adapting.engine.score(ids)[0][1:])
    torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=0)


def test_an_adapter_that_is_not_merged_fails_the_step(
    adapting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent as they were read, the weights agree with the engine's: the canary sees it."""
    merge = lora.merge
    places = iter(range(10**6))

    def all_but_one(weight: torch.Tensor, **adapter: Any) -> torch.Tensor:
        return weight.clone() if next(places) == 0 else merge(weight, **adapter)

    for step in range(3):  # until that one has moved
        adapting.step(step)
    monkeypatch.setattr(lora, "merge", all_but_one)
    with pytest.raises(WeightSyncError, match="step 4, rank 0: after the weight sync the engine"):
        adapting.step(3)


def test_the_reference_is_the_policy_without_adapters(start_grpo: Any) -> None:
    worker = start_grpo(lora=LORA, optimizer=RATE, kl={"coefficient": 0.1})
    assert worker.reference is None  # no second model
    assert worker.step(0)["rl/kl_to_init"] == 0.0
    assert worker.step(1)["rl/kl_to_init"] > 0.0
    groups = worker.rollouts.reward(worker.rollouts.sample(2), policy_version=0)
    start = load_policy(embedded_path("student"))
    for each in worker.minibatches(groups)[0]:
        with torch.no_grad():
            expected = start(each.batch, temperature=worker.config.temperature)
        assert torch.equal(each.batch.aligned["reference_logprobs"], expected)


def test_a_resumed_run_goes_on_bitwise(start_grpo: Any, tmp_path: Path) -> None:
    kl = {"coefficient": 0.1}
    worker = start_grpo(lora=LORA, optimizer=RATE, kl=kl)
    worker.step(0)
    worker.trainer.save(tmp_path / "checkpoint")
    metrics = worker.step(1)
    again = start_grpo(lora=LORA, optimizer=RATE, kl=kl)
    again.trainer.load(tmp_path / "checkpoint")
    again.publish_weights()
    repeated = again.step(1)
    bits = ("rl/reward/mean", "rl/loss", "rl/grad_norm", "rl/kl_to_init", "rl/mismatch/mean_gap")
    assert {name: repeated[name] for name in bits} == {name: metrics[name] for name in bits}
    pairs = zip(parameters_of(worker), parameters_of(again), strict=True)
    assert all(torch.equal(one, other) for (_, one), (_, other) in pairs)
    # The base is not in a checkpoint.
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoint").iterdir())
    assert size < sum(each.numel() for _, each in parameters_of(worker)) * 4 / 2


def test_an_engine_computes_adapters_beside_their_base(start_beside: Any) -> None:
    worker = start_beside(optimizer=RATE)
    for step in range(3):
        metrics = worker.step(step)
        assert metrics["rl/mismatch/max_gap"] < 1e-4
        assert metrics["rl/sync_gap"] < 1e-5
        assert metrics["rl/grad_norm"] > 0
    base = load_policy(embedded_path("student"))
    far = weights.canary_logprobs(base, worker.canary)
    assert weights.canary_gap(worker.engine, far, worker.canary) > 1e-3  # it is not the base


@pytest.mark.parametrize(
    "layer", ["0.self_attn.q", "1.self_attn.v", "2.self_attn.o", "0.mlp.gate", "1.mlp.up"]
)
@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_an_adapter_that_stays_behind_fails_the_same_step(
    start_beside: Any, monkeypatch: pytest.MonkeyPatch, layer: str, half: str
) -> None:
    worker = start_beside(
        prompts_per_step=2,
        group_size=4,
        max_tokens=16,
        optimizer={"learning_rate": 1e-6, "warmup_fraction": 0.0},
    )
    worker.step(0)  # after it B is not zero, and A has a gradient
    name = f"model.layers.{layer}_proj.{half}.default.weight"
    write, old = lora.write_adapter, []

    def write_stale(policy: Any, tensors: Any, folder: Path) -> None:
        own = f"causal_lm.{name}"
        write(policy, dict(tensors) | ({own: old[0]} if old else {}), folder)
        old.append(tensors[own].clone())

    monkeypatch.setattr(lora, "write_adapter", write_stale)
    worker.publish_weights()
    with pytest.raises(WeightSyncError, match=f"step 2, rank 0: .* another {name}"):
        worker.step(1)


def test_an_engine_for_adapters_takes_whole_weights_too(adapter_engine: Any) -> None:
    """Of a model without adapters, as when a process takes up an engine for its next run."""
    policy = load_policy(embedded_path("student"))
    with torch.no_grad():
        for each in policy.parameters():
            each.mul_(1.01)
    batch = weights.canary_batch(policy.causal_lm.config.vocab_size, device=torch.device("cpu"))
    sender = adapter_engine.weight_sender(policy)
    assert sender.publish_weights() == []
    gap = weights.canary_gap(adapter_engine, weights.canary_logprobs(policy, batch), batch)
    assert gap < 1e-5
    names = [name for name, _ in policy.causal_lm.named_parameters()]
    sent = sender._sender.sent
    (unseen,) = adapter_engine.llm.apply_model(lambda model: held.unseen(model, names, sent))
    assert unseen == []
    again = adapter_engine.weight_sender(load_policy(embedded_path("student")))
    assert again.publish_weights() == []  # the base that the other tests' adapters are on


def test_a_resumed_run_puts_the_adapter_in_again(start_beside: Any, tmp_path: Path) -> None:
    worker = start_beside(optimizer=RATE)
    worker.step(0)
    worker.trainer.save(tmp_path / "checkpoint")
    metrics = worker.step(1)
    again = start_beside(optimizer=RATE)
    again.trainer.load(tmp_path / "checkpoint")
    again.publish_weights()
    repeated = again.step(1)
    bits = ("rl/reward/mean", "rl/loss", "rl/grad_norm", "rl/mismatch/mean_gap")
    assert {name: repeated[name] for name in bits} == {name: metrics[name] for name in bits}
