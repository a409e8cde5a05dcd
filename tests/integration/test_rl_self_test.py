"""RL's self-test before the first step: it passes where nothing is wrong, and names what is."""

import dataclasses
import time
from typing import Any

import pytest
import torch
from training_runs import parameters_of

from pear_ray.distributed.rl_self_test import check_start
from pear_ray.errors import TrainingError


def test_it_finds_nothing_and_leaves_nothing_behind(grpo: Any) -> None:
    before = [(name, value.clone()) for name, value in parameters_of(grpo)]
    begun = time.perf_counter()
    metrics = check_start(grpo, dtype="float32")
    assert time.perf_counter() - begun < 10
    assert metrics["rl/self_test/max_log_ratio"] == 0.0
    assert metrics["rl/self_test/mean_gap"] < 1e-5
    assert metrics["rl/self_test/grad_norm"] > 0
    pairs = zip(before, parameters_of(grpo), strict=True)
    assert all(torch.equal(old, new) for (_, old), (_, new) in pairs)
    assert grpo.trainer.step_count == 0
    assert all(each.grad is None for each in grpo.trainer.module.parameters())


def test_the_first_step_is_the_same_with_and_without_it(start_grpo: Any) -> None:
    found = []
    for is_tested in (False, True):
        worker = start_grpo()
        if is_tested:
            check_start(worker, dtype="float32")
        metrics = worker.step(0)
        machines = ("time/", "memory/", "rl/tokens_per_s")
        found.append({name: metrics[name] for name in metrics if not name.startswith(machines)})
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "rl",
    [
        {"advantage": "reinforce_pp", "loss": "gspo", "updates_per_batch": 4},
        {
            "kl": {"coefficient": 0.1, "estimator": "k1", "placement": "reward"},
            "entropy_coefficient": 0.1,
            "overlong": {"buffer_tokens": 60, "mask_truncated": True},
            "reduction": "dr_grpo",
        },
    ],
)
def test_it_takes_the_loss_that_the_run_takes(start_grpo: Any, rl: dict[str, Any]) -> None:
    metrics = check_start(start_grpo(**rl), dtype="float32")
    assert metrics["rl/self_test/max_log_ratio"] == 0.0
    assert metrics["rl/self_test/grad_norm"] > 0


def test_another_temperature_in_the_sampler_is_named(
    grpo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At temperature 1 the canary sees nothing of it."""
    generate = grpo.engine.generate
    monkeypatch.setattr(
        grpo.engine,
        "generate",
        lambda prompts, sampling: generate(
            prompts, [dataclasses.replace(each, temperature=0.7) for each in sampling]
        ),
    )
    assert grpo.publish_weights() < 1e-5
    with pytest.raises(TrainingError, match=r"before step 1, .*the sampler's log-probs") as found:
        check_start(grpo, dtype="float32")
    assert "two forward passes" not in str(found.value)


def test_dropout_is_named(grpo: Any) -> None:
    dropout = torch.nn.Dropout(0.1)
    grpo.trainer.module.causal_lm.model.norm.register_forward_hook(
        lambda module, args, output: dropout(output)
    )
    with pytest.raises(TrainingError, match="two forward passes of the trainer differ by"):
        check_start(grpo, dtype="float32")


def test_a_gradient_that_is_not_finite_is_named(grpo: Any) -> None:
    weight = grpo.trainer.module.causal_lm.model.norm
    weight.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * torch.nan,))
    with pytest.raises(TrainingError, match=r"^self-test before step 1.*the gradient norm is nan"):
        check_start(grpo, dtype="float32")
