"""Problem sets: deterministic, distinct, interleaved, and errors that say what to change."""

import json

import pytest

from pear_ray.config.problems import GameConfig, GameProblems
from pear_ray.errors import ConfigError
from pear_ray.tasks.games import make_game_problems
from pear_ray.tasks.problem_sets import problems_disjoint_from

ONE_DIGIT_SUM = GameConfig(
    name="chain_sum", params={"min_terms": 2, "max_terms": 2, "max_digits": 1}
)
WORDS = GameConfig(name="spell_backward", params={"min_word_len": 3, "max_word_len": 4})


def problem_set(*games: GameConfig, size: int = 20, seed: int = 0) -> GameProblems:
    return GameProblems(games=list(games), size=size, seed=seed)


def test_same_config_same_problems_and_a_larger_set_only_appends() -> None:
    small = make_game_problems(problem_set(ONE_DIGIT_SUM, WORDS, size=20))
    large = make_game_problems(problem_set(ONE_DIGIT_SUM, WORDS, size=40))
    assert small == make_game_problems(problem_set(ONE_DIGIT_SUM, WORDS, size=20)) == large[:20]


def test_ids_tasks_and_questions_of_a_first_problem() -> None:
    first = make_game_problems(problem_set(ONE_DIGIT_SUM, seed=3))[0]
    item = json.loads(first.entry)["item"]
    assert (first.problem_id, first.task) == ("chain_sum/3/0", "chain_sum")
    expression = item["metadata"]["expression"]
    assert first.question == (
        f"State the final answer to the following arithmetic problem: {expression} ="
    )


def test_shares_interleave() -> None:
    games = [ONE_DIGIT_SUM.model_copy(update={"share": 2.0}), WORDS]
    tasks = [p.task for p in make_game_problems(problem_set(*games, size=6))]
    assert tasks.count("chain_sum") == 4
    assert tasks[:3].count("chain_sum") == tasks[3:].count("chain_sum") == 2


def test_no_question_repeats_and_adjacent_seeds_do_not_overlap() -> None:
    # reasoning-gym's item i of seed s is item i-1 of seed s+1: a naive seeding shares nearly all.
    wide = GameConfig(name="chain_sum", params={"min_terms": 5, "max_terms": 6, "max_digits": 3})
    sets = [make_game_problems(problem_set(wide, size=300, seed=seed)) for seed in (0, 1)]
    questions = [{p.question for p in problems} for problems in sets]
    assert [len(q) for q in questions] == [300, 300]
    assert not questions[0] & questions[1]


def test_every_two_term_one_digit_sum_and_not_one_more() -> None:
    # 10 x 10 operands x {+, -} = 200 distinct questions.
    assert len(make_game_problems(problem_set(ONE_DIGIT_SUM, size=200))) == 200
    with pytest.raises(ConfigError, match=r"only 200 distinct problems, and 201 are wanted"):
        make_game_problems(problem_set(ONE_DIGIT_SUM, size=201))


def test_held_out_problems_avoid_the_training_questions() -> None:
    training = problem_set(ONE_DIGIT_SUM, size=120, seed=0)
    held_out = problems_disjoint_from(training, problem_set(ONE_DIGIT_SUM, size=80, seed=1))
    assert not {p.question for p in held_out} & {p.question for p in make_game_problems(training)}
    with pytest.raises(ConfigError, match="only 80 distinct problems not excluded, and 81"):
        problems_disjoint_from(training, problem_set(ONE_DIGIT_SUM, size=81, seed=1))


@pytest.mark.parametrize(
    ("game", "said"),
    [
        (GameConfig(name="chain_summ"), r"unknown game `chain_summ`, did you mean `chain_sum`"),
        (
            GameConfig(name="chain_sum", params={"max_term": 3}),
            r"`chain_sum` has no parameter `max_term`, did you mean `max_terms`\?; it has allow_",
        ),
        (
            GameConfig(name="chain_sum", params={"min_terms": 4, "max_terms": 3}),
            r"`chain_sum` refuses params.max_terms=3, params.min_terms=4: .*max_terms must be >=",
        ),
        (
            GameConfig(name="chain_sum", params={"min_terms": "four"}),
            r"`chain_sum` refuses params.min_terms=\"four\": .*'>' not supported",
        ),
        (GameConfig(name="chain_sum", params={"seed": 3}), r"the problem set's own `seed`"),
    ],
)
def test_a_bad_game_says_what_to_change(game: GameConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_game_problems(problem_set(game))
