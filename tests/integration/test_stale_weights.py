"""A parameter of each kind left behind in the engine: caught in the step that left it."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from pear_ray.embedded.paths import embedded_path
from pear_ray.engines import weights
from pear_ray.engines.policy import Policy
from pear_ray.engines.vllm import direct, held
from pear_ray.engines.vllm.weights import InProcessReceiver
from pear_ray.errors import WeightSyncError

# The embedded student (Qwen3) has these; its head is its embedding.
KINDS = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.1.post_attention_layernorm.weight",
    "model.layers.0.self_attn.q_norm.weight",
    "model.layers.2.self_attn.k_norm.weight",
    *(f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
]
# A small Qwen2 has these besides.
OTHER_KINDS = [
    "lm_head.weight",
    *(f"model.layers.0.self_attn.{name}_proj.bias" for name in "qkv"),
    "model.layers.1.self_attn.k_proj.weight",
    "model.embed_tokens.weight",
]
# Of an update so small that most of these move the canary less than rounding does.
SMALL_RATE = 1e-6


class Fault:
    """What makes the engine lose the parameter `name` on the way, from when it is `planted` on."""

    def __init__(self, name: str, how: str) -> None:
        self.name, self.how = name, how
        self.planted = False
        self.old: torch.Tensor | None = None

    def wrap(self, receive: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def receive_some(receiver: Any, update: Any) -> None:
            pairs = []
            for name, tensor in update.tensors:
                if name != self.name or not self.planted:
                    pairs.append((name, tensor))
                elif self.how == "old":
                    pairs.append((name, self.old))
                if name == self.name and not self.planted:
                    self.old = tensor.clone()
            receive(receiver, type(update)(tensors=pairs))

        return receive_some


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Fault]:
    def make(name: str, how: str) -> Fault:
        fault = Fault(name, how)
        receive = InProcessReceiver.receive_weights
        monkeypatch.setattr(InProcessReceiver, "receive_weights", fault.wrap(receive))
        return fault

    return make


@pytest.mark.parametrize(
    ("name", "how"), [(name, "old") for name in KINDS] + [(name, "skipped") for name in KINDS[:9:4]]
)
def test_a_stale_parameter_fails_the_same_step(
    start_grpo: Any, plant: Callable[[str, str], Fault], name: str, how: str
) -> None:
    fault = plant(name, how)
    worker = start_grpo(
        prompts_per_step=2,
        group_size=4,
        max_tokens=16,
        optimizer={"learning_rate": SMALL_RATE, "warmup_fraction": 0.0},
    )
    fault.planted = True
    with pytest.raises(WeightSyncError, match=f"step 1, rank 0: .* another {name}"):
        worker.step(0)


@pytest.mark.parametrize(
    ("name", "how"), [(KINDS[6], "old"), (KINDS[9], "skipped"), (KINDS[12], "old")]
)
def test_a_stale_merged_weight_fails_the_same_step(
    start_grpo: Any, plant: Callable[[str, str], Fault], name: str, how: str
) -> None:
    """The engine keeps the weight as it was with the last step's adapter."""
    fault = plant(name, how)
    worker = start_grpo(
        lora={"rank": 4},
        prompts_per_step=2,
        group_size=4,
        max_tokens=16,
        optimizer={"learning_rate": SMALL_RATE, "warmup_fraction": 0.0},
    )
    fault.planted = True
    with pytest.raises(WeightSyncError, match=f"step 1, rank 0: .* another {name}"):
        worker.step(0)


def test_a_head_packed_before_the_sync_is_stale(
    start_grpo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine stores the new embedding and computes logits with its turned copy of the old."""
    worker = start_grpo(prompts_per_step=2, group_size=4, max_tokens=16)
    write = direct.write
    monkeypatch.setattr(
        "pear_ray.engines.vllm.weights.write",
        lambda into, tensors: write({name: views[:1] for name, views in into.items()}, tensors),
    )
    with pytest.raises(WeightSyncError, match=r"another model\.embed_tokens\.weight"):
        worker.step(0)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with biases, fewer heads for keys than for queries, and a head of its own."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=272,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=257,
    )
    folder = tmp_path_factory.mktemp("qwen2")
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_path("student")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def other_engine(process_group: None, qwen2: Path, request: Any) -> Iterator[Any]:
    from pear_ray.engines.vllm.engine import VllmEngine
    from pear_ray.engines.vllm.spec import EngineSpec

    spec = EngineSpec(model=str(qwen2), dtype=request.param, max_model_len=100)
    ENGINES.append(VllmEngine(spec, takes_weights=True))
    return ENGINES[-1]


SEEDS = itertools.count()
ENGINES: list[Any] = []  # kept: the first engine to end takes vLLM's groups from all


def policy_of(folder: Path) -> Policy:
    return Policy(Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32))


def learn(policy: Policy, *, rate: float) -> None:
    """What a step of Adam does to every weight: `rate` up or down, another way at each call.

    vLLM makes a layer anew in memory that holds what was there before: a weight that is skipped
    would be the right one where an earlier test has sent the same.
    """
    generator = torch.Generator().manual_seed(next(SEEDS))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).sign(), alpha=rate)


@pytest.mark.parametrize("how", ["skipped", "old"])
@pytest.mark.parametrize("name", OTHER_KINDS)
def test_biases_and_a_head_of_its_own(
    other_engine: Any, qwen2: Path, plant: Callable[[str, str], Fault], name: str, how: str
) -> None:
    """In bfloat16 too, where the canary allows 0.3 nats and an update mostly rounds away."""
    policy = policy_of(qwen2)
    fault = plant(name, how)
    sender = other_engine.weight_sender(policy)
    assert sender.publish_weights() == []
    fault.planted = True
    learn(policy, rate=1e-5 if other_engine.spec.dtype == "float32" else 1e-4)
    assert sender.publish_weights() == [name]
    fault.planted = False
    assert sender.publish_weights() == []


def test_every_parameter_is_seen_and_no_sync_is_taken_for_stale(
    other_engine: Any, qwen2: Path
) -> None:
    policy = policy_of(qwen2)
    sender = other_engine.weight_sender(policy)
    for _ in range(5):
        learn(policy, rate=1e-4)
        assert sender.publish_weights() == []
    names = [name for name, _ in policy.causal_lm.named_parameters()]
    sent = sender._sender.sent
    (unseen,) = other_engine.llm.apply_model(lambda model: held.unseen(model, names, sent))
    assert unseen == []
    assert len(sent.seen) == len(names) == 27


def receiver_of(engine: Any) -> InProcessReceiver:
    return engine.llm.llm_engine.model_executor.driver_worker.worker.weight_transfer_engine


def test_what_is_written_in_place_is_what_a_reload_makes(other_engine: Any, qwen2: Path) -> None:
    """To the bit, after several syncs; where vLLM packs (bfloat16), every sync is a reload."""
    policy, receiver = policy_of(qwen2), receiver_of(other_engine)
    sender = other_engine.weight_sender(policy)
    assert receiver._destinations is None
    sender.publish_weights()
    in_float32 = other_engine.spec.dtype == "float32"
    assert (receiver._destinations is not None) == in_float32
    for _ in range(3):
        learn(policy, rate=1e-2)
        assert sender.publish_weights() == []
    written = other_engine.score([[*range(5, 60)], [*range(90, 60, -1)]])
    other_engine.weight_sender(policy).publish_weights()  # its first: a reload
    reloaded = other_engine.score([[*range(5, 60)], [*range(90, 60, -1)]])
    for found, wanted in zip(written, reloaded, strict=True):
        assert found.tolist() == wanted.tolist()


def test_a_model_that_cannot_be_written_is_not(other_engine: Any, qwen2: Path) -> None:
    """Of a parameter that is not read back, or that is at no place of its own."""
    sender = other_engine.weight_sender(policy_of(qwen2))
    sender.publish_weights()
    sent = sender._sender.sent

    def can_be_written() -> bool:
        (found,) = other_engine.llm.apply_model(
            lambda model: direct.find_destinations(model, sent) is not None
        )
        return found

    assert can_be_written() == (other_engine.spec.dtype == "float32")
    sent.note(["model.layers.0.conv.weight"], [torch.zeros(2, 1, 4)])
    assert not can_be_written()
    sent.not_seen.clear()
    sent.note(["model.layers.0.other.bias"], [torch.zeros(2)])
    assert not can_be_written()


def test_a_weight_of_another_shape_is_refused() -> None:
    into = {"weight": [torch.zeros(4, 3)]}
    direct.write(into, [("weight", torch.ones(3, 3))])  # the last row pads a vocabulary
    assert into["weight"][0].sum() == 9
    with pytest.raises(WeightSyncError, match=r"weight is \(1, 2\) and the engine's is \(1, 3\)"):
        direct.write(into, [("weight", torch.ones(1, 2))])


def test_what_an_engine_may_round_a_parameter_to() -> None:
    """To its dtype, or not at all where it keeps it in float32 (biases on CPUs with AMX)."""
    sent = torch.tensor([1.001, -2.003])
    rounded = sent.bfloat16()
    for reading in (sent.clone(), rounded, rounded.float()):
        assert held._same(reading, sent, torch.bfloat16)
    later = sent + 1e-5
    assert torch.equal(later.bfloat16(), rounded)
    assert not held._same(sent, later, torch.bfloat16)
    assert not held._same(sent.bfloat16(), sent * 1.1, torch.bfloat16)


def test_the_canary_alone_misses_most_of_them(
    start_grpo: Any, plant: Callable[[str, str], Fault], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why bits are compared: log-probs of one prompt do not show a small step of one parameter."""
    missed = []
    for name in (
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.1.self_attn.k_proj.weight",
    ):
        fault = plant(name, "old")
        worker = start_grpo(
            prompts_per_step=2,
            group_size=4,
            max_tokens=16,
            optimizer={"learning_rate": SMALL_RATE, "warmup_fraction": 0.0},
        )
        worker.train(worker.rollouts.reward(worker.rollouts.sample(0), policy_version=0))
        fault.planted = True
        assert worker.shared.sender.publish_weights() == [name]
        gap = weights.canary_gap(
            worker.engine,
            weights.canary_logprobs(worker.trainer.module, worker.canary),
            worker.canary,
        )
        missed.append(gap < weights.MAX_GAP["float32"])
        fault.planted = False
    assert missed == [True, True]
