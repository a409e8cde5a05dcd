"""Problems of files: what is read, and refusals by file, row and field."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_ray.config.problems import FileProblems
from pear_ray.config.rewards import RewardConfig
from pear_ray.config.run import load_run
from pear_ray.errors import InputError
from pear_ray.records import Problem
from pear_ray.tasks.entries import answer_of, metadata_of
from pear_ray.tasks.problem_sets import (
    check_verifiable,
    content_of,
    make_problems,
    num_problems,
    problems_disjoint_from,
    with_absolute_paths,
)

ROWS = [
    {"prompt": "1 + 1?", "answer": 2, "id": "a", "level": 3},
    {"prompt": "1/2?", "answer": "0.5", "metadata": {"tests": "assert x"}},
    {"prompt": "what?"},
]


def problem_file(folder: Path, *lines: object, name: str = "sums.jsonl") -> str:
    text = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def problems_of(path: str, **settings: object) -> list[Problem]:
    return make_problems(FileProblems.model_validate({"kind": "file", "path": path, **settings}))


def test_rows_become_problems(tmp_path: Path) -> None:
    path = problem_file(tmp_path, ROWS[0], " ", *ROWS[1:])
    problems = problems_of(path, prompt_template="{prompt} In <answer>.")
    assert [(one.problem_id, one.task) for one in problems] == [
        ("sums/a", "sums"),
        ("sums/3", "sums"),
        ("sums/4", "sums"),
    ]
    assert [one.question for one in problems][:2] == ["1 + 1? In <answer>.", "1/2? In <answer>."]
    assert [answer_of(one) for one in problems] == ["2", "0.5", None]
    assert [metadata_of(one) for one in problems] == [{"level": 3}, {"tests": "assert x"}, {}]


def test_parquet_holds_the_same(tmp_path: Path) -> None:
    rows = [{"question": "1 + 1?", "gold": 2}, {"question": "1/2?", "gold": 3}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sums.parquet")
    columns = {"prompt": "question", "answer": "gold"}
    problems = problems_of(str(tmp_path / "sums.parquet"), columns=columns)
    assert [(one.problem_id, one.question, answer_of(one)) for one in problems] == [
        ("sums/1", "1 + 1?", "2"),
        ("sums/2", "1/2?", "3"),
    ]


def test_one_file_parted_in_two(tmp_path: Path) -> None:
    path = problem_file(tmp_path, *ROWS)
    training = FileProblems(kind="file", path=path, size=2)
    held_out = FileProblems(kind="file", path=path, skip=2)
    assert [one.question for one in problems_disjoint_from(training, held_out)] == ["what?"]
    assert (num_problems(training), num_problems(held_out)) == (2, 1)
    overlapping = FileProblems(kind="file", path=path, skip=1)
    with pytest.raises(InputError, match=r"sums.jsonl row 2: its question is problem sums/2 of a"):
        problems_disjoint_from(training, overlapping)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("{", "row 2: not valid JSON"),
        ([1], "row 2: expected a mapping of columns, got list"),
        ({"question": "?"}, "row 2: prompt: missing; the row has question; set columns.prompt"),
        ({"prompt": ""}, "row 2: prompt: expected text, got ''"),
        ({"prompt": 3}, "row 2: prompt: expected text, got 3"),
        ({"prompt": "?", "answer": [1]}, r"row 2: answer: expected text or a number, got \[1\]"),
        ({"prompt": "?", "answer": True}, "row 2: answer: expected text or a number, got True"),
        ({"prompt": "?", "answer": " "}, "row 2: answer: expected text or a number, got ' '"),
        ({"prompt": "?", "metadata": "x"}, "row 2: metadata: expected a mapping, got str"),
        ({"prompt": "?", "id": 1.5}, "row 2: id: expected text or a whole number, got 1.5"),
        ({"prompt": "?", "id": "a"}, "row 2: id: the same as row 1's; ids must differ"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: object, why: str) -> None:
    path = problem_file(tmp_path, ROWS[0], row)
    with pytest.raises(InputError, match=rf"sums\.jsonl {why}"):
        problems_of(path)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent.jsonl: cannot be read \(No such file"):
        problems_of(str(tmp_path / "absent.jsonl"))
    with pytest.raises(InputError, match=r"ends in '.csv', and not in "):
        problems_of("sums.csv")
    with pytest.raises(InputError, match=r"is no Parquet file"):
        problems_of(problem_file(tmp_path, "hello", name="sums.parquet"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(InputError, match="is not UTF-8 text"):
        problems_of(str(tmp_path / "latin.jsonl"))
    with pytest.raises(InputError, match="has 0 problems; at least one wanted after skip=0"):
        problems_of(problem_file(tmp_path, ""))
    with pytest.raises(InputError, match="has 3 problems; size=3 wanted after skip=1"):
        problems_of(problem_file(tmp_path, *ROWS), size=3, skip=1)


@pytest.mark.parametrize(
    ("component", "why"),
    [
        ({"kind": "exact"}, "row 3: answer: missing, and the component `exact` compares with it"),
        ({"kind": "math", "name": "m"}, "row 3: answer: missing, and the component `m` compares"),
        ({"kind": "unit_tests"}, "row 1: tests: expected Python text .*, got None; the component"),
    ],
)
def test_a_problem_that_cannot_be_verified_is_named(
    tmp_path: Path, component: dict[str, str], why: str
) -> None:
    problems = problems_of(problem_file(tmp_path, *ROWS))
    rewards = RewardConfig.model_validate({"components": [component]})
    with pytest.raises(InputError, match=rf"sums\.jsonl {why}"):
        check_verifiable(problems, rewards)


def test_what_wants_no_answer_verifies_any_problem(tmp_path: Path) -> None:
    problems = problems_of(problem_file(tmp_path, *ROWS))
    form = {"kind": "regex", "pattern": "x", "compare": "match"}
    own = {"kind": "function", "function": "m:f"}
    assert check_verifiable(problems, RewardConfig.model_validate({"components": [form, own]})) is (
        None
    )


def test_other_content_is_another_fingerprint(tmp_path: Path) -> None:
    config = FileProblems(kind="file", path=problem_file(tmp_path, ROWS[0]))
    before = content_of(config)
    assert content_of(config) == before
    problem_file(tmp_path, ROWS[1])
    assert content_of(config) != before


def test_paths_for_a_process_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_run(Path(__file__).parents[3] / "jobs" / "runs" / "own_problems.yaml")
    monkeypatch.chdir(tmp_path)
    moved = with_absolute_paths(config)
    assert moved.rl.problems.path == f"{tmp_path}/jobs/runs/own_problems.jsonl"
    assert (moved.rl.problems.size, moved.evaluate.problems.skip) == (8, 8)
    assert moved.corpus == config.corpus
    assert moved.model_copy(update={"rl": config.rl, "evaluate": config.evaluate}) == config
