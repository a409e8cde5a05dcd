"""Optimizer steps: one denominator for all microbatches, a schedule, and exact resumption."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pear_ray.config.sections import OptimizerConfig
from pear_ray.engines import native_trainer
from pear_ray.engines.batches import Row, collate
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.native_trainer import NativeTrainer
from pear_ray.engines.policy import load_policy, shard
from pear_ray.engines.trainer import gather_over_ranks, learning_rate_at
from pear_ray.errors import TrainingError

pytestmark = pytest.mark.usefixtures("process_group")

CONFIG = OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.0)
ROWS = [[5, 60, 70, 80, 90, 257], [7, 33, 257], [9, 40, 41, 42, 257], [11, 257]]


def trainer_of(
    folder: Path,
    config: OptimizerConfig = CONFIG,
    *,
    num_steps: int = 10,
    state_rests_on: torch.device | None = None,
) -> NativeTrainer:
    policy = shard(load_policy(folder), device="cpu", dtype="float32")
    return NativeTrainer(policy, config, num_steps=num_steps, state_rests_on=state_rests_on)


def numerator(trainer: NativeTrainer, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    batch = collate(
        [Row(ids, [True] * len(ids), {}) for ids in rows],
        pad_id=256,
        names=(),
        device=torch.device("cpu"),
    )
    return -trainer.policy(batch, temperature=1.0).sum()


def weights(trainer: NativeTrainer) -> list[torch.Tensor]:
    return [p.full_tensor().detach().clone() for p in trainer.module.parameters()]


def moments(trainer: NativeTrainer) -> list[torch.Tensor]:
    """AdamW's first moment, after one step the clipped gradient times 1 - beta1."""
    state = trainer.optimizer.state
    return [state[p]["exp_avg"].full_tensor() for p in trainer.module.parameters()]


@pytest.mark.parametrize("cuts", [[[0], [1], [2], [3]], [[0, 3], [1, 2]], [[0, 1, 2], [], [3]]])
def test_microbatches_do_not_change_the_gradient(student: Path, cuts: list[list[int]]) -> None:
    num_tokens = 5 + 2 + 4 + 1
    whole, cut = trainer_of(student), trainer_of(student)
    whole.backward(numerator(whole, ROWS))
    one = whole.step(num_tokens)
    for places in cuts:
        cut.backward(numerator(cut, [ROWS[place] for place in places]))
    other = cut.step(num_tokens)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
    for mine, theirs in zip(moments(whole), moments(cut), strict=True):
        assert (mine - theirs).norm() <= 1e-5 * mine.norm() + 1e-9


def test_keeping_a_small_model_whole_between_microbatches_changes_no_bit(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gathered and reduced once per step, or for every microbatch; passes without gradients too."""
    kept = trainer_of(student)
    monkeypatch.setattr(native_trainer, "SMALL_BYTES", 0)
    each_time = trainer_of(student)
    found = []
    for trainer in (kept, each_time):
        steps = []
        for _ in range(2):
            for number, row in enumerate(ROWS, 1):
                with trainer.microbatch(last=number == len(ROWS)):
                    trainer.backward(numerator(trainer, [row]))
            norm = trainer.step(12).grad_norm
            with torch.no_grad():
                steps.append((norm, float(numerator(trainer, ROWS))))
        trainer.module.reshard()
        found.append((steps, weights(trainer)))
    (first, kept_weights), (second, other_weights) = found
    assert first == second
    assert first[0] != first[1]
    assert all(map(torch.equal, kept_weights, other_weights))


def test_the_denominator_divides_the_gradient(student: Path) -> None:
    norms = []
    for denominator in (1.0, 4.0):
        trainer = trainer_of(student)
        trainer.backward(numerator(trainer, ROWS))
        norms.append(trainer.step(denominator).grad_norm)
    assert norms[0] == pytest.approx(4 * norms[1], rel=1e-5)


def test_the_gradient_is_clipped_and_its_norm_is_before_that(student: Path) -> None:
    trainer = trainer_of(student, CONFIG.model_copy(update={"max_grad_norm": 0.01}))
    trainer.backward(numerator(trainer, ROWS))
    assert trainer.step(12).grad_norm > 0.01
    clipped = torch.cat([m.flatten() for m in moments(trainer)]).norm() / (1 - CONFIG.beta1)
    assert float(clipped) == pytest.approx(0.01, rel=1e-3)


def test_a_step_lowers_the_loss(student: Path) -> None:
    trainer = trainer_of(student)
    before = numerator(trainer, ROWS)
    trainer.backward(before)
    result = trainer.step(12)
    assert result.learning_rate == 1e-3
    assert trainer.step_count == 1
    assert numerator(trainer, ROWS).item() < before.item()


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_the_weights(student: Path, factor: float) -> None:
    trainer = trainer_of(student)
    before = weights(trainer)
    trainer.backward(numerator(trainer, ROWS) * factor)
    with pytest.raises(TrainingError, match="step 1: the gradient norm is"):
        trainer.step(12)
    assert trainer.step_count == 0
    assert all(torch.equal(one, other) for one, other in zip(before, weights(trainer), strict=True))


@pytest.mark.parametrize("denominator", [0.0, -1.0, math.nan])
def test_nothing_to_divide_by_leaves_the_weights(student: Path, denominator: float) -> None:
    trainer = trainer_of(student)
    before = weights(trainer)
    trainer.backward(numerator(trainer, ROWS))
    with pytest.raises(TrainingError, match="the loss denominator is"):
        trainer.step(denominator)
    assert all(torch.equal(one, other) for one, other in zip(before, weights(trainer), strict=True))


@pytest.mark.parametrize("rests_on", [None, torch.device("cpu")])
def test_save_and_load_go_on_bit_for_bit(
    student: Path, tmp_path: Path, rests_on: torch.device | None
) -> None:
    """Also with an optimizer whose state comes for the update, where the first one's stays."""
    config = OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.2, final_fraction=0.1)

    def step(trainer: NativeTrainer, rows: Sequence[Sequence[int]]) -> None:
        trainer.backward(numerator(trainer, rows))
        trainer.step(sum(len(ids) - 1 for ids in rows))

    straight = trainer_of(student, config)
    step(straight, ROWS[:2])
    straight.save(tmp_path / "checkpoint")
    saved = copy.deepcopy(weights(straight))
    resumed = trainer_of(student, config, state_rests_on=rests_on)
    resumed.load(tmp_path / "checkpoint")
    assert resumed.step_count == 1
    assert all(torch.equal(a, b) for a, b in zip(saved, weights(resumed), strict=True))
    step(straight, ROWS[2:])
    step(resumed, ROWS[2:])
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(resumed), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(saved, weights(resumed), strict=True))


def test_export_is_a_model_folder_with_the_trained_weights(
    student: Path, chat: ChatTokenizer, tmp_path: Path
) -> None:
    trainer = trainer_of(student)
    trainer.backward(numerator(trainer, ROWS))
    trainer.step(12)
    trainer.export(tmp_path / "model", save_tokenizer=chat.tokenizer.save_pretrained)
    again = trainer_of(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), weights(again), strict=True))
    assert ChatTokenizer(tmp_path / "model").prompt_ids("1 + 2 =") == chat.prompt_ids("1 + 2 =")


def test_learning_rate_by_hand() -> None:
    """Eleven steps, two of them warm-up; then half a cosine over the remaining nine."""
    config = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.2, final_fraction=0.1)
    rates = [learning_rate_at(step, num_steps=11, config=config) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.1 + 0.9 * 0.5)  # half-way from step 2 to step 10
    assert rates[10] == pytest.approx(0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_learning_rate_stays_at_the_peak_by_default() -> None:
    assert [learning_rate_at(s, num_steps=4, config=CONFIG) for s in range(4)] == [1e-3] * 4


def test_learning_rate_of_a_single_step() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.5, final_fraction=0.0)
    assert learning_rate_at(0, num_steps=1, config=config) == 1.0


def test_gather_over_one_rank() -> None:
    assert gather_over_ranks({"a": 1.5}) == [{"a": 1.5}]
