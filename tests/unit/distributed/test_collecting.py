"""Which sampled completions become a corpus, and what is counted of them, by hand."""

from typing import Any

import pyarrow as pa
import pytest

from pear_ray.artifacts.tables import CORPUS, PASS_RATES
from pear_ray.config.corpus import SampledCorpus
from pear_ray.corpus.prepare import PartSummary
from pear_ray.distributed.collecting import (
    Answered,
    _measured,
    _pass_rate,
    _samplings,
    check_verdicts,
    corpus_rows,
)
from pear_ray.errors import RewardError
from pear_ray.records import Completion, FinishReason, Problem, Reward, RewardStatus

OK, FAILED = Reward(RewardStatus.OK, 1.0), Reward(RewardStatus.FAILED, 0.0)
ERRORED = Reward(RewardStatus.ERRORED, 0.0, "planted")
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def completion(ids: list[int], reason: FinishReason = STOP) -> Completion:
    return Completion(ids, [-0.5 * each for each in ids], " ".join(map(str, ids)), reason)


def answered(completions: list[Completion], verdicts: list[Reward], *, index: int = 0) -> Answered:
    problem = Problem(f"g/0/{index}", "g", f"q{index}", "{}")
    return Answered("teacher", problem, [100 + index, 200], completions, verdicts)


def corpus(**rewards: float) -> SampledCorpus:
    problems = {"games": [{"name": "chain_sum"}], "size": 4}
    return SampledCorpus.model_validate(
        {"kind": "sampled", "problems": problems, "rewards": rewards}
    )


SIX = answered(
    [
        completion([1, 9]),
        completion([1, 9]),  # the first again
        completion([2, 9]),  # wrong
        completion([3], LENGTH),  # right, but cut
        completion([4], LENGTH),  # wrong, and cut
        completion([5, 9]),  # not judged
        completion([2, 9]),  # the wrong one again
        completion([6, 9]),
    ],
    [OK, OK, FAILED, OK, FAILED, ERRORED, FAILED, OK],
)


def test_only_verified_ended_distinct_completions_are_kept() -> None:
    rows = list(corpus_rows(SIX, keep="verified"))
    assert [row["example_id"] for row in rows] == ["teacher/g/0/0/0", "teacher/g/0/0/7"]
    assert rows[1] == {
        "example_id": "teacher/g/0/0/7",
        "source": "teacher",
        "is_negative": False,
        "problem_id": "g/0/0",
        "file": None,
        "row": None,
        "messages": None,
        "token_ids": [100, 200, 6, 9],
        "loss_mask": [False, False, True, True],
        "given_logprobs": [0.0, 0.0, -3.0, -4.5],
    }
    assert pa.Table.from_pylist(rows, schema=CORPUS).to_pylist() == rows


def test_labelled_keeps_the_wrong_ones_and_says_so() -> None:
    rows = list(corpus_rows(SIX, keep="labelled"))
    assert [(row["token_ids"][2], row["is_negative"]) for row in rows] == [
        (1, False),
        (2, True),
        (6, False),
    ]
    assert [row["example_id"][-1] for row in rows] == ["0", "2", "7"]


def test_the_same_answer_to_another_problem_is_its_own() -> None:
    both = [answered([completion([1, 9])], [OK], index=index) for index in (0, 1)]
    rows = [row for each in both for row in corpus_rows(each, keep="verified")]
    assert [row["token_ids"] for row in rows] == [[100, 200, 1, 9], [101, 200, 1, 9]]
    assert len({row["example_id"] for row in rows}) == 2


def test_counts_of_what_was_kept() -> None:
    """Four tokens a row, of which the completion's two train."""
    summary = PartSummary()
    for row in corpus_rows(SIX, keep="labelled"):
        summary.count(row)
    assert (summary.rows, summary.tokens, summary.loss_tokens, summary.negatives) == (3, 12, 6, 1)
    assert summary.sources == {"teacher": 3}


def test_a_problem_whose_answers_are_all_wrong_has_no_row() -> None:
    none = answered([completion([1, 9]), completion([2], LENGTH)], [FAILED, OK])
    assert list(corpus_rows(none, keep="verified")) == []


def test_errored_rewards_up_to_the_limit() -> None:
    """One of eight is 0.125."""
    check_verdicts(corpus(max_errored_fraction=0.125), [SIX])
    with pytest.raises(RewardError, match=r"1 of 8 rewards .*corpus.rewards.* the first: planted"):
        check_verdicts(corpus(max_errored_fraction=0.12), [SIX])
    check_verdicts(corpus(max_errored_fraction=0.0), [answered([completion([1])], [FAILED])])


def test_the_share_is_over_all_problems_and_sources() -> None:
    wrong = answered([completion([1, 9])], [ERRORED])
    check_verdicts(corpus(max_errored_fraction=0.25), [wrong, SIX])  # 2 of 9
    with pytest.raises(RewardError, match="2 of 9 rewards"):
        check_verdicts(corpus(max_errored_fraction=0.22), [wrong, SIX])


@pytest.mark.parametrize(
    ("verdicts", "judged", "correct", "rate"),
    [
        ([OK, FAILED, ERRORED, OK], 3, 2, 2 / 3),  # an errored one is left out, not wrong
        ([FAILED, FAILED], 2, 0, 0.0),
        ([OK], 1, 1, 1.0),
        ([ERRORED, ERRORED], 0, 0, None),
    ],
)
def test_pass_rates(verdicts: list[Reward], judged: int, correct: int, rate: float | None) -> None:
    found: dict[str, Any] = _pass_rate(answered([completion([1, 9])] * len(verdicts), verdicts))
    assert found == {
        "problem_id": "g/0/0",
        "task": "g",
        "source": "teacher",
        "num_judged": judged,
        "num_correct": correct,
        "pass_rate": rate,
    }
    assert pa.Table.from_pylist([found], schema=PASS_RATES)["num_judged"].to_pylist() == [judged]


@pytest.mark.parametrize(("seed", "first"), [(None, 3 * 1_000_003), (5, 5 * 1_000_003)])
def test_prompts_are_sampled_with_the_corpus_seed_or_else_the_runs(
    seed: int | None, first: int
) -> None:
    """Each prompt with another, and all settings as the corpus has them."""
    sampled = corpus().model_copy(update={"seed": seed, "temperature": 0.5})
    found = _samplings(sampled, run_seed=3, num_prompts=2)
    assert [each.seed for each in found] == [first, first + 1]
    assert {(each.num_samples, each.temperature, each.max_tokens) for each in found} == {
        (4, 0.5, 128)
    }


def test_what_was_measured() -> None:
    """Nine completions of 2+2+2+1+1+2+2+2 and 3 tokens; two of them cut, one not judged."""
    more = answered([completion([7, 8, 9])], [FAILED], index=1)
    assert _measured([SIX, more]) == {
        "collect/verified_fraction": pytest.approx(4 / 9),
        "collect/errored_fraction": pytest.approx(1 / 9),
        "collect/mean_length": pytest.approx(17 / 9),
        "collect/truncated_fraction": pytest.approx(2 / 9),
        "collect/tokens": 17,
    }
