"""The evaluator beside a trainer: the evaluate stage's digits, and the same training."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import job, run_config

from pear_ray.config.rewards import RewardConfig
from pear_ray.config.run import RunConfig, validate_run
from pear_ray.distributed import evaluation, rl_loop
from pear_ray.distributed.evaluation import evaluation_requests
from pear_ray.distributed.sft_loop import SftWorker
from pear_ray.distributed.train_worker import export
from pear_ray.embedded.paths import embedded_path
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.weights import load_checkpoint
from pear_ray.tasks.judging import judge, summarise
from pear_ray.tasks.reward_pool import RewardPool

DEEPSPEED_ENVIRONMENT = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
BACKENDS: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "average": {"ema_decay": 0.5, "export": "ema"},
    "ddp": {"backend": {"kind": "ddp"}},
    "zero-2": {"backend": {"kind": "deepspeed", "zero_stage": 2}},
    "zero-3": {"backend": {"kind": "deepspeed", "zero_stage": 3}},
}


@pytest.fixture(scope="module")
def rewards() -> Any:
    with RewardPool(RewardConfig()) as pool:
        yield pool


@pytest.fixture
def borrowed(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """SFT workers borrow the shared engine rather than starting their own."""
    from pear_ray.engines.vllm import engine as module

    monkeypatch.setattr(module, "VllmEngine", lambda spec, takes_weights: engine)
    return engine


def stage_summary(
    config: RunConfig, engine: Any, rewards: RewardPool, folder: Path
) -> dict[str, dict[str, float]]:
    """What the evaluate stage does with the checkpoint in `folder`, on one engine."""
    load_checkpoint(engine, folder, max_gap=1e-4)
    (asked,) = evaluation_requests(config, ChatTokenizer(embedded_path("student")))
    groups = [
        group
        for call in asked.calls()
        for group in engine.generate(asked.prompts[call], asked.sampling[call])
    ]
    return summarise(asked.suite, judge(rewards, asked.problems, groups), seed=config.seed)


def train(config: RunConfig, run_dir: Path) -> tuple[list[dict[str, float]], dict[str, Any], Any]:
    """Three steps, evaluated where the config wants it; metrics, last weights and the worker."""
    worker = SftWorker(job(config, run_dir, "sft"))
    metrics = [worker._pass_at_k(0)]
    metrics += [worker.step(step) | worker._pass_at_k(step + 1) for step in range(3)]
    weights = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in worker.trainer.module.state_dict().items()
    }
    return metrics, weights, worker


def eval_metrics(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "/eval/" in name}


@pytest.mark.parametrize("name", BACKENDS)
def test_evaluating_changes_nothing_and_says_what_the_stage_says(
    borrowed: Any,
    scored: Path,
    rewards: RewardPool,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    for key, value in DEEPSPEED_ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    sft = {"num_epochs": 2, "evaluate_every": 4, **BACKENDS[name]}
    plain, weights, _ = train(run_config(scored, **sft), scored)
    config = run_config(scored, **sft, pass_at_k={"every": 2})
    evaluated, same, worker = train(config, scored)
    for bare, full in zip(plain, evaluated, strict=True):
        assert bare.items() <= full.items()  # to the last bit
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[key], same[key]) for key in weights)

    found = [eval_metrics(each) for each in evaluated]
    assert [bool(each) for each in found] == [True, False, True, False]  # steps 0 and 2
    initial = stage_summary(config, borrowed, rewards, embedded_path("student"))
    assert found[0] == evaluation._named("sft/eval", initial)
    assert 0 < found[0]["sft/eval/pass_at_1/low"] < found[0]["sft/eval/pass_at_1"]
    averaged = config.sft.export == "ema"
    now = worker.evaluation.of_trainer(worker.trainer, averaged=averaged)
    with worker.trainer.averaged() if averaged else nullcontext():
        export(worker.trainer, worker.chat, scored / "sft" / "model")
    trained = stage_summary(config, borrowed, rewards, scored / "sft" / "model")
    assert eval_metrics(now) == evaluation._named("sft/eval", trained)
    assert eval_metrics(now) != found[0]
    assert list((scored / "sft").glob(".evaluated*")) == []
    worker.evaluation.close()


def test_shares_of_any_number_of_ranks_make_the_same_whole(
    borrowed: Any, scored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four calls of two problems, by one rank, by two, and by more ranks than there are calls."""
    monkeypatch.setattr(evaluation, "MAX_NUM_SEQS", 16)
    config = run_config(scored, pass_at_k={"every": 1, "num_problems": 7})
    part = evaluation.start_evaluation(
        config, ChatTokenizer(embedded_path("student")), embedded_path("student"), scored / "sft"
    )
    assert part is not None
    load_checkpoint(borrowed, embedded_path("student"), max_gap=1e-4)
    whole = part._share(0, 1, answers=True)
    assert list(whole) == [0, 2, 4, 6]
    assert [len(groups) for groups in whole.values()] == [2, 2, 2, 1]
    for ranks in (2, 5):
        shares = [part._share(rank, ranks, answers=True) for rank in reversed(range(ranks))]
        assert {begin: each for share in shares for begin, each in share.items()} == whole
    part.close()


def test_a_resumed_training_is_evaluated_alike(borrowed: Any, scored: Path) -> None:
    """Killed between two evaluations: the checkpoint decides what the next one says."""
    config = run_config(scored, num_epochs=2, pass_at_k={"every": 2})
    worker = SftWorker(job(config, scored, "sft"))
    worker._pass_at_k(0)
    worker.step(0)
    worker.trainer.save(scored / "checkpoint")
    worker.step(1)
    undisturbed = worker._pass_at_k(2)
    resumed = SftWorker(job(config, scored, "sft"))
    resumed.trainer.load(scored / "checkpoint")
    resumed.step(1)
    assert eval_metrics(resumed._pass_at_k(2)) == eval_metrics(undisturbed)
    for each in (worker, resumed):
        each.evaluation.close()


def test_grpo_is_evaluated_with_the_engine_that_samples(
    borrowed: Any, tmp_path: Path, rewards: RewardPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same rollouts and weights with and without; the digits of the model that it leaves."""
    monkeypatch.setattr(rl_loop, "open_engine", lambda spec: borrowed)
    found = []
    for settings in (None, {"every": 1}):
        tree = run_config(tmp_path).model_dump(mode="json")
        tree["rl"]["pass_at_k"] = settings
        config = validate_run(tree, origin="test")
        worker = rl_loop.GrpoWorker(job(config, tmp_path, "rl"))
        worker.publish_weights()
        metrics = [worker._pass_at_k(0)]
        metrics += [worker.step(step) for step in range(2)]
        found.append(metrics)
        worker.pool.close()
    timeless = [
        [
            {
                k: v
                for k, v in each.items()
                if not k.startswith(("time/", "memory/")) and "_per_s" not in k
            }
            for each in one
        ]
        for one in found
    ]
    assert all(bare.items() <= full.items() for bare, full in zip(*timeless, strict=True))
    assert all(map(eval_metrics, found[1]))
    export(worker.trainer, worker.chat, tmp_path / "rl" / "model")
    summary = stage_summary(config, borrowed, rewards, tmp_path / "rl" / "model")
    assert eval_metrics(found[1][-1]) == evaluation._named("rl/eval", summary)
    worker.evaluation.close()
