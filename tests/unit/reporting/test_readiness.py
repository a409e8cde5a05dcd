"""The readiness report: every number by hand, every rule on both sides of its threshold."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_files import rollout

from pear_ray.algorithms.mixed_groups import fit_beta, mixed_beyond
from pear_ray.artifacts.rollouts import rollouts_table, write_step
from pear_ray.config.run import RunConfig, validate_run
from pear_ray.errors import ArtifactError
from pear_ray.records import RolloutGroup
from pear_ray.reporting.load import Estimate
from pear_ray.reporting.readiness.advice import readiness_advice, verdict
from pear_ray.reporting.readiness.numbers import Drift, Probe, Readiness, readiness, share
from pear_ray.reporting.readiness.page import readiness_text, write_readiness

GAMES = {"games": [{"name": "chain_sum"}], "size": 8}
# Four prompts of four completions: 0, 1 and 4 right; and 2 of the 3 that were judged.
TOLD = [[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [1.0] * 4, [1.0, 1.0, 0.0, None]]


def run_config(**rl: Any) -> RunConfig:
    return validate_run(
        {
            "name": "t",
            "models": {"policy": "p", "behavior": "b", "max_model_len": 64},
            "corpus": {"kind": "dataset", "path": "unused"},
            "sft": {"optimizer": {"learning_rate": 1e-3}},
            "rl": {
                "problems": GAMES,
                "optimizer": {"learning_rate": 1e-4},
                "num_steps": 1,
                "prompts_per_step": 4,
                "group_size": 4,
                "max_tokens": 10,
            }
            | rl,
            "evaluate": {"problems": GAMES},
            "cluster": {"num_trainers": 1},
        },
        origin="test",
    )


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    groups = [
        RolloutGroup(
            [
                rollout("1+1", reward, version=0, place=place, cut=(place, index) == (0, 0))
                for index, reward in enumerate(rewards)
            ]
        )
        for place, rewards in enumerate(TOLD)
    ]
    table = rollouts_table(groups, step=1, places=range(4), temperature=1.0)
    return [write_step(tmp_path / "rollouts", 1, [table])]


def test_the_numbers_by_hand(files: list[Path]) -> None:
    found = readiness(files, run_config())
    assert (found.num_prompts, found.num_completions) == (4, 16)
    assert found.pass_at[1].value == pytest.approx((0 + 1 / 4 + 1 + 2 / 3) / 4)
    # Of 1 right in 4, a pair has it with 1 - C(3,2)/C(4,2) = 1/2; of 2 in 3 every pair has one.
    assert found.pass_at[2].value == pytest.approx((0 + 1 / 2 + 1 + 1) / 4)
    assert found.pass_at[4].value == pytest.approx(2 / 3)  # the prompt with an error is left out
    assert (found.mixed.value, found.always_fail.value, found.always_pass.value) == (
        0.5,
        0.25,
        0.25,
    )
    assert found.groups_per_step == 2.0
    assert found.mixed.low < 0.5 < found.mixed.high
    assert found.correct_counts == [1, 1, 1, 0, 1]
    # At 2: 0, 1 - C(3,2)/6, 0, 1 - (C(2,2) + 0)/3.
    assert found.mixed_at[2] == pytest.approx((0.5 + 2 / 3) / 4)
    # At 8 the two that are mixed stay so; of the others as much as the fitted Beta has it.
    prior = fit_beta([(4, 0), (4, 1), (4, 4), (3, 2)])
    others = [mixed_beyond(4, each, 8, prior=prior) for each in (0, 4)]
    assert found.mixed_at[8] == pytest.approx((2 + sum(others)) / 4)
    shares = list(found.mixed_at.values())
    assert shares == sorted(shares)
    assert found.entropy == pytest.approx(0.5)
    assert found.length_mean == 3
    assert found.truncated == 1 / 16
    assert found.truncated_right == 0
    assert found.errored == 1 / 16
    assert found.reward_mean == pytest.approx(7 / 15)
    # Of 1 in 4: mean 1/4, std sqrt(3)/4. Of 2 in 3: mean 2/3, std sqrt(2)/3.
    one = (3 / 4 + 3 * 1 / 4) / (math.sqrt(3) / 4)
    two = (2 * 1 / 3 + 2 / 3) / (math.sqrt(2) / 3)
    assert found.advantage_abs_mean == pytest.approx((one + two) / 15, rel=1e-4)
    assert found.learning_tokens == pytest.approx(7 / 16)
    assert found.by_task == {"sum": (4, pytest.approx((1 / 4 + 1 + 2 / 3) / 4), 0.5)}
    assert found.drift is None


@pytest.mark.parametrize(
    ("kind", "by_hand"),
    [
        ("mean_baseline", (6 / 4 + 4 / 3) / 15),
        ("rloo", (6 / 4 * 4 / 3 + 4 / 3 * 3 / 2) / 15),
        # Around the mean over all 15, 7/15; over its std.
        ("reinforce_pp", (7 * 8 / 15 + 8 * 7 / 15) / math.sqrt(7 / 15 * 8 / 15) / 15),
    ],
)
def test_the_gradient_signal_is_of_the_configured_advantage(
    files: list[Path], kind: str, by_hand: float
) -> None:
    found = readiness(files, run_config(advantage=kind))
    assert found.advantage_abs_mean == pytest.approx(by_hand, rel=1e-5)


def test_drift_is_a_token_mean(files: list[Path]) -> None:
    rows = [
        {"group": 0, "tokens": 10, "log_ratio": 1.0, "kl_k3": 2.0},
        {"group": 0, "tokens": 20, "log_ratio": 5.0, "kl_k3": 4.0},
        {"group": 1, "tokens": 10, "log_ratio": 2.0, "kl_k3": 2.0},
    ]
    drift = readiness(files, run_config(), {"drift": rows}).drift
    assert drift is not None
    assert drift.kl_per_token.value == pytest.approx(8 / 40)
    assert drift.kl_per_token.low <= 8 / 40 <= drift.kl_per_token.high
    assert drift.kl_per_completion == pytest.approx(8 / 3)
    assert drift.k3_per_token == pytest.approx(8 / 40)


def test_a_share_of_none_is_no_certainty() -> None:
    """Wilson (1927): z^2 / (n + z^2) above none of n, and the same from the other side."""
    none, each = share([False] * 10, confidence=0.95), share([True] * 10, confidence=0.95)
    assert (none.value, none.low) == (0.0, pytest.approx(0.0, abs=1e-12))
    assert none.high == pytest.approx(1.959964**2 / (10 + 1.959964**2), rel=1e-6)
    assert (each.value, each.low) == (1.0, pytest.approx(1 - none.high))
    half = share([True, False], confidence=0.95)
    assert half.high - 0.5 == pytest.approx(0.5 - half.low)


def test_the_probe_by_hand(files: list[Path]) -> None:
    """Prompts' means 0, 1/4, 1, 2/3; each half of two seeds has 2 steps of 4 prompts."""
    told = {0: [0.1, 0.3, 0.9, 0.5, 0.3], 1: [0.4, 0.4, 0.0, 0.2, 0.4]}
    steps = {seed: [{"rl/reward/mean": each} for each in found] for seed, found in told.items()}
    found = readiness(files, run_config(), {"probe": steps}).probe
    assert found is not None
    assert found.rewards == told
    assert found.num_rising == 1
    assert found.change.value == pytest.approx((0.2 - 0.1) / 2)  # the middle step is in no half
    means = torch.tensor([0, 1 / 4, 1, 2 / 3]).double()
    reach = 1.959964 * float(means.std()) * math.sqrt(2 / (2 * 4 * 2))
    assert found.change.high - found.change.value == pytest.approx(reach)


def test_nothing_judged_is_an_error(tmp_path: Path) -> None:
    group = RolloutGroup([rollout("1+1", None, version=0, place=0) for _ in range(4)])
    table = rollouts_table([group], step=1, places=[0], temperature=1.0)
    file = write_step(tmp_path, 1, [table])
    with pytest.raises(ArtifactError, match="none of the completions has a verdict"):
        readiness([file], run_config())


def sound(**changes: Any) -> Readiness:
    """A checkpoint of which no rule says anything."""

    def about(value: float) -> Estimate:
        return Estimate(value, value - 0.05, value + 0.05)

    return dataclasses.replace(
        Readiness(
            group_size=8,
            prompts_per_step=16,
            temperature=1.0,
            max_tokens=100,
            confidence=0.95,
            num_steps=4,
            num_prompts=64,
            num_completions=512,
            pass_at={1: about(0.4), 8: about(0.8)},
            mixed=about(0.7),
            always_fail=about(0.2),
            always_pass=about(0.1),
            mixed_at={2: 0.3, 4: 0.5, 8: 0.7, 16: 0.8, 32: 0.85, 64: 0.9},
            correct_counts=[13, 7, 7, 7, 7, 6, 6, 5, 6],
            by_task={"sum": (64, 0.4, 0.7)},
            entropy=0.5,
            length_mean=40.0,
            length_quantiles=(40.0, 80.0, 100.0),
            lengths=torch.full((512,), 40).numpy(),
            truncated=0.01,
            truncated_right=0.0,
            errored=0.0,
            reward_mean=0.4,
            advantage="grpo",
            advantage_abs_mean=0.6,
            learning_tokens=0.7,
            drift=Drift(about(0.3), 12.0, 0.3, 128),
        ),
        **changes,
    )


def test_a_sound_checkpoint_gets_no_advice() -> None:
    assert readiness_advice(sound()) == []
    assert verdict(sound(), []).startswith(
        "Nothing speaks against RL. 70 % [65, 75] of the groups of 8 hold right and wrong "
        "completions: about 11.2 of 16 in a step teach something. pass@1 is 0.400, pass@8 0.800."
    )


def exactly(value: float) -> Estimate:
    return Estimate(value, value, value)


@pytest.mark.parametrize(
    ("rule", "over", "under", "words"),
    [
        ("always_fail", {"always_fail": exactly(0.62)}, {"always_fail": exactly(0.49)}, "62 % of"),
        ("always_pass", {"always_pass": exactly(0.5)}, {"always_pass": exactly(0.49)}, "50 % of"),
        (
            "few_mixed",
            {"mixed": exactly(0.29), "mixed_at": {8: 0.29, 16: 0.44, 32: 0.55, 64: 0.6}},
            {"mixed": exactly(0.3)},
            "only 29 % of",
        ),
        (
            "few_groups",
            {"prompts_per_step": 5},
            {"prompts_per_step": 6},
            "few groups decide",
        ),
        ("truncated", {"truncated": 0.06}, {"truncated": 0.05}, "6.0 % of the completions"),
        ("low_entropy", {"entropy": 0.049}, {"entropy": 0.05}, "hardly varies"),
        (
            "no_headroom",
            {"pass_at": {1: exactly(0.4), 8: exactly(0.41)}},
            {"pass_at": {1: exactly(0.4), 8: exactly(0.43)}},
            "pass@8 is hardly above",
        ),
        (
            "far_from_base",
            {"drift": Drift(exactly(1.1), 40.0, 1.1, 9)},
            {"drift": Drift(exactly(1.0), 40.0, 1.0, 9)},
            "far from the base",
        ),
        (
            "probe_falls",
            {"probe": Probe({0: [0.5, 0.3]}, Estimate(-0.2, -0.3, -0.1), 0)},
            {"probe": Probe({0: [0.5, 0.3]}, Estimate(-0.2, -0.5, 0.1), 0)},
            "reward fell",
        ),
        ("errors", {"errored": 0.02}, {"errored": 0.01}, "2.0 % of the rewards"),
        (
            "few_prompts",
            {"mixed": Estimate(0.7, 0.4, 0.9)},
            {"mixed": Estimate(0.7, 0.6, 0.85)},
            "too few prompts",
        ),
    ],
)
def test_a_rule_speaks_beyond_its_threshold_alone(
    rule: str, over: dict[str, Any], under: dict[str, Any], words: str
) -> None:
    told = readiness_advice(sound(**over))
    assert rule in [each.rule for each in told]
    advice = next(each for each in told if each.rule == rule)
    assert words in advice.headline
    assert advice.options
    assert rule not in [each.rule for each in readiness_advice(sound(**under))]


def test_advice_has_the_numbers_to_set() -> None:
    thin = sound(
        mixed=Estimate(0.1, 0.0, 0.4),
        mixed_at={2: 0.02, 4: 0.05, 8: 0.1, 16: 0.3, 32: 0.52, 64: 0.6},
    )
    options = {each.rule: each.options for each in readiness_advice(thin)}
    assert options["few_mixed"][0].startswith("`rl.group_size=32`: 52 % of the groups")
    assert "max_batches: 10" in options["few_mixed"][1]  # 1 / 0.1
    assert options["few_groups"][0] == "`rl.prompts_per_step=40` or more"  # 4 / 0.1
    assert options["few_prompts"] == ["`ready.num_steps=8`"]  # (0.4 / 0.3)^2 times 4


def test_the_page_the_json_and_the_terminal_say_the_same(files: list[Path], tmp_path: Path) -> None:
    config = run_config()
    steps = {seed: [{"rl/reward/mean": 0.1 * step} for step in range(4)] for seed in (0, 7)}
    found = readiness(files, config, {"probe": steps})
    write_readiness(
        found, tmp_path, config=config, measured={"reload_gap": 2e-7, "engine_gap": None}
    )
    tree = json.loads((tmp_path / "ready.json").read_text(encoding="utf-8"))
    page = (tmp_path / "ready.html").read_text(encoding="utf-8")
    text = readiness_text(tmp_path)
    assert tree["mixed"]["value"] == 0.5
    assert tree["pass_at"]["2"]["value"] == pytest.approx(2.5 / 4)
    assert tree["verdict"] in page
    assert tree["verdict"] in text
    assert "mixed groups     50 % [" in text
    assert "probe            mean reward +0.200 [-" in text
    assert "2 of 2 seeds rose: too short to tell" in text
    assert "reload: log-probs within 2e-07 nats of the trainer's; engine: not compared" in text
    for each in tree["advice"]:
        assert each["headline"] in page
        assert f"! {each['headline']}" in text
    assert page.count("<svg") == 5
    assert "http" not in page.replace("http://www.w3.org/", "")  # self-contained
