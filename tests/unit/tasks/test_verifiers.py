"""Verdicts worked out by hand."""

import json

import pytest

from pear_ray.config.problems import GameConfig, GameProblems
from pear_ray.records import Problem, Reward, RewardStatus
from pear_ray.tasks.games import make_game_problems
from pear_ray.tasks.verifiers import extract_answer, verify

SEVEN_MINUS_TWO = Problem(
    "chain_sum/0/0",
    "chain_sum",
    "State the final answer to the following arithmetic problem: 4 + 3 - 2 =",
    json.dumps(
        {
            "params": {},
            "seed": 0,
            "index": 0,
            "item": {"question": "4 + 3 - 2 =", "answer": "5", "metadata": {}},
        }
    ),
)
OK = Reward(RewardStatus.OK, 1.0)
FAILED = Reward(RewardStatus.FAILED, 0.0)
NO_ANSWER = Reward(RewardStatus.FAILED, 0.0, "no answer")


@pytest.mark.parametrize(
    ("completion_text", "reward"),
    [
        ("4+3=7 7-2=5 <answer>5</answer>", OK),
        ("<answer> 05.0\n</answer>", OK),
        ("<answer>6</answer>", FAILED),
        ("<answer>6</answer> no: <answer>5</answer>", OK),
        ("<answer>5</answer> no: <answer>6</answer>", FAILED),
        ("<answer>5</answer> <answer>6", OK),
        ("<answer> hm <answer>5</answer>", OK),
        ("<answer></answer>", FAILED),
        ("4+3=7 7-2=5", NO_ANSWER),
        ("<answer>5", NO_ANSWER),
        ("5</answer>", NO_ANSWER),
        ("", NO_ANSWER),
        # The game gives 1 character of 2 half a point; the reward stays the outcome.
        ("<answer>51</answer>", Reward(RewardStatus.FAILED, 0.0, "partial score 0.5")),
    ],
)
def test_verdict(completion_text: str, reward: Reward) -> None:
    assert verify(SEVEN_MINUS_TWO, completion_text) == reward


def test_extracts_the_last_pair() -> None:
    assert extract_answer("<answer>1</answer><answer> two\nlines </answer> end") == "two\nlines"


def test_own_answers_of_several_games_verify_and_another_problems_do_not() -> None:
    names = ["spell_backward", "gcd", "number_sorting", "base_conversion", "letter_counting"]
    for name in names:
        config = GameProblems(games=[GameConfig(name=name)], size=3)
        for problem in make_game_problems(config):
            answer = json.loads(problem.entry)["item"]["answer"]
            assert verify(problem, f"so <answer>{answer}</answer>") == OK
            assert verify(problem, "so <answer>xyzzy</answer>").status == RewardStatus.FAILED


def test_a_record_that_json_would_change_is_made_again_by_the_verifier() -> None:
    problem = make_game_problems(GameProblems(games=[GameConfig(name="gcd")], size=1))[0]
    record = json.loads(problem.entry)
    answer = record["item"]["answer"]
    bare = Problem(
        problem.problem_id, "gcd", problem.question, json.dumps({**record, "item": None})
    )
    assert verify(bare, f"<answer>{answer}</answer>") == OK
