"""Which problems a band of pass rates leaves, and what is said where it cannot be told."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_ray.artifacts.tables import PASS_RATES, write_rows
from pear_ray.config.rl import RlConfig
from pear_ray.config.run import RunConfig, validate_run
from pear_ray.errors import ConfigError, InputError
from pear_ray.tasks.difficulty import describe_band, rates_content, training_problems
from pear_ray.tasks.problem_sets import with_absolute_paths

RATES = [0.0, 0.1, 0.5, None, 0.9, 1.0]
OPTIMIZER = {"learning_rate": 1e-3}
EXACT = {"components": [{"kind": "exact"}]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    lines = [
        {"prompt": f"{n} + 1?", "answer": n + 1} | ({} if rate is None else {"pass_rate": rate})
        for n, rate in enumerate(RATES)
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def tree(file: Path, **difficulty: Any) -> dict[str, Any]:
    return {
        "problems": {"kind": "file", "path": str(file)},
        "difficulty": difficulty,
        "optimizer": OPTIMIZER,
        "num_steps": 1,
        "rewards": EXACT,
    }


def run(file: Path, **difficulty: Any) -> RunConfig:
    games = {"games": [{"name": "chain_sum"}], "size": 8}
    return validate_run(
        {
            "name": "test",
            "models": {"policy": "embedded:student", "behavior": "embedded:teacher"},
            "corpus": {"kind": "dataset", "path": "unused"},
            "sft": {"optimizer": OPTIMIZER},
            "rl": tree(file, **difficulty),
            "evaluate": {"problems": games},
        },
        origin="test",
    )


def kept(file: Path, **difficulty: Any) -> list[str]:
    config = RlConfig.model_validate(tree(file, **difficulty))
    return [problem.problem_id for problem in training_problems(config)]


def test_rates_of_a_column_and_both_bounds_belong_to_the_band(file: Path) -> None:
    assert kept(file, unrated="drop") == ["sums/2", "sums/3", "sums/5"]
    assert kept(file, unrated="keep", low=0.2) == ["sums/3", "sums/4", "sums/5"]
    assert kept(file, unrated="drop", low=0.0, high=0.0) == ["sums/1"]


def test_the_counts_are_told(file: Path) -> None:
    words = describe_band(RlConfig.model_validate(tree(file, unrated="drop", high=0.5)))
    assert words == (
        "2 of 6 problems kept, with pass rates from 0.1 to 0.5 (1 below, 2 above, 1 unrated)"
    )
    kept_too = describe_band(RlConfig.model_validate(tree(file, unrated="keep", high=0.5)))
    assert kept_too.startswith("3 of 6 problems kept")
    no_band = tree(file)
    no_band["difficulty"] = None
    assert describe_band(RlConfig.model_validate(no_band)) == ""


def test_problems_without_a_rate_are_refused_by_number(file: Path) -> None:
    with pytest.raises(InputError, match=r"no pass rate for 1 of 6 problems, the first .*row 4"):
        kept(file)


def test_an_empty_band_is_refused_with_what_there_is(file: Path) -> None:
    with pytest.raises(InputError, match=r"none has a pass rate from 0.2 to 0.3 \(2 below, 3 ab"):
        kept(file, unrated="drop", low=0.2, high=0.3)


@pytest.mark.parametrize("rate", [1.5, True, "half"])
def test_a_rate_that_is_none(file: Path, rate: Any) -> None:
    file.write_text(json.dumps({"prompt": "?", "pass_rate": rate}) + "\n", encoding="utf-8")
    with pytest.raises(
        InputError, match=r"sums.jsonl row 1: pass_rate: expected a pass rate from "
    ):
        kept(file)


def rate_row(source: str, number: int, rate: float | None) -> dict[str, Any]:
    return {
        "problem_id": f"sums/{number}",
        "task": "sums",
        "source": source,
        "num_judged": 0 if rate is None else 10,
        "num_correct": 0 if rate is None else round(10 * rate),
        "pass_rate": rate,
    }


def test_rates_that_collect_wrote(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "pass_rates.parquet"
    rows = [rate_row("teacher", n, 0.5 if n < 3 else None) for n in range(1, 7)]
    write_rows(path, rows, PASS_RATES)
    table = {"kind": "table", "path": str(path)}
    assert kept(file, rates=table, unrated="drop") == ["sums/1", "sums/2"]
    with pytest.raises(InputError, match=r"no pass rate for 4 of 6 problems.* has rates of 2 "):
        kept(file, rates=table)
    write_rows(path, rows + [rate_row("other", n, 0.2) for n in range(1, 7)], PASS_RATES)
    with pytest.raises(
        InputError, match=r"has pass rates of teacher, other; set rl.difficulty.rat"
    ):
        kept(file, rates=table)
    assert len(kept(file, rates=table | {"source": "other"})) == 6
    with pytest.raises(
        InputError, match=r"rl.difficulty.rates.source=third: .* has teacher, other"
    ):
        kept(file, rates=table | {"source": "third"})


def test_rates_of_samples_leave_errored_ones_out(file: Path, tmp_path: Path) -> None:
    """As evaluate writes them, and from the files of a folder together."""
    statuses = {1: ["ok", "failed"], 2: ["failed", "errored"], 3: ["ok", "ok", "ok", "failed"]}
    rows = [
        {"checkpoint": "sft", "problem_id": f"sums/{number}", "reward_status": status}
        for number, each in statuses.items()
        for status in each
    ]
    for name, part in (("a", rows[:3]), ("b", rows[3:])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / f"{name}.parquet")
    table = {"kind": "table", "path": str(tmp_path), "source": "sft"}
    band = {"rates": table, "unrated": "drop"}
    assert kept(file, **band) == ["sums/1", "sums/3"]
    assert kept(file, **band, low=0.75) == ["sums/3"]
    assert kept(file, **band, low=0.0, high=0.0) == ["sums/2"]


def test_a_table_that_is_none(file: Path, tmp_path: Path) -> None:
    table = {"kind": "table", "path": str(tmp_path / "none.parquet")}
    with pytest.raises(InputError, match="no Parquet file there; give a run's collect/pass_rates"):
        kept(file, rates=table)
    (tmp_path / "none.parquet").write_text("x")
    with pytest.raises(InputError, match="is no Parquet file of pass rates"):
        kept(file, rates=table)
    pq.write_table(pa.table({"problem_id": ["a"], "mean": [0.5]}), tmp_path / "none.parquet")
    with pytest.raises(InputError, match="has the columns problem_id, mean; wanted problem_id and"):
        kept(file, rates=table)


def test_the_fingerprint_knows_a_table_and_workers_find_it(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rates.parquet", [rate_row("a", 1, 0.5)], PASS_RATES)
    config = run(file, rates={"kind": "table", "path": "rates.parquet"}, unrated="drop")
    before = rates_content(config.rl)
    moved = with_absolute_paths(config)
    monkeypatch.chdir("/")
    assert len(training_problems(moved.rl)) == 1
    write_rows(tmp_path / "rates.parquet", [rate_row("a", 1, 0.6)], PASS_RATES)
    assert rates_content(moved.rl) != before
    assert rates_content(run(file, unrated="drop").rl) == {}


def test_games_have_no_column(file: Path) -> None:
    with pytest.raises(ValueError, match="kind=column reads the problem file, and problems are ga"):
        RlConfig.model_validate(
            tree(file) | {"problems": {"games": [{"name": "chain_sum"}], "size": 8}}
        )


def test_a_band_the_wrong_way_round(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"low=0.9 is above high=0.1"):
        run(file, low=0.9, high=0.1)
