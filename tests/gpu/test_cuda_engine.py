"""An engine on the trainer's own GPU: it sleeps, wakes, and answers with the trainer's weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pear_ray.config.colocation import ColocationConfig
from pear_ray.config.sections import OptimizerConfig
from pear_ray.distributed.colocation import SharedDevice, optimizer_rests_on
from pear_ray.distributed.train_worker import memory_in_use
from pear_ray.engines import weights
from pear_ray.engines.hf_scorer import reference_logprobs
from pear_ray.engines.native_trainer import NativeTrainer
from pear_ray.engines.policy import load_policy, shard
from pear_ray.engines.vllm.spec import Sampling
from pear_ray.errors import EngineError

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SAMPLING = Sampling(num_samples=4, temperature=1.0, max_tokens=32, seed=3)


def test_scores_are_those_of_transformers(engine: Any, student: Path) -> None:
    rows = [torch.randint(5, 250, (length,)).tolist() for length in (5, 64, 150)]
    for found, wanted in zip(engine.score(rows), reference_logprobs(student, rows), strict=True):
        assert abs(found[1:] - wanted[1:]).mean() < 0.05  # bfloat16


def test_sampled_logprobs_are_what_scoring_finds(engine: Any) -> None:
    prompt = list(range(10, 30))
    [completions] = engine.generate([prompt], [SAMPLING])
    for one in completions:
        [scored] = engine.score([prompt + one.token_ids])
        gap = abs(scored[len(prompt) :] - torch.tensor(one.behavior_logprobs).numpy())
        assert gap.mean() < 0.05


def test_asleep_it_holds_little_and_answers_nothing(engine: Any) -> None:
    awake = memory_in_use(CUDA)
    engine.sleep()
    torch.cuda.empty_cache()
    assert awake - memory_in_use(CUDA) > 4 * 2**30  # a tenth of the smallest GPU that this is for
    with pytest.raises(EngineError, match="sleeps"):
        engine.generate([[5, 6]], [SAMPLING])
    with pytest.raises(EngineError, match="sleeps"):
        engine.score([[5, 6]])
    engine.wake("weights")
    with pytest.raises(EngineError, match="kv_cache"):
        engine.score([[5, 6]])
    engine.wake("kv_cache")
    weights.load_checkpoint(engine, Path(engine.spec.model), max_gap=0.05)


@pytest.mark.parametrize("offload", ["none", "optimizer", "all"])
def test_turns_on_one_device(engine: Any, student: Path, offload: str) -> None:
    config = ColocationConfig(offload=offload)  # pyrefly: ignore[bad-argument-type]
    policy = shard(load_policy(student), device="cuda", dtype="bfloat16")
    trainer = NativeTrainer(
        policy,
        OptimizerConfig(learning_rate=0.003),
        num_steps=4,
        state_rests_on=optimizer_rests_on(config, CUDA),
    )
    shared = SharedDevice(
        config,
        engine,
        trainer,
        sender=engine.weight_sender(policy),
        reference=None,
        device=CUDA,
    )
    canary = weights.canary_batch(policy.causal_lm.config.vocab_size, device=CUDA)
    answers = []
    for _ in range(3):
        shared.to_trainer()
        trainer.backward(-trainer.policy(canary, temperature=1.0).sum())
        trainer.step(canary.num_loss_tokens)
        places = {each["exp_avg"].device.type for each in trainer.optimizer.state.values()}
        assert places == {"cuda" if offload == "none" else "cpu"}
        differing, gap = shared.to_engine(canary)
        assert (list(differing), gap < 0.1) == ([], True)
        [scored] = engine.score([weights.canary_ids(policy.causal_lm.config.vocab_size)])
        answers.append(float(scored[1:].mean()))
    assert answers == sorted(answers)  # it learns the canary, and the engine with it
    assert answers[-1] - answers[0] > 0.1
    weights.load_checkpoint(engine, student, max_gap=0.05)
