"""The scripted solutions, worked out by hand, and accepted by the games' own verifiers."""

import json
from random import Random

import pytest

from pear_ray.config.problems import GameConfig, GameProblems
from pear_ray.embedded.lessons import DEMO_GAME, LETTERS_GAME, WORDS_GAME
from pear_ray.embedded.solutions import chain_sum, letter_counting, solve, spell_backward
from pear_ray.records import RewardStatus
from pear_ray.tasks.games import make_game_problems
from pear_ray.tasks.verifiers import verify

RNG = Random(0)


def test_chain_sum_in_both_styles() -> None:
    assert chain_sum("4 - 7 + 15", style="totals", rng=RNG) == "4-7=-3 -3+15=12 <answer>12</answer>"
    assert chain_sum("4 - 7 + 15", style="letters", rng=RNG) == (
        "e-h=-d -d+bf=bc <answer>12</answer>"
    )


def test_a_slip_is_carried_on() -> None:
    work = chain_sum("4 - 7 + 5", style="totals", rng=Random(1), slip=1.0).split()
    first, second = (int(step.split("=")[1]) for step in work[:2])
    assert first != -3
    assert second != first + 5
    assert work[1].startswith(f"{first}+5=")
    assert work[2] == f"<answer>{second}</answer>"


def test_words() -> None:
    assert spell_backward("sun", rng=RNG) == "s u n: <answer>nus</answer>"
    assert letter_counting("Ana x", "a", rng=RNG) == "A1 n a2 x <answer>2</answer>"


@pytest.mark.parametrize("game", [DEMO_GAME, WORDS_GAME, LETTERS_GAME], ids=lambda game: game.name)
def test_solutions_without_slips_verify(game: GameConfig) -> None:
    for problem in make_game_problems(GameProblems(games=[game], size=50)):
        item = json.loads(problem.entry)["item"]
        text = solve(item, rng=RNG, letters_share=0.5, slip=0.0)
        assert verify(problem, text).status == RewardStatus.OK
