"""The automaton, and its generator: same settings, same bytes; and no set meets another."""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest

from pear_ray.embedded.automaton.game import (
    CHANGED,
    OPERATIONS_OF,
    PERMUTATIONS,
    STATES,
    Program,
    completion_tokens,
    draw_programs,
    recited_for,
)
from pear_ray.embedded.automaton.generate import PROBLEM_SETS, Settings, write_data
from pear_ray.embedded.automaton.teacher import Teacher, next_symbol

FILES = ["corpus.parquet", "heldout_a.jsonl", "heldout_b.jsonl", "settings.json", "train_a.jsonl"]
SHIPPED = Path(__file__).parents[3] / "pear_ray" / "embedded" / "automaton"


def lines(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_operations_are_different_permutations() -> None:
    assert all(sorted(after) == sorted(STATES) for after in PERMUTATIONS.values())
    assert all(one != other for one, other in combinations(PERMUTATIONS.values(), 2))


def test_they_stay_what_the_shipped_student_has_learnt() -> None:
    assert PERMUTATIONS["q"] == "jgkdmbahfcpelino"


def test_b_has_two_operations_that_a_has_not() -> None:
    assert set(OPERATIONS_OF["B"]) - set(OPERATIONS_OF["A"]) == {"y", "z"}
    assert len(OPERATIONS_OF["A"]) == len(OPERATIONS_OF["B"]) == 8


def test_a_program_by_hand() -> None:
    program = Program(game="A", start="a", operations="qqqqqqq", num_recited=5)
    assert program.prompt == "AGaq1q2q3q4q5q6q7"
    # By the table above: a, j, c, k, p, o, n, i.
    assert program.answer == "i"
    assert (program.recital, program.step_width) == ("CDEFG", 9)


@pytest.mark.parametrize(("length", "recited"), [(60, 4), (67, 5), (68, 5), (130, 14), (200, 24)])
def test_lengths(length: int, recited: int) -> None:
    assert recited_for(length) == recited
    assert abs(completion_tokens(recited) - length) <= 3


@pytest.mark.parametrize("length", [59, 201])
def test_a_length_that_no_recital_gives_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"60 to 200 tokens, not {length}"):
        recited_for(length)


def test_programs_are_distinct_and_none_is_excluded() -> None:
    first = draw_programs(Random(1), "B", count=50, num_recited=5)
    prompts = {program.prompt for program in first}
    again = draw_programs(Random(1), "B", count=50, num_recited=5, exclude=prompts)
    assert len(prompts) == 50
    assert not prompts & {program.prompt for program in again}
    assert {operation for each in first for operation in each.operations} <= set(OPERATIONS_OF["B"])


def test_the_same_settings_give_the_same_bytes(tmp_path: Path) -> None:
    settings = Settings(rows=40)
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        write_data(tmp_path / name, Settings(rows=40, seed=seed))
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == FILES
    assert settings.seed == 1
    for name in FILES:
        one, two, other = ((tmp_path / f / name).read_bytes() for f in ("one", "two", "other"))
        assert one == two != other


def test_no_prompt_is_in_two_sets(tmp_path: Path) -> None:
    write_data(tmp_path, Settings(rows=200))
    prompts = pq.read_table(tmp_path / "corpus.parquet")["prompt"].to_pylist()
    for name, (_, count) in PROBLEM_SETS.items():
        found = [row["prompt"] for row in lines(tmp_path / f"{name}.jsonl")]
        assert len(found) == count
        prompts += found
    assert len(set(prompts)) == len(prompts) == 200 + 80 + 80 + 512


def test_answers_are_those_of_the_programs(tmp_path: Path) -> None:
    write_data(tmp_path, Settings(rows=1))
    for row in lines(tmp_path / "heldout_b.jsonl"):
        game, _, state, *pairs = row["prompt"]
        for operation in pairs[::2]:
            state = PERMUTATIONS[operation][STATES.index(state)]
        assert (game, row["answer"]) == ("B", state)


@pytest.mark.parametrize(("folder", "changed"), [(".", 0), ("changed", 1)])
def test_what_is_shipped_is_what_the_settings_give(
    tmp_path: Path, folder: str, changed: int
) -> None:
    write_data(tmp_path, Settings(changed=changed))
    shipped = SHIPPED / folder
    for name in FILES[1:]:
        assert (tmp_path / name).read_bytes() == (shipped / name).read_bytes()
    # Another pyarrow may write the same table in other bytes.
    assert pq.read_table(tmp_path / FILES[0]).equals(pq.read_table(shipped / FILES[0]))


def test_a_changed_operation_changes_answers_and_solutions_alike() -> None:
    """By hand: q takes a to j, and changed it takes a elsewhere; the others stay."""
    program = Program(game="A", start="a", operations="qrstuvw", num_recited=5, changed="q")
    assert program.run("q", "a") == CHANGED["q"][0] != PERMUTATIONS["q"][0] == "j"
    assert program.run("r", "a") == PERMUTATIONS["r"][0]
    state = CHANGED["q"][0]
    for operation in "rstuvw":
        state = PERMUTATIONS[operation][STATES.index(state)]
    assert program.answer == state
    written = list("1qa")
    right = next_symbol(program, written, Teacher(slip=0.0))
    assert {symbol for symbol, p in right.items() if p > 0} == {CHANGED["q"][0]}


def test_the_command_takes_a_regime(tmp_path: Path) -> None:
    flags = "--length 130 --share 0.5 --rows 20 --teacher-distance 0.5 --slip 0 --logprobs proxy"
    done = command(tmp_path, *flags.split())
    assert done.returncode == 0
    assert "20 rows of 130 tokens" in done.stdout
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["teacher"] == {"plain_share": 0.5, "distance": 0.5, "slip": 0.0}
    rows = pq.read_table(tmp_path / "corpus.parquet").to_pylist()
    assert {len(row["behavior_logprobs"]) for row in rows} == {130}
    assert {row["source"] for row in rows} == {"F", "N"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--share", "1.5"], "plain_share=1.5 is no probability"),
        (["--length", "300"], "60 to 200 tokens, not 300"),
        (["--rows", "0"], "rows=0"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, flags: list[str], words: str) -> None:
    done = command(tmp_path, *flags)
    assert done.returncode == 2
    assert words in done.stderr
    assert not list(tmp_path.iterdir())


def command(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pear_ray.embedded.automaton", str(folder), *flags],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_probability_is_one() -> None:
    with pytest.raises(ValueError, match="slip=-1 is no probability"):
        Teacher(slip=-1)
