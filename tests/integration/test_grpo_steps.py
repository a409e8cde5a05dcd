"""The GRPO loop with a real engine, driven step by step in one process."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import parameters_of

from pear_ray.engines.vllm import weights as transfer
from pear_ray.errors import RewardError, TrainingError, WeightSyncError


def make_groups(worker: Any, step: int = 0) -> Any:
    return worker.rollouts.reward(worker.rollouts.sample(step), policy_version=0)


def test_a_grpo_step_learns_and_stays_in_step_with_the_engine(grpo: Any) -> None:
    metrics = grpo.step(0)
    assert metrics["rl/mismatch/max_gap"] < 1e-4
    assert metrics["rl/sync_gap"] < 1e-5
    assert metrics["rl/ratio/max"] == pytest.approx(1.0, abs=1e-3)  # on policy
    assert metrics["rl/grad_norm"] > 0
    assert 0 < metrics["rl/reward/mean"] < 1
    assert grpo.trainer.step_count == 1


def test_the_update_raises_what_was_rewarded(grpo: Any) -> None:
    """After one step, log-probs weighted by advantage have risen on the step's own rollouts."""
    groups = make_groups(grpo)
    batches = [each.batch for each in grpo.minibatches(groups)[0]]

    def objective() -> float:
        with torch.no_grad():
            logprobs = [grpo.trainer.policy(batch, temperature=1.0) for batch in batches]
        pairs = zip(logprobs, batches, strict=True)
        return float(sum((each * batch.aligned["advantages"]).sum() for each, batch in pairs))

    before = objective()
    grpo.train(groups)
    assert objective() > before


def test_a_resumed_step_samples_the_same(grpo: Any) -> None:
    first, again = grpo.rollouts.sample(3), grpo.rollouts.sample(3)
    assert [[one.token_ids for one in each.completions] for each in first] == [
        [one.token_ids for one in each.completions] for each in again
    ]


def test_nothing_is_corrected_while_nothing_is_learnt(start_grpo: Any) -> None:
    """Three steps that leave the weights alone, at another temperature, with two updates each."""
    optimizer = {"learning_rate": 1e-30, "warmup_fraction": 0.0}
    worker = start_grpo(temperature=0.7, updates_per_batch=2, optimizer=optimizer)
    before = {name: value.clone() for name, value in parameters_of(worker)}
    for step in range(3):
        metrics = worker.step(step)
        # To the bit: the pass before the first update sees what the updates see.
        assert metrics["rl/ratio/max"] == metrics["rl/ratio/min"] == 1.0
        assert metrics["rl/clip_fraction"] == 0.0
        assert metrics["rl/mismatch/max_gap"] < 1e-4
        assert metrics["rl/correction/masked_fraction"] == 0.0
        assert metrics["rl/correction/bounded_fraction"] == 0.0
        assert metrics["rl/correction/weight/mean"] == pytest.approx(1.0, abs=1e-5)
        assert metrics["rl/correction/ess_fraction"] == pytest.approx(1.0, abs=1e-6)
        assert metrics["rl/grad_norm"] > 0
    assert all(torch.equal(before[name], value) for name, value in parameters_of(worker))


def test_two_updates_of_a_batch_move_the_weights_twice(
    start_grpo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each on its own half of the groups; the second's ratio is against before the first."""
    worker = start_grpo(updates_per_batch=2)
    seen = [parameters_of(worker)]
    step_once = worker.trainer.step

    def step(denominator: float) -> Any:
        result = step_once(denominator)
        seen.append([(name, value.clone()) for name, value in parameters_of(worker)])
        return result

    monkeypatch.setattr(worker.trainer, "step", step)
    metrics = worker.step(0)
    assert worker.trainer.step_count == 2
    assert len(seen) == 3
    for one, other in itertools.pairwise(seen):
        pairs = zip(one, other, strict=True)
        assert any(not torch.equal(a, b) for (_, a), (_, b) in pairs)
    assert metrics["rl/sync_gap"] < 1e-5  # the engine has the weights of the second
    assert metrics["rl/mismatch/max_gap"] < 1e-4  # measured before the first
    assert metrics["rl/ratio/max"] > 1.0
    assert metrics["rl/ratio/min"] < 1.0
    again = worker.step(1)
    assert again["rl/mismatch/max_gap"] < 1e-4


@pytest.mark.parametrize("reduction", ["token_mean", "seq_mean", "dr_grpo"])
def test_microbatches_do_not_change_an_rl_update(start_grpo: Any, reduction: str) -> None:
    """All terms on: the same rollouts in one microbatch and in many give one gradient."""
    found = []
    for microbatch_tokens in (8192, 100):
        worker = start_grpo(
            reduction=reduction,
            microbatch_tokens=microbatch_tokens,
            updates_per_batch=2,
            advantage="reinforce_pp",
            loss={"kind": "gspo", "clip_low": 0.1, "clip_high": 0.1},
            kl={"coefficient": 0.1, "estimator": "k1", "placement": "reward"},
            entropy_coefficient=0.01,
            overlong={"buffer_tokens": 32, "mask_truncated": True},
            mismatch_correction={"level": "geometric", "mode": "mask"},
        )
        groups = make_groups(worker)
        batches = worker.minibatches(groups)
        sums, _ = worker.train(groups)
        found.append((len(batches[0]), sums))
    (few, whole), (many, cut) = found
    assert many > few
    for name in ("loss", "grad_norm", "kl", "entropy", "trained_tokens", "numerator"):
        assert whole[name] == pytest.approx(cut[name], rel=1e-3, abs=1e-6), name


def test_a_reference_pulls_the_policy_back(start_grpo: Any) -> None:
    """At the start there is no KL and no gradient of it; after a push away it has both."""
    worker = start_grpo(kl={"coefficient": 1.0, "estimator": "k2"}, entropy_coefficient=0.1)
    metrics = worker.step(0)
    assert metrics["rl/kl_to_init"] == 0.0
    # Exact entropy and the mean surprise of the same tokens estimate the same thing.
    assert metrics["rl/entropy/exact"] == pytest.approx(metrics["rl/entropy"], rel=0.2)
    worker.trainer.module.reshard()
    with torch.no_grad():
        for parameter in worker.trainer.module.parameters():
            parameter.mul_(1.02)
    groups = make_groups(worker)
    equal = [
        type(group)(
            [
                type(one)(**{**_fields(one), "reward": group.rollouts[0].reward})
                for one in group.rollouts
            ]
        )
        for group in groups
    ]
    worker.config = worker.config.model_copy(update={"entropy_coefficient": 0.0})
    far, _ = worker.train(equal)  # no advantage: nothing but the KL has a gradient
    assert far["kl"] > 0
    assert far["grad_norm"] > 0
    for _ in range(3):
        near, _ = worker.train(equal)
    assert near["kl"] < far["kl"]


def test_the_kl_to_the_start_is_measured_without_a_penalty(start_grpo: Any) -> None:
    """Training goes the same way to the bit, and says how far it has gone."""
    worker, measuring = start_grpo(), start_grpo(kl={"measure": True})
    worker.publish_weights()  # the engine is shared: it has the other's
    plain = [worker.step(step) for step in range(2)]
    measuring.publish_weights()
    found = [measuring.step(step) for step in range(2)]
    assert [each["rl/kl_to_init"] > 0 for each in found] == [False, True]
    for one, other in zip(plain, found, strict=True):
        assert "rl/kl_to_init" not in one
        for name in ("rl/loss", "rl/grad_norm", "rl/reward/mean"):
            assert one[name] == other[name]
    pairs = zip(parameters_of(worker), parameters_of(measuring), strict=True)
    assert all(torch.equal(one, other) for (_, one), (_, other) in pairs)


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_activations_that_are_computed_again_change_no_bit(
    start_grpo: Any, lora: dict[str, Any] | None
) -> None:
    """With every pass that a step may have, on whole weights and on adapters; and far less kept."""
    found, kept = [], []
    groups = None
    for again in (False, True):
        worker = start_grpo(
            activation_checkpointing=again,
            lora=lora,
            updates_per_batch=2,
            loss="gspo",
            kl={"coefficient": 0.1},
            entropy_coefficient=0.01,
        )
        groups = groups or make_groups(worker)
        sums, _ = worker.train(groups)
        found.append((sums, parameters_of(worker)))
        kept.append(_kept_for_backward(worker, worker.minibatches(groups)[0][0].batch))
    (plain, weights), (recomputed, same_weights) = found
    assert recomputed == plain
    pairs = zip(weights, same_weights, strict=True)
    assert all(torch.equal(one, other) for (_, one), (_, other) in pairs)
    assert kept[1] < 0.4 * kept[0], kept


def _kept_for_backward(worker: Any, batch: Any) -> int:
    """Bytes that autograd keeps between forward and backward."""
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = worker.trainer.policy(batch, temperature=1.0)  # holds the graph: no storage twice
    outputs.sum().backward()
    return sum(sizes.values())


def test_a_planted_stale_weight_fails_the_same_step(
    grpo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tied embedding left stale in the engine: the step that made it so fails."""
    write = transfer.write
    monkeypatch.setattr(
        transfer,
        "write",
        lambda into, tensors: write(into, [pair for pair in tensors if "embed" not in pair[0]]),
    )
    with pytest.raises(WeightSyncError, match="step 1, rank 0"):
        grpo.step(0)


def test_errored_rewards_stop_the_run(grpo: Any) -> None:
    from pear_ray.records import Reward, RewardStatus

    groups = make_groups(grpo)
    errored = Reward(RewardStatus.ERRORED, 0.0, "planted")
    broken = [type(one)(**{**_fields(one), "reward": errored}) for one in groups[0].rollouts]
    with pytest.raises(RewardError, match="planted"):
        grpo.rollouts.check_rewards([type(groups[0])(broken), *groups[1:]])


def _fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__slots__}


def test_twenty_steps_at_rate_zero_change_nothing(start_grpo: Any) -> None:
    """Whatever drifts without an update is numerics: nothing may."""
    worker = start_grpo(
        updates_per_batch=2,
        prompts_per_step=2,
        group_size=4,
        max_tokens=32,
        optimizer={"learning_rate": 0.0, "weight_decay": 0.1},
    )
    before = {name: value.clone() for name, value in parameters_of(worker)}
    for step in range(20):
        metrics = worker.step(step)
        assert metrics["rl/ratio/max"] == metrics["rl/ratio/min"] == 1.0
        assert metrics["rl/clip_fraction"] == 0.0
        assert metrics["rl/mismatch/max_gap"] < 1e-4
        assert metrics["rl/sync_gap"] < 1e-5
        after = dict(parameters_of(worker))
        assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_verifier_that_always_raises_stops_the_first_step(
    start_grpo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what it raised and where; nothing is trained on rewards that nobody gave."""
    lines = "def verify(problem, text):", "    raise KeyError('planted')"
    (tmp_path / "raises.py").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    component = {"kind": "function", "function": "raises:verify"}
    worker = start_grpo(rewards={"components": [component]}, prompts_per_step=2, group_size=4)
    with pytest.raises(RewardError, match="8 of 8 rewards could not be computed") as found:
        worker.step(0)
    assert "KeyError: 'planted'" in str(found.value)
    assert "raises.py:2 in verify: raise KeyError('planted')" in str(found.value)
    assert worker.trainer.step_count == 0


def test_a_loss_that_is_not_finite_ends_the_step_and_leaves_the_weights(
    grpo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = make_groups(grpo)
    before = [value.clone() for _, value in parameters_of(grpo)]
    minibatches = grpo.minibatches(groups)
    minibatches[0][0].batch.aligned["advantages"][0] = torch.nan
    monkeypatch.setattr(grpo, "minibatches", lambda groups: minibatches)
    with pytest.raises(TrainingError, match=r"^step 1: the gradient norm is nan; lower the learn"):
        grpo.train(groups)
    pairs = zip(before, parameters_of(grpo), strict=True)
    assert all(torch.equal(old, new) for old, (_, new) in pairs)
    assert grpo.trainer.step_count == 0
