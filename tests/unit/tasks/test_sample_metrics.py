"""Metrics of an evaluation, computed again from its table by counting."""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pear_ray.artifacts.tables import EVALUATION_SAMPLES, read_table, write_rows
from pear_ray.config.evaluate import EvaluateConfig, suites_of
from pear_ray.config.rewards import RewardConfig
from pear_ray.records import Completion, FinishReason, Problem, Reward, RewardStatus
from pear_ray.tasks.components import load_verifier
from pear_ray.tasks.judging import sample_rows, summarise
from pear_ray.tasks.sample_metrics import Judged, problem_values

COMPONENTS = [
    {"kind": "exact"},
    {"kind": "regex", "name": "form", "pattern": "^<think>", "compare": "match", "weight": 0.5},
]
# The answer is 7. One row per problem, one letter per sample: a right answer in form and without,
# two wrong answers, text without an answer, and a verdict that failed.
TEXTS = {
    "R": "<think>so</think><answer>7</answer>",
    "r": "<answer>7.0</answer>",
    "w": "<answer>8</answer>",
    "x": "<answer> Nine </answer>",
    "-": "<think>I do not know",
}
SAMPLES = ["RrwwE-", "wwwRrx", "------", "RRRRrr", "wwwxxR"]


def judged(samples: str) -> tuple[list[Completion], list[Judged]]:
    """Samples of one problem, verified by the components themselves."""
    verifier = load_verifier(RewardConfig.model_validate({"components": COMPONENTS}))
    problem = Problem("set/1", "set", "3 + 4 =", json.dumps({"item": {"answer": "7"}}))
    completions, verdicts = [], []
    for place, letter in enumerate(samples, start=1):
        text = TEXTS.get(letter, "")
        ends = FinishReason.LENGTH if letter == "-" else FinishReason.STOP
        one = Completion([1] * place, [-0.25 * place] * place, text, ends)
        errored = Reward(RewardStatus.ERRORED, 0.0, "planted")
        completions.append(one)
        verdicts.append(
            Judged(
                num_tokens=place,
                is_truncated=ends is FinishReason.LENGTH,
                logprob_sum=sum(one.behavior_logprobs),
                reward=errored if letter == "E" else verifier(problem, text),
            )
        )
    return completions, verdicts


def config(k: Sequence[int]) -> EvaluateConfig:
    return EvaluateConfig.model_validate(
        {
            "problems": {"kind": "file", "path": "p.jsonl"},
            "num_samples": 6,
            "k": list(k),
            "rewards": {"components": COMPONENTS},
        }
    )


def pass_by_enumeration(rows: list[dict[str, Any]], k: int) -> float:
    """The share of all k-subsets of the judged samples in which one is right."""
    right = [row["reward_status"] == "ok" for row in rows if row["reward_status"] != "errored"]
    subsets = list(itertools.combinations(right, k))
    return sum(map(any, subsets)) / len(subsets)


def majority_by_counting(rows: list[dict[str, Any]]) -> float:
    """Every answer with most votes in turn is the majority; how often is it right?"""
    votes = Counter(row["answer"] for row in rows if row["answer"] is not None)
    winners = [a for a, count in votes.items() if count == max(votes.values())]
    right = {row["answer"] for row in rows if row["reward_status"] == "ok"}
    return sum(answer in right for answer in winners) / len(winners) if winners else 0.0


def test_the_table_holds_all_that_the_metrics_are_made_of(tmp_path: Path) -> None:
    problems = [Problem(f"set/{n}", "set", "3 + 4 =", "{}") for n in range(len(SAMPLES))]
    groups, verdicts = zip(*map(judged, SAMPLES), strict=True)
    evaluate = config(k=(1, 2, 3, 5))
    summary = summarise(suites_of(evaluate)[0], verdicts, seed=3)
    path = tmp_path / "samples.parquet"
    write_rows(path, sample_rows("main", "rl", problems, groups, verdicts), EVALUATION_SAMPLES)
    rows = read_table(path, EVALUATION_SAMPLES).to_pylist()
    by_problem = [[row for row in rows if row["problem_id"] == p.problem_id] for p in problems]
    judged_rows = [[r for r in each if r["reward_status"] != "errored"] for each in by_problem]

    def mean(values: Any) -> float:
        values = list(values)
        return sum(values) / len(values)

    expected = {
        **{f"pass_at_{k}": mean(pass_by_enumeration(g, k) for g in by_problem) for k in evaluate.k},
        "mean_at_6": mean(mean(r["reward_status"] == "ok" for r in g) for g in judged_rows),
        "maj_at_6": mean(map(majority_by_counting, judged_rows)),
        "mean_length": mean(mean(r["num_tokens"] for r in g) for g in by_problem),
        "truncated_fraction": mean(
            mean(r["finish_reason"] == "length" for r in g) for g in by_problem
        ),
        "entropy": mean(
            -sum(r["logprob_sum"] for r in g) / sum(r["num_tokens"] for r in g) for g in by_problem
        ),
        "reward/mean": mean(mean(r["reward_value"] for r in g) for g in judged_rows),
        "reward/form/mean": mean(
            mean(dict(r["reward_components"])["form"] for r in g) for g in judged_rows
        ),
        "errored_fraction": 1 / 30,
    }
    for name, value in expected.items():
        assert summary[name]["value"] == pytest.approx(value, abs=1e-12), name
    assert all(each["low"] <= each["value"] <= each["high"] for each in summary.values())


def test_votes_by_hand() -> None:
    """Two for 7 and two for 8 tie; three for 8 win; nobody has a vote; 7 and 7.0 are one answer."""
    found = problem_values(
        [judged(each)[1] for each in SAMPLES], config([1]).rewards, k=[1], num_samples=6
    )
    assert found["maj_at_6"] == [0.5, 0.0, 0.0, 1.0, 0.0]
    assert found["tied_fraction"] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert found["mean_at_6"] == [2 / 5, 2 / 6, 0.0, 1.0, 1 / 6]
    assert found["format_fraction"] == [2 / 5, 1 / 6, 1.0, 4 / 6, 1 / 6]


def test_a_verifier_without_answers_has_no_majority() -> None:
    rewards = RewardConfig.model_validate({"components": [{"kind": "unit_tests"}]})
    verdict = Judged(
        num_tokens=1, is_truncated=False, logprob_sum=-1.0, reward=Reward(RewardStatus.OK, 1.0)
    )
    found = problem_values([[verdict] * 4], rewards, k=[1], num_samples=4)
    assert "maj_at_4" not in found
    assert "format_fraction" not in found
    assert found["reward/mean"] == [1.0]
