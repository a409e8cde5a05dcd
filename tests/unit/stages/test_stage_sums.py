"""The stages' own arithmetic and refusals, on rows written by hand."""

from typing import Any

import pyarrow as pa
import pytest

from pear_ray.artifacts.tables import CORPUS, SCORED
from pear_ray.config.corpus import SampledCorpus
from pear_ray.config.evaluate import EvaluateConfig
from pear_ray.errors import ArtifactError, InputError, RewardError
from pear_ray.records import Completion, FinishReason, Problem, Reward, RewardStatus
from pear_ray.stages.collect import _corpus_rows
from pear_ray.stages.evaluate import summarise
from pear_ray.stages.score import check_same_rows

GAMES = {"games": [{"name": "chain_sum"}], "size": 4}
OK, FAILED = Reward(RewardStatus.OK, 1.0), Reward(RewardStatus.FAILED, 0.0)
ERRORED = Reward(RewardStatus.ERRORED, 0.0, "planted")
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def completion(ids: list[int], reason: FinishReason = STOP) -> Completion:
    return Completion(ids, [-0.5] * len(ids), " ".join(map(str, ids)), reason)


def evaluated(
    verdicts: list[list[Reward]], *, max_errored_fraction: float = 1.0, k: tuple[int, ...] = (1, 8)
) -> dict[str, dict[str, float]]:
    config = EvaluateConfig.model_validate(
        {
            "problems": GAMES,
            "k": list(k),
            "rewards": {"max_errored_fraction": max_errored_fraction},
        }
    )
    groups = [
        [completion([1, 2])] * (len(group) - 1) + [completion([1] * 4, LENGTH)]
        for group in verdicts
    ]
    flat = [verdict for group in verdicts for verdict in group]
    return summarise(config, groups, flat, seed=0)


def test_pass_at_k_of_known_verdicts() -> None:
    """Of 8 samples 2, 0 and 8 are right: pass@1 = (1/4 + 0 + 1)/3, pass@8 = (1 + 0 + 1)/3."""
    found = evaluated([[OK] * 2 + [FAILED] * 6, [FAILED] * 8, [OK] * 8])
    assert found["pass_at_1"]["value"] == pytest.approx(1.25 / 3)
    assert found["pass_at_8"]["value"] == pytest.approx(2 / 3)
    assert found["mean_length"]["value"] == pytest.approx((7 * 2 + 4) / 8)
    assert found["truncated_fraction"]["value"] == pytest.approx(1 / 8)
    assert found["errored_fraction"]["value"] == 0.0
    for each in found.values():
        assert each["low"] <= each["value"] <= each["high"]


def test_equal_problems_have_no_interval() -> None:
    found = evaluated([[OK] * 4 + [FAILED] * 4] * 5)["pass_at_1"]
    assert found == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_errored_rewards_are_left_out_not_wrong() -> None:
    """Of ten samples two errored: 4 of 8 judged are right, not 4 of 10."""
    found = evaluated([[ERRORED] * 2 + [OK] * 4 + [FAILED] * 4])
    assert found["pass_at_1"]["value"] == 0.5
    assert found["errored_fraction"]["value"] == pytest.approx(0.2)


def test_too_many_errored_rewards() -> None:
    verdicts = [[ERRORED] * 2 + [OK] * 8]
    evaluated(verdicts, max_errored_fraction=0.2)
    with pytest.raises(RewardError, match="2 of 10 rewards could not be computed; the first: plan"):
        evaluated(verdicts, max_errored_fraction=0.19)


def test_too_few_judged_samples_for_k() -> None:
    verdicts = [[ERRORED] + [OK] * 7, [OK] * 8]
    with pytest.raises(RewardError, match="1 problems have fewer than 8 judged samples"):
        evaluated(verdicts)
    assert evaluated(verdicts, k=(1, 7))["pass_at_7"]["value"] == 1.0


def scored(**changes: list[Any]) -> pa.Table:
    columns = {
        "example_id": ["a", "b"],
        "source": ["t", "t"],
        "token_ids": [[1, 2], [3, 4, 5]],
        "loss_mask": [[False, True], [False, True, True]],
        "behavior_logprobs": [[0.0, -1.0], [0.0, -1.0, -2.0]],
    }
    return pa.table(columns | changes, schema=SCORED)


def corpus() -> pa.Table:
    rows = scored().drop_columns(["behavior_logprobs"]).to_pylist()
    return pa.Table.from_pylist(rows, schema=CORPUS)


def test_the_same_rows_pass() -> None:
    check_same_rows(corpus(), scored())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"example_id": ["a", "c"]}, "differ from the corpus in example_id"),
        ({"source": ["t", "u"]}, "differ from the corpus in source"),
        ({"token_ids": [[1, 2], [3, 4, 6]]}, "differ from the corpus in token_ids"),
        ({"token_ids": [[1, 2], [3, 4]]}, "differ from the corpus in token_ids"),
        ({"loss_mask": [[True, True], [False, True, True]]}, "differ from the corpus in loss_mask"),
        ({"behavior_logprobs": [[0.0, -1.0], [0.0, -1.0]]}, "another number of log-probs"),
    ],
)
def test_other_rows_are_refused(changes: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        check_same_rows(corpus(), scored(**changes))


def test_a_missing_row_is_never_cut_to_the_shorter() -> None:
    with pytest.raises(ArtifactError, match="the corpus has 2 rows and 1 are scored"):
        check_same_rows(corpus(), scored().slice(0, 1))


def collected(
    completions: list[list[Completion]],
    verdicts: list[Reward],
    *,
    max_errored_fraction: float = 0.1,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    config = SampledCorpus.model_validate(
        {
            "kind": "sampled",
            "problems": GAMES,
            "rewards": {"max_errored_fraction": max_errored_fraction},
        }
    )
    problems = [Problem(f"g/0/{n}", "g", f"q{n}", "{}") for n in range(len(completions))]
    prompts = [[100 + n, 200] for n in range(len(completions))]
    return _corpus_rows(config, "teacher", problems, prompts, completions, verdicts)


def test_only_verified_ended_distinct_completions_are_kept() -> None:
    rows, metrics = collected(
        [
            [completion([1, 9]), completion([1, 9]), completion([2, 9]), completion([3], LENGTH)],
            [completion([1, 9]), completion([4, 9])],
        ],
        [OK, OK, FAILED, OK, OK, FAILED],
    )
    # Index 1 repeats index 0, 2 failed, 3 is truncated; the other problem's [1, 9] is its own.
    assert [row["example_id"] for row in rows] == ["g/0/0/0", "g/0/1/0"]
    assert rows[1] == {
        "example_id": "g/0/1/0",
        "source": "teacher",
        "problem_id": "g/0/1",
        "question": "q1",
        "completion": "1 9",
        "token_ids": [101, 200, 1, 9],
        "loss_mask": [False, False, True, True],
        "sampled_logprobs": [0.0, 0.0, -0.5, -0.5],
    }
    assert metrics["collect/verified_fraction"] == pytest.approx(4 / 6)
    assert metrics["collect/truncated_fraction"] == pytest.approx(1 / 6)
    assert metrics["collect/errored_fraction"] == 0.0
    assert metrics["collect/tokens"] == 11
    assert metrics["collect/mean_length"] == pytest.approx(11 / 6)


def test_errored_completions_are_left_out_up_to_the_limit() -> None:
    completions = [[completion([1, 9]), completion([2, 9])]]
    rows, metrics = collected(completions, [OK, ERRORED], max_errored_fraction=0.5)
    assert [row["token_ids"] for row in rows] == [[100, 200, 1, 9]]
    assert metrics["collect/errored_fraction"] == 0.5
    with pytest.raises(RewardError, match=r"50\.0% of the corpus's rewards .* the first: planted"):
        collected(completions, [OK, ERRORED], max_errored_fraction=0.49)


def test_no_verified_completion_is_refused() -> None:
    with pytest.raises(InputError, match="none of the behavior model's 2 completions verified"):
        collected([[completion([1, 9]), completion([2], LENGTH)]], [FAILED, FAILED])
