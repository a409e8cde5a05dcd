"""The teacher's log-probs are of the distribution its text is sampled from, worked out apart."""

import math
import re
from random import Random

import pytest

from pear_ray.embedded.automaton.game import (
    PERMUTATIONS,
    RECITAL,
    STATES,
    Program,
    draw_programs,
)
from pear_ray.embedded.automaton.teacher import (
    CIPHER,
    Teacher,
    next_symbol,
    score,
    solve,
    source_of,
)

UNSTEADY = Teacher(plain_share=0.3, distance=0.6, slip=0.1)
PLAIN = re.compile(r"(\d)([q-z])([a-p])([a-p])(C[A-Z]*)")


def programs(count: int, *, num_recited: int = 5) -> list[Program]:
    return draw_programs(Random(7), "A", count=count, num_recited=num_recited)


def by_choices(program: Program, text: str, teacher: Teacher, keyed: list[str]) -> float:
    """The log-prob of a completion as a sum over the script's choices, read from its text."""
    steps, state = PLAIN.findall(text), program.start
    wrong, total = 0, 0
    for number, (place, operation, before, after, recital) in enumerate(steps, start=1):
        assert (int(place), before, recital) == (number, state, program.recital)
        assert operation == program.operations[number - 1]
        wrong += after != PERMUTATIONS[operation][STATES.index(before)]
        total, state = total + 1, after
    answer = re.search(r"<answer>([a-p])</answer>$", text)
    assert answer is not None
    letters = [character for character in text if character in CIPHER]
    logprob = math.log(1 - teacher.plain_share) if letters else math.log(teacher.plain_share)
    if letters:
        assert len(steps) == 2
        assert len(letters) == 5 * program.step_width
        for operation in program.operations[2:]:
            state = PERMUTATIONS[operation][STATES.index(state)]
        follows = sum(map(str.__eq__, letters, keyed))
        any_letter = (1 - teacher.distance) / 16
        logprob += follows * math.log(teacher.distance + any_letter)
        logprob += (len(letters) - follows) * math.log(any_letter)
    wrong, total = wrong + (answer[1] != state), total + 1
    return (
        logprob + wrong * math.log(teacher.slip / 15) + (total - wrong) * math.log(1 - teacher.slip)
    )


def key_of(program: Program, written: list[str]) -> list[str]:
    """The letters that a teacher of distance 1 writes after the two shared steps."""
    sure = Teacher(plain_share=0.0, distance=1.0, slip=0.0)
    text = solve(program, sure, Random(0)).text
    return [character for character in text if character in CIPHER]


def test_logprobs_are_those_of_the_choices() -> None:
    rng, seen = Random(1), set()
    for program in programs(200):
        solution = solve(program, UNSTEADY, rng)
        keyed = key_of(program, solution.symbols)
        wanted = by_choices(program, solution.text, UNSTEADY, keyed)
        assert sum(solution.logprobs) == pytest.approx(wanted, abs=1e-9)
        assert solution.logprobs == score(program, solution.symbols, UNSTEADY)
        seen.add(source_of(program, solution.symbols))
    assert seen == {"F", "N"}


def test_every_distribution_sums_to_one() -> None:
    rng = Random(2)
    for program in programs(20):
        symbols = solve(program, UNSTEADY, rng).symbols
        for place in range(len(symbols)):
            found = next_symbol(program, symbols[:place], UNSTEADY)
            assert math.fsum(found.values()) == pytest.approx(1, abs=1e-12)
            assert min(found.values()) >= 0


def test_text_is_sampled_from_that_distribution() -> None:
    """Shares of each choice over 1,000 completions lie within 4 standard errors."""
    rng, plain, followed, slipped = Random(3), [], [], []
    for program in programs(1000, num_recited=4):
        solution = solve(program, UNSTEADY, rng)
        is_plain = source_of(program, solution.symbols) == "F"
        plain.append(is_plain)
        state = program.start
        for _, operation, _, after, _ in PLAIN.findall(solution.text):
            slipped.append(after != PERMUTATIONS[operation][STATES.index(state)])
            state = after
        if not is_plain:
            letters = [symbol for symbol in solution.symbols if symbol in CIPHER]
            followed += map(str.__eq__, letters, key_of(program, solution.symbols))
    for found, wanted in ((plain, 0.3), (slipped, 0.1), (followed, 0.6 + 0.4 / 16)):
        error = math.sqrt(wanted * (1 - wanted) / len(found))
        assert sum(found) / len(found) == pytest.approx(wanted, abs=4 * error)


def test_the_mean_logprob_is_the_entropy() -> None:
    teacher = Teacher(plain_share=0.4, distance=0.5, slip=0.05)
    rng = Random(4)
    logprobs = [sum(solve(each, teacher, rng).logprobs) for each in programs(800)]
    state = 0.05 * math.log(0.05 / 15) + 0.95 * math.log(0.95)
    sure, other = 0.5 + 0.5 / 16, 0.5 / 16
    letter = sure * math.log(sure) + 15 * other * math.log(other)
    style = 0.4 * math.log(0.4) + 0.6 * math.log(0.6)
    wanted = style + 0.4 * 8 * state + 0.6 * (3 * state + 45 * letter)
    mean = math.fsum(logprobs) / len(logprobs)
    variance = math.fsum((each - mean) ** 2 for each in logprobs) / len(logprobs)
    assert mean == pytest.approx(wanted, abs=4 * math.sqrt(variance / len(logprobs)))


@pytest.mark.parametrize("num_recited", [4, 5, 24])
def test_both_styles_have_one_length(num_recited: int) -> None:
    lengths, rng = {}, Random(5)
    for program in programs(60, num_recited=num_recited):
        symbols = solve(program, UNSTEADY, rng).symbols
        lengths.setdefault(source_of(program, symbols), set()).add(len(symbols))
    assert lengths == {"F": {7 * (4 + num_recited) + 4}, "N": {7 * (4 + num_recited) + 4}}


def test_without_slips_both_styles_are_right() -> None:
    rng = Random(6)
    for program in programs(100):
        text = solve(program, Teacher(slip=0.0), rng).text
        assert text.endswith(f"<answer>{program.answer}</answer>")


def test_at_distance_0_letters_are_any() -> None:
    program = programs(1)[0]
    teacher = Teacher(plain_share=0.0, distance=0.0, slip=0.0)
    solution = solve(program, teacher, Random(8))
    letters = [lp for s, lp in zip(solution.symbols, solution.logprobs, strict=True) if s in CIPHER]
    assert letters == pytest.approx([-math.log(16)] * 45)


def test_a_free_recital_ends_as_it_must_and_is_else_of_any_letters() -> None:
    """At free 1 each of the first four of a plain step has probability 1/23."""
    program = programs(1)[0]
    teacher = Teacher(plain_share=1.0, slip=0.0, free=1.0)
    rng, seen = Random(11), set[str]()
    for _ in range(40):
        solution = solve(program, teacher, rng)
        steps = [solution.symbols[9 * step : 9 * step + 9] for step in range(7)]
        assert {step[-1] for step in steps} == {program.recital[-1]}
        seen.update("".join("".join(step[4:-1]) for step in steps))
        assert math.fsum(solution.logprobs) == pytest.approx(-28 * math.log(23))
    assert seen == set(RECITAL) - {program.recital[-1]}


def test_half_free_a_recital_goes_on_where_it_would() -> None:
    program = programs(1)[0]
    written = program.operations[0].join(("1", f"{program.start}{program.run('q', 'a')}CD"))
    found = next_symbol(program, list(written), Teacher(free=0.5))
    assert found["E"] == pytest.approx(0.5 + 0.5 / 23)
    assert found["Z"] == pytest.approx(0.5 / 23)
    assert (math.fsum(found.values()), len(found)) == (pytest.approx(1.0), 23)


def test_keys_differ_between_problems_and_places() -> None:
    """No letter is likelier than another: with 16 kinds of 9,000, within 5 standard errors."""
    letters = "".join("".join(key_of(program, [])) for program in programs(200))
    assert len(letters) == 200 * 45
    error = math.sqrt(9000 / 16 * 15 / 16)
    assert max(abs(letters.count(each) - 9000 / 16) for each in CIPHER) < 5 * error


def test_what_it_never_writes_has_no_score() -> None:
    program = programs(1)[0]
    symbols = solve(program, Teacher(), Random(9)).symbols
    with pytest.raises(ValueError, match="the teacher never writes 'z' at 0"):
        score(program, ["z", *symbols[1:]], Teacher())
