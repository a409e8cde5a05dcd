"""Rollouts in a summary, in `pear inspect` and on the report's page."""

import re
import shutil
from pathlib import Path

import pytest
from rollout_files import write_steps
from synthetic_run import make_run

from pear_ray import cli
from pear_ray.artifacts import manifest
from pear_ray.artifacts.rollouts import saved_steps, step_file
from pear_ray.reporting.report import write_report
from pear_ray.reporting.rollouts.facts import step_facts
from pear_ray.reporting.rollouts.page import shown_steps
from pear_ray.reporting.rollouts.summary import summarise, summary_text

LENGTHS = [3, 3, 4, 2, 3, 3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_steps(tmp_path / "rollouts")


def test_facts_of_a_step_by_hand(folder: Path) -> None:
    facts = step_facts(step_file(folder, 2))
    assert (facts.step, facts.versions, facts.num_groups) == (2, [1], 3)
    assert facts.lengths.tolist() == LENGTHS
    assert dict(facts.statuses) == {"failed": 4, "ok": 1, "errored": 1}
    # All wrong; and the one judged of a group whose other is errored.
    assert facts.num_degenerate == 2
    assert facts.num_truncated == 1
    assert facts.reward_sum == 1.5
    assert facts.component_sums == {"game": 1.0, "form": 0.75}
    assert facts.gaps is not None
    assert facts.gaps.tolist() == [0.25] * 18


def test_the_summary_by_hand(folder: Path, tmp_path: Path) -> None:
    found = summarise(list(saved_steps(folder).values()), tokens_per_s=1234.5)
    assert found["rollouts"] == 18
    assert found["tokens"] == 54
    assert found["pass_rate"] == pytest.approx(1 / 5)  # an errored reward is no wrong answer
    assert found["reward_mean"] == pytest.approx(0.3)
    assert found["reward/form"] == pytest.approx(0.15)
    assert found["errored_fraction"] == pytest.approx(1 / 6)
    assert found["truncated_fraction"] == pytest.approx(1 / 6)
    assert found["degenerate_group_fraction"] == pytest.approx(2 / 3)
    assert (found["length_mean"], found["length_median"], found["length_max"]) == (3, 3, 4)
    manifest.begin(tmp_path / "rl_rollouts", "0" * 20)
    manifest.complete(tmp_path / "rl_rollouts", counts={}, details={"summary": found})
    text = summary_text(tmp_path / "rl_rollouts")
    assert "rollouts       18 in 9 groups of 3 steps\n" in text
    assert "pass rate      0.200 of 15 judged\n" in text
    assert "reward         mean 0.300 (form 0.150, game 0.200)\n" in text
    assert "reward errors  16.67 %\n" in text
    assert "longest 4 tokens\n" in text
    assert "1,234 tokens/s" in text


def test_first_middle_and_last_step_with_the_groups_that_teach(tmp_path: Path) -> None:
    steps = shown_steps(write_steps(tmp_path, [1, 2, 5, 6, 7, 8]))
    assert [each.step for each in steps] == [1, 5, 8]
    # Group 1 alone has two rewards; group 0 fills up.
    assert [group.problem_id for group in steps[0].groups] == ["sum/0/0", "sum/0/1"]
    alike, differ = steps[0].groups
    assert [(one.label, one.text) for one in alike.completions] == [("all rewards alike", "1+1")]
    assert [(one.label, one.status, one.text) for one in differ.completions] == [
        ("best", "ok", "3+00"),
        ("worst", "failed", "4+"),
    ]
    assert differ.words == "1 of 2 completions right"
    facts = "reward 1 · (game 1, form 0.5) · advantage +0.7 · 4 tokens"
    assert differ.completions[0].facts == facts
    assert "mean reward 0.300, 20.0 % right" in steps[0].words
    assert [each.step for each in shown_steps(write_steps(tmp_path / "one", [4]))] == [4]
    assert shown_steps(tmp_path / "none") == []


def test_the_report_has_them_escaped_and_says_when_it_has_not(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write_steps(run_dir / "rl" / "rollouts")
    write_report(run_dir, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = html.partition('<section id="rollouts">')[2].partition("</section>")[0]
    assert re.findall(r"<h3>Step (\d+) ", page) == ["1", "2", "3"]
    assert page.count("✓ right") == 3
    assert "1 + 2 = &lt;b&gt;?&lt;/b&gt;" in page
    assert "<b>" not in page
    step_file(run_dir / "rl" / "rollouts", 3).write_text("PAR?")
    write_report(run_dir, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "step-00003.parquet: not a table of this version" in html
    shutil.rmtree(run_dir / "rl")
    write_report(run_dir, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "no rollouts in rl/rollouts: run the stage `rl`" in html


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in the middle of its RL stage."""
    monkeypatch.setenv("COLUMNS", "260")
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1" if name.startswith("HF") else "false")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    folder = make_run(tmp_path / "synthetic")
    (folder / "run.json").write_text('{"name": "synthetic"}')
    shutil.rmtree(folder / "rl")
    manifest.begin(folder / "rl", "0" * 20)
    write_steps(folder / "rl" / "rollouts")
    return folder


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_inspect_shows_groups_of_the_last_step(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(capsys, run_dir / "rl", "--html", run_dir / "page.html")
    assert re.search(r"rows +18 in 3 files", out)
    rows = [line.split() for line in out.splitlines() if re.match(r" +[123]  ", line)]
    assert [" ".join(row[:6]) for row in rows] == [f"{n} {n - 1} 3 of 2 0.300" for n in (1, 2, 3)]
    # game, form, right, errored, equal, truncated, length, gaps
    assert " ".join(rows[0][6:]) == "0.200 0.150 20.0 % 16.7 % 67 % 16.7 % 3.0 0.25 0.25"
    assert "group 1: sum sum/0/1, policy version 2\n" in out
    assert (
        "completion 0: right, reward 1.000 (game 1, form 0.5), advantage +0.700, ended by stop "
        "after 4 tokens, trainer to sampler: ratio mean 1.2840, 1.2840 to 1.2840, gap mean 0.25, "
        "max 0.25" in out
    )
    assert "completion 1: reward errored (ValueError: no answer)" in out
    assert "ended by length after 3 tokens" in out
    html = (run_dir / "page.html").read_text(encoding="utf-8")
    assert "-1 to -0.2" in html
    assert "background-color: #fddbc7" in html  # -0.5: the tokens' colour


def test_inspect_shows_the_step_that_is_asked_for(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(capsys, run_dir / "rl", "--step", "1", "--rows", "1")
    assert "group 0: sum sum/0/0, policy version 0\n" in out
    assert "group 1" not in out
    of_file = shown(capsys, step_file(run_dir / "rl" / "rollouts", 2))
    assert "policy version 1\n" in of_file
    assert "policy version 1\n" in shown(capsys, run_dir / "rl" / "rollouts", "--step", "2")


@pytest.mark.parametrize(
    ("where", "step", "message"),
    [
        ("rl", "9", "--step 9: no rollouts of it; there are 3 steps, 1 to 3"),
        ("score", "1", "score holds no rollouts; give a run's folder rl, rl_rollouts or rl_train"),
    ],
)
def test_a_step_that_is_not_there_is_told(
    run_dir: Path, capsys: pytest.CaptureFixture[str], where: str, step: str, message: str
) -> None:
    assert cli.main(["inspect", str(run_dir / where), "--step", step]) == 2
    assert message in capsys.readouterr().err


def test_rollouts_without_a_training_have_no_gaps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "260")
    out = shown(capsys, write_steps(tmp_path / "rollouts", [1], trained=False))
    assert "ended by stop after 4 tokens\n" in re.sub(" +\n", "\n", out)
    assert "advantage +" not in out
    assert "tokens are shown as ids" in out
