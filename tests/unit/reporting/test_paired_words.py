"""Paired differences on the pages: from the tables of samples, and in words that claim no more."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from compared_runs import make_evaluation, make_sft_run

from pear_ray.reporting.comparison.page import comparison_json, render_comparison
from pear_ray.reporting.comparison.pairs import paired_with_first
from pear_ray.reporting.comparison.runs import load_runs
from pear_ray.reporting.comparison.words import headline
from pear_ray.reporting.load import Estimate, Evaluation
from pear_ray.reporting.paired import load_counts, pair
from pear_ray.reporting.words import verdict

N = 8


def samples(path: Path, right: dict[str, list[int]], *, suite: str | None = "main") -> None:
    """So many of a problem's 8 samples right, by checkpoint; a ninth of problem 0 errored."""
    rows = [
        {
            "checkpoint": checkpoint,
            "problem_id": f"p/{problem}",
            "reward_status": "ok" if index < count else "failed",
        }
        for checkpoint, counts in right.items()
        for problem, count in enumerate(counts)
        for index in range(N)
    ]
    rows.append({"checkpoint": "rl", "problem_id": "p/0", "reward_status": "errored"})
    if suite:
        rows = [row | {"suite": suite} for row in rows]
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def evaluation(**values: float) -> Evaluation:
    checkpoints = {k: {"pass_at_1": Estimate(v, v - 0.2, v + 0.2)} for k, v in values.items()}
    return Evaluation("main", {}, 12, N, 1.0, 96, 0.95, checkpoints)


@pytest.mark.parametrize("suite", ["main", None])
def test_counts_of_a_table(tmp_path: Path, suite: str | None) -> None:
    """Also of one from before there were suites."""
    samples(tmp_path / "s.parquet", {"sft": [0, 3], "rl": [8, 2]}, suite=suite)
    assert load_counts(tmp_path / "s.parquet") == {
        ("main", "sft"): {"p/0": (8, 0), "p/1": (8, 3)},
        ("main", "rl"): {"p/0": (8, 8), "p/1": (8, 2)},
    }


def test_only_the_same_problems_are_paired() -> None:
    one, other = {"a": (8, 1), "b": (8, 2)}, {"a": (8, 1), "c": (8, 2)}
    assert pair(one, other, k=1, confidence=0.95) is None
    assert pair(one, None, k=1, confidence=0.95) is None
    assert pair(one, {"a": (8, 1), "b": (3, 2)}, k=4, confidence=0.95) is None
    found = pair(one, {"a": (8, 1), "b": (8, 8)}, k=8, confidence=0.95)
    assert found
    assert (found.value, found.num_better) == (0.0, 0)  # pass@8 is 1 with 2 and with 8 of 8 right


def test_a_paired_rise_is_told_though_the_intervals_overlap(tmp_path: Path) -> None:
    """Problems differ more than checkpoints do: the difference has the narrower interval."""
    before = [0, 0, 1, 1, 2, 3, 4, 5, 5, 6, 6, 7]
    samples(tmp_path / "s.parquet", {"sft": before, "rl": [n + 1 for n in before]})
    (sentence,) = verdict(evaluation(sft=0.42, rl=0.54), load_counts(tmp_path / "s.parquet"))
    assert sentence == (
        "pass@1 rose from 0.420 [0.220, 0.620] after SFT to 0.540 [0.340, 0.740] after RL; paired "
        "by problem: +0.125 [+0.125, +0.125], p < 0.001 (12 of 12 problems better, 0 worse)."
    )


def test_a_difference_whose_interval_holds_0_is_not_claimed(tmp_path: Path) -> None:
    samples(tmp_path / "s.parquet", {"sft": [0, 4, 4, 2], "rl": [4, 2, 4, 2]})
    (sentence,) = verdict(evaluation(sft=0.31, rl=0.375), load_counts(tmp_path / "s.parquet"))
    assert sentence.startswith("pass@1 went from ")
    assert "(1 of 4 problems better, 1 worse)" in sentence
    assert sentence.endswith("so this evaluation does not tell them apart.")


@pytest.fixture
def two_runs(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / name for name in ("plain", "pear")]
    for folder in folders:
        make_sft_run(folder)
        make_evaluation(folder, {"sft": (0.3, 0.2, 0.4), "rl": (0.4, 0.3, 0.5)})
    counts = [0, 1, 2, 3, 4, 5, 6, 7]
    samples(folders[0] / "evaluate" / "samples.parquet", {"sft": counts, "rl": counts})
    more = [n + 1 for n in counts]
    samples(folders[1] / "evaluate" / "samples.parquet", {"sft": counts[::-1], "rl": more})
    return folders


def test_runs_are_paired_with_the_first(two_runs: list[Path]) -> None:
    runs = load_runs(two_runs)
    table = paired_with_first(runs, "main")
    assert table.headers == ["minus plain", "pass@1, after SFT", "pass@1, after RL"]
    ((label, sft, rl),) = table.rows
    assert label == "pear"
    assert sft.endswith("p = 1.000; 4 of 8 problems better, 4 worse")
    assert rl == "+0.125 [+0.125, +0.125], p = 0.008; 8 of 8 problems better, 0 worse"
    assert "Paired with the first run" in render_comparison(runs)
    tree = json.loads(comparison_json(two_runs))
    assert tree["runs"][0]["minus_first"] == {}
    assert tree["runs"][1]["minus_first"]["main"]["rl"]["p"] == 2 / 2**8


def test_the_headline_says_the_paired_difference(two_runs: list[Path]) -> None:
    """Not whether the intervals of the two overlap, which they do."""
    make_evaluation(two_runs[1], {"rl": (0.41, 0.3, 0.5)})
    sentence, caveat, *_ = headline(load_runs(two_runs))
    assert sentence == (
        "pass@1 (after RL) is highest for pear, 0.410 [0.300, 0.500]; paired by problem it is "
        "above plain (+0.125 [+0.125, +0.125], p = 0.008)."
    )
    assert caveat == "Intervals of pass@k are over the problems of one run each, not over seeds."


def test_evaluations_of_another_kind_are_not_paired(two_runs: list[Path]) -> None:
    make_evaluation(two_runs[1], {"rl": (0.41, 0.3, 0.5)}, num_samples=4)
    assert paired_with_first(load_runs(two_runs), "main").rows == []
