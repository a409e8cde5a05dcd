"""Several runs on one page: the numbers are the runs', the words claim no more than they carry."""

import json
import re
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from compared_runs import NUM_STEPS, PEAR, make_evaluation, make_sft_run, set_fingerprint

from pear_ray import cli
from pear_ray.reporting.comparison.figures import spread
from pear_ray.reporting.comparison.page import render_comparison
from pear_ray.reporting.comparison.runs import load_runs, shared_notes
from pear_ray.reporting.comparison.words import compared, headline
from pear_ray.reporting.load import Estimate
from pear_ray.telemetry.metrics_log import MetricsLog

LOSS_OF_EVERY_OBJECTIVE = "7777"  # in every step of the runs made here


@pytest.fixture
def arms(tmp_path):
    """A plain run, another objective, and PEAR weights."""
    return [
        make_sft_run(tmp_path / "nll", nll=1.0),
        make_sft_run(tmp_path / "dft", nll=1.2, objective="dft"),
        make_sft_run(tmp_path / "pear", nll=0.9, weights=PEAR),
    ]


def page(folders):
    return render_comparison(load_runs(folders))


def cells(html, run):
    """The words of the run's row in the table of runs."""
    row = next(row for row in re.findall(r"<tr.*?</tr>", html, re.DOTALL) if f"{run}</th>" in row)
    return re.findall(r"<td[^>]*>(.*?)</td>", row)


def test_the_table_has_what_differs_and_how_each_run_ended(arms):
    html = page(arms)
    head = re.findall(r'<th scope="col"[^>]*>(.*?)</th>', html)
    assert [name.replace("\u200b", "") for name in head] == [
        *("run", "sft.weights", "sft.objective", "held-out nll", "weighted held-out nll"),
        *("train nll", "gradient norm", "mean weight", "ESS / tokens"),
        *("SFT steps", "SFT tokens/s", "SFT took"),
    ]
    # held-out: 0.5 above the last step's; last tenth of 20 steps: the mean of 1.3 and 1.2
    assert cells(html, "dft") == [
        *("uniform", "dft", "1.7000", "1.4500", "1.2500", "2.50", "1.20", "0.620"),
        *("20", "1,050", "1 min 30 s"),
    ]
    assert cells(html, "pear")[:2] == ["pear", "nll"]
    assert "Training losses are not here" in html
    assert LOSS_OF_EVERY_OBJECTIVE not in re.sub(r"<[^>]*>", " ", html)


def test_every_curve_of_every_run_is_drawn_and_can_be_singled_out(arms):
    html = page(arms)
    figures = re.findall(r"<figure>.*?</figure>", html, re.DOTALL)
    titles = [re.search(r"<h3>(.*?)</h3>", each).group(1) for each in figures]
    assert titles == [
        *("Held-out nll", "Weighted held-out nll", "Train nll", "Gradient norm"),
        *("Effective sample size", "Mean weight"),
    ]
    places = [set(re.findall(r'class="run (run-\d)"', each)) for each in figures]
    everyone = {"run-0", "run-1", "run-2"}
    # runs with uniform weights would lie on 1
    assert places == [everyone, {"run-2"}, everyone, everyone, {"run-2"}, {"run-2"}]
    assert "Runs with uniform weights are left out: theirs is the plain one." in figures[1]
    assert "Runs with uniform weights are left out: theirs is 1." in figures[4]
    assert ">dft  1.7</text>" in figures[0]  # named where it ends
    assert ">dft</text>" in figures[2]  # the end of a running mean is no number of the run's
    for place in range(3):
        assert f'id="pick-{place}"' in html


def test_many_runs_are_shown_one_by_one_as_well(tmp_path):
    folders = [make_sft_run(tmp_path / f"run{n:02d}", nll=1 + n / 50) for n in range(16)]
    html = page(folders)
    panels = html.partition("<h3>Held-out nll, run by run</h3>")[2].partition("</figure>")[0]
    assert set(re.findall(r'class="run run-(\d+)"', panels)) == {str(n) for n in range(16)}
    styles = re.findall(r'class="key".*?style="([^"]*)"', html)[:16]
    assert len(set(styles)) == 16  # no two alike, in colour and dashes together
    assert len(html) < 2_000_000


def test_the_page_is_one_file_without_network_or_script(arms):
    class Elements(HTMLParser):
        seen: list

        def handle_starttag(self, tag, attrs):
            self.seen.append((tag, dict(attrs)))

    parser = Elements()
    parser.seen = []
    html = page(arms)
    parser.feed(html)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in parser.seen}
    links = [a[key] for _, a in parser.seen for key in ("href", "src") if key in a]
    assert links
    assert all(link.startswith("#") for link in links)
    assert "http" not in html.partition("</style>")[2]
    ids = [a["id"] for _, a in parser.seen if "id" in a]
    assert len(ids) == len(set(ids))


def test_what_comes_from_a_run_is_escaped(arms, tmp_path):
    odd = tmp_path / "<b>$x$"
    arms[0].rename(odd)
    html = page([odd, *arms[1:]])
    assert "<b>" not in html
    assert "&lt;b&gt;$x$" in html


def test_held_out_losses_have_no_interval_and_the_page_says_so(arms):
    (sentence,) = headline(load_runs(arms))
    assert sentence == (
        "Held-out nll goes from 1.4000 (pear) to 1.7000 (dft) nats per token over 3 runs; one run "
        "each, so no interval: another seed may order them otherwise."
    )


def test_overlapping_intervals_are_not_told_apart():
    found = {
        "a": Estimate(0.5, 0.45, 0.55),
        "b": Estimate(0.4, 0.35, 0.45),  # touches a's
        "c": Estimate(0.2, 0.15, 0.44),
    }
    assert compared(found, where="after SFT") == (
        "pass@1 (after SFT) is highest for a, 0.500 [0.450, 0.550]; its interval overlaps with "
        "that of b: not told apart; the interval lies below it for c."
    )


def test_pass_at_1_is_of_the_last_checkpoint_that_two_runs_share(arms):
    make_evaluation(arms[0], {"base": (0.1, 0.05, 0.15), "sft": (0.3, 0.2, 0.4)})
    make_evaluation(
        arms[1], {"base": (0.1, 0.05, 0.15), "sft": (0.5, 0.45, 0.6), "rl": (0.9, 0.8, 1.0)}
    )
    html = page(arms)
    first, second, *_ = headline(load_runs(arms))
    assert first == (
        "pass@1 (after SFT) is highest for dft, 0.500 [0.450, 0.600]; the interval lies below it "
        "for nll."
    )
    assert second == "Intervals of pass@k are over the problems of one run each, not over seeds."
    assert "<td>0.900 [0.800, 1.000]</td>" in html
    assert "pass@1 of every run" in html


def test_evaluations_of_another_kind_are_not_compared(arms):
    make_evaluation(arms[0], {"sft": (0.3, 0.2, 0.4)})
    make_evaluation(arms[1], {"sft": (0.5, 0.45, 0.6)}, num_samples=4)
    runs = load_runs(arms)
    assert headline(runs)[0].startswith("pass@1 is not compared")
    (note,) = shared_notes(runs)
    assert note == (
        "The evaluations differ (problems, prompts, samples, temperature, token limit or "
        "verifiers), so pass@k is not of the same task: nll; dft."
    )


def test_alike_runs_need_no_note(arms):
    assert shared_notes(load_runs(arms)) == []


def test_another_corpus_is_noted_and_its_held_out_loss_not_compared(arms):
    set_fingerprint(arms[1], "collect", "other rows")
    set_fingerprint(arms[1], "score", "other scores")
    runs = load_runs(arms)
    rows, scores, heldout = shared_notes(runs)
    assert rows.endswith("are not known to be of the same text: nll, pear; dft.")
    assert "scored corpora differ" in scores
    assert heldout.endswith("so neither are held-out figures: nll, pear; dft.")
    (sentence,) = headline(runs)
    assert sentence.startswith("Held-out losses are not compared")
    assert rows.replace("`", "") in re.sub("<[^>]*>", "", unescape(page(arms)))


def test_an_sft_that_two_runs_share_is_no_second_one(arms):
    set_fingerprint(arms[2], "sft", "sft-of-nll")
    assert shared_notes(load_runs(arms)) == [
        "One and the same SFT, taken over from run to run: nll, pear."
    ]


def test_an_unfinished_run_is_shown_with_its_step_and_left_out_of_what_is_said(tmp_path, arms):
    early = make_sft_run(tmp_path / "early", nll=0.1, num_steps=7, finished=False)
    never = make_sft_run(tmp_path / "never", num_steps=0)
    (never / "sft" / "manifest.json").unlink()
    html = page([*arms, early, never])
    assert f"early: sft is unfinished at step 7 of {NUM_STEPS}" in html
    assert "never: sft has not begun" in html
    assert cells(html, "early")[2] == "2.1000"  # of step 5: 15 steps of 0.1 above 0.1, and 0.5
    assert cells(html, "early")[-1] == "-"
    assert (
        "1.4000 (pear) to 1.7000 (dft) nats per token over 3 runs"
        in headline(load_runs([*arms, early, never]))[0]
    )


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [make_sft_run(tmp_path / side / "demo") for side in ("one", "two")]
    assert [run.label for run in load_runs(folders)] == ["one/demo", "two/demo"]


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_names_keep_their_order_and_distance(count):
    heights = np.sort(np.random.default_rng(count).uniform(0, 1, count) ** 3)
    placed = spread(heights.tolist(), gap=0.06)
    assert np.all(np.diff(placed) >= 0.06 - 1e-9)
    assert placed[0] >= 0
    assert placed[-1] <= 1


def test_names_that_do_not_touch_stay_and_close_ones_move_apart_evenly():
    assert spread([0.1, 0.5, 0.9], gap=0.2) == [0.1, 0.5, 0.9]
    assert spread([0.5, 0.5], gap=0.2) == pytest.approx([0.4, 0.6])
    assert spread([0.0, 0.0], gap=0.2) == pytest.approx([0.0, 0.2])  # not below the figure


def test_the_command_writes_the_page_and_prints_the_table_for_machines(arms, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert cli.main(["compare", *map(str, arms), "--out", str(out)]) == 0
    assert "3 runs side by side" in out.read_text(encoding="utf-8")
    capsys.readouterr()
    assert cli.main(["compare", *map(str, arms), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    dft = tree["runs"][1]
    assert (dft["run"], dft["notes"], tree["notes"]) == ("dft", [], [])
    assert dft["settings"]["sft.objective"] == {"kind": "dft"}
    assert dft["figures"]["heldout_nll"] == pytest.approx(1.7)
    assert dft["figures"]["sft_s"] == 90


@pytest.mark.parametrize("spoil", ["missing", "empty", "file", "not yaml", "a list", "twice"])
def test_what_is_no_run_is_one_clear_error(spoil, arms, tmp_path, capsys):
    bad = tmp_path / "bad"
    if spoil == "file":
        bad.write_text("text")
    elif spoil == "twice":
        bad = arms[0] / ".." / arms[0].name
    elif spoil != "missing":
        bad.mkdir()
        if spoil != "empty":
            (bad / "config.yaml").write_text("a: [" if spoil == "not yaml" else "[1, 2]")
    out = tmp_path / "page.html"
    assert cli.main(["compare", str(arms[0]), str(bad), "--out", str(out)]) == 2
    found = capsys.readouterr()
    wanted = {
        "not yaml": "config.yaml: not valid YAML",
        "a list": "config.yaml: expected a resolved config, got list",
        "twice": "given twice",
    }
    assert found.err.startswith("InputError: ")
    assert wanted.get(spoil, f"{bad}: no run's folder") in found.err
    assert "Traceback" not in found.err
    assert not out.exists()


def test_a_page_that_cannot_be_written_is_one_clear_error(arms, tmp_path, capsys):
    assert cli.main(["compare", str(arms[0]), "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert "no: no such folder" in capsys.readouterr().err


def test_rl_is_compared_by_outcome_as_well_as_by_reward(arms):
    """One run learns nothing for its last ten steps: its gradient of 0 leaves the log axis."""
    for place, folder in enumerate(arms[1:]):
        log = MetricsLog(folder, run=folder.name, stage="rl", attempt=1)
        for step in range(1, 21):
            values = {
                "rl/reward/mean": 0.75 + place,
                "rl/correct_fraction": 0.5 - 0.25 * place,
                "rl/degenerate_group_fraction": 0.5,
                "rl/grad_norm": 0.0 if place and step > 10 else 1.0,
            }
            log.log(values | ({"rl/kl_to_init": 0.0} if place else {}), step=step, num_steps=20)
    html = page(arms)
    assert cells(html, "dft")[-5:-3] == ["0.750", "0.500"]
    assert cells(html, "pear")[-5:-3] == ["1.75", "0.250"]
    titles = re.findall(r"<h3>(RL .*?)</h3>", html)
    assert titles == ["RL reward", "RL correct answers", "RL degenerate groups", "RL gradient norm"]
    drawn = html.partition("<h3>RL gradient norm</h3>")[2].partition("</svg>")[0]
    assert 'class="run run-2"' in drawn
    assert not re.findall(r' d="[^"]*(?:nan|inf)', drawn)
