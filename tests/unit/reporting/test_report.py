import json
import random
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import numpy as np
import pyarrow.parquet as pq
import pytest
from synthetic_run import CONFIG, SCORES, make_evaluation, make_run

from pear_ray.artifacts.tables import WEIGHT_SAMPLES, write_rows
from pear_ray.config.run import dump_run, validate_run
from pear_ray.errors import InputError
from pear_ray.reporting.load import WeightSamples, load_run_data
from pear_ray.reporting.outcome import (
    SHOWN_CHARS,
    evaluated_while_training,
    pass_at_k_over_steps,
    shorten,
)
from pear_ray.reporting.plot import running_mean
from pear_ray.reporting.report import render_report, write_report
from pear_ray.reporting.rl_health_figures import MAX_SYNC_GAPS
from pear_ray.reporting.sections import build_sections
from pear_ray.telemetry.metrics_log import MetricsLog


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "synthetic")


@pytest.fixture(scope="module")
def html(run_dir):
    write_report(run_dir, run_dir / "report.html")
    return (run_dir / "report.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every element's name and attributes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def elements(html):
    parser = Elements()
    parser.feed(html)
    return parser.seen


def test_the_page_says_the_numbers_of_the_evaluation(html):
    assert (
        "<p>pass@1 rose from 0.214 [0.180, 0.249] after SFT to 0.550 [0.508, 0.592] after RL; "
        "paired by problem: +0." in html
    )
    assert "<td>0.820 [0.776, 0.868]</td>" in html
    assert "<td>3.1 % [2.0, 4.4]</td>" in html


def test_overlapping_intervals_make_no_claim_on_the_page(tmp_path):
    scores = SCORES | {"rl": {"pass_at_1": (0.24, 0.2, 0.28), "pass_at_8": (0.6, 0.5, 0.7)}}
    (tmp_path / "run" / "evaluate").mkdir(parents=True)
    make_evaluation(tmp_path / "run" / "evaluate", random.Random(0), scores)
    write_report(tmp_path / "run", tmp_path / "report.html")
    head = (tmp_path / "report.html").read_text().partition('<div class="verdict">')[2]
    first = re.search(r"<p>(.*?)</p>", head).group(1)
    assert first.endswith("worse), so this evaluation does not tell them apart.")


def test_the_page_is_one_file_without_network_or_script(html):
    seen = elements(html)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in seen}
    links = [a[key] for _, a in seen for key in ("href", "src", "xlink:href") if key in a]
    assert links
    assert all(link.startswith("#") for link in links)
    assert "http" not in html.partition("</style>")[2]
    assert len(html) < 2_000_000


def test_every_figure_has_a_drawing_and_one_caption(html):
    figures = re.findall(r"<figure>(.*?)</figure>", html, re.DOTALL)
    assert len(figures) == 22
    for figure in figures:
        assert figure.count("<figcaption>") == 1
        svg = re.search(r"<svg.*</svg>", figure, re.DOTALL).group()
        ET.fromstring(svg)  # well-formed
        assert "nan" not in re.sub(r"<text.*?</text>", "", svg, flags=re.DOTALL).lower()


@pytest.fixture(scope="module")
def html_of_sources(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "sources"
    make_run(run_dir, sources=("gsm8k", "_web", "c"))
    log = MetricsLog(run_dir, run="synthetic", stage="sft", attempt=1)
    for step, ratio in ((1, 0.02), (48, 0.5)):
        log.log({"sft/grad_norm_ratio_to_uniform": ratio}, step=step, num_steps=48)
    write_report(run_dir, run_dir / "report.html")
    return (run_dir / "report.html").read_text(encoding="utf-8")


def test_sources_are_told_apart(html, html_of_sources):
    """By the last step with tokens of each: of the third, the step before the last."""
    rows = {
        "gsm8k": "48 1,000 50.0 % 37.5 % 0.5 50.0 % 0.75 -0.4 62.5 % 0.0 % 3.1 %",
        "_web": "48 500 25.0 % 15.6 % 0.5 25.0 % 0.75 -0.4 62.5 % 0.0 % 3.1 %",
        "c": "47 250 12.5 % 7.0 % 0.5 12.5 % 0.76 -0.4 62.5 % 0.0 % 3.1 %",
    }
    for source, values in rows.items():
        row = html_of_sources.partition(f'<tr><th scope="row">{source}</th>')[2]
        cells = re.findall(r"<td>(.*?)</td>", row.partition("</tr>")[0])
        assert " ".join(cells) == values
    for title in ("Effective sample size by source", "Weight by source"):
        drawing = html_of_sources.partition(f"<h3>{title}</h3>")[2].partition("</svg>")[0]
        for name in ("gsm8k", "_web", "c"):
            assert re.search(rf">\s*{name}</text>", drawing), (title, name)
        assert "_tokens" not in drawing
        assert title not in html


def test_the_gradient_ratio_is_drawn_with_its_alarms(html, html_of_sources):
    drawing = html_of_sources.partition("<h3>Gradient norm beside uniform weights</h3>")[2]
    drawing = drawing.partition("</svg>")[0]
    assert ">0.03</text>" in drawing
    assert ">30</text>" in drawing
    assert "Gradient norm beside uniform weights" not in html


def test_ids_that_are_referenced_are_unique_on_the_page(html):
    ids = re.findall(r'\bid="([^"]+)"', html)
    used = set(re.findall(r"url\(#([^)]+)\)", html)) | set(re.findall(r'href="#([^"]+)"', html))
    assert used <= set(ids)
    assert len(ids) == len(set(ids))


def test_colours_are_left_to_the_style_sheet(html):
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "var(--blue)" in drawn
    assert not re.findall(r"#[0-9a-f]{6}\b", drawn)


def test_text_of_the_run_is_never_markup(html):
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert "&lt;answer&gt;" in html


def test_a_warning_with_markup_is_escaped(tmp_path):
    tmp_path.joinpath("run").mkdir()
    log = MetricsLog(tmp_path / "run", run="x", stage="rl", attempt=1)
    log.event("warning", "<script>alert(1)</script>")
    write_report(tmp_path / "run", tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_shown_problems_follow_the_rule(run_dir, html):
    rows = pq.read_table(run_dir / "evaluate" / "samples.parquet").to_pylist()
    first = {
        (r["checkpoint"], r["problem_id"]): r["reward_status"]
        for r in rows
        if not r["sample_index"]
    }
    problems = sorted({r["problem_id"] for r in rows})
    improved = [p for p in problems if first["base", p] != "ok" and first["rl", p] == "ok"]
    failed = [p for p in problems if first["rl", p] != "ok"]
    shown = re.findall(r'<h3>chain_sum <span class="quiet">(.*?)</span>', html)
    assert shown == improved[:3] + failed[:1]


def test_an_empty_folder_gives_a_page_that_says_what_is_missing(tmp_path):
    (tmp_path / "run").mkdir()
    write_report(tmp_path / "run", tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    for sentence in (
        "No verdict yet.",
        "evaluate/results.json: not there; run the stage `evaluate`",
        "collect/corpus: not there; run the stage `collect`",
        "sft/weight_samples.parquet: not there; run the stage `sft`",
        "no figures of RL: stage `rl` has not logged a step",
        "No completions to show",
        "No stage has finished.",
    ):
        assert sentence in html
    assert "<svg" not in html


def test_pass_at_k_while_training_is_drawn_where_it_was_logged(tmp_path, html):
    assert "pass@k while" not in html
    config = json.loads(json.dumps(CONFIG))
    config["sft"]["pass_at_k"] = {"every": 24, "num_problems": 7}
    run_dir = make_run(tmp_path / "synthetic", config=config)
    log = MetricsLog(run_dir, run="synthetic", stage="sft", attempt=1)
    for step, value in ((0, 0.08), (24, 0.15), (48, 0.21)):
        metrics = {"": value, "/low": value - 0.02, "/high": value + 0.02}
        names = {f"sft/eval/pass_at_1{end}": each for end, each in metrics.items()}
        log.log(names, step=step, num_steps=48)
    data = load_run_data(run_dir)
    assert evaluated_while_training(data, "sft") == ["pass_at_1"]
    assert evaluated_while_training(data, "rl") == []
    drawn = pass_at_k_over_steps(data, "sft")
    assert drawn.title == "pass@k while SFT trains"
    assert "The first 7 problems of the evaluation" in drawn.caption
    assert "95 % interval" in drawn.caption
    write_report(run_dir, run_dir / "report.html")
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert page.count(drawn.svg) == 1
    assert "pass@k while RL trains" not in page


def test_uniform_weights_are_named_instead_of_drawn(tmp_path):
    tree = json.loads(json.dumps(CONFIG))
    tree["sft"]["weights"] = {"kind": "uniform"}
    tree["corpus"]["kind"] = "sampled"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_run(validate_run(tree, origin="test")))
    write_report(tmp_path / "run", tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "sft.weights is uniform (plain SFT): every token weighs 1" in html
    assert "uniform (plain SFT)</dd>" in html


@pytest.mark.parametrize(
    ("sft", "told"),
    [
        (
            {"weights": {"kind": "by_source", "weights": {"F": 1.0, "N": 0.0}}},
            "by source: F 1, N 0",
        ),
        (
            {"weights": {"level": "sequence", "control": "shuffled"}},
            "the arm&#39;s own weights, each given to another place of its step. Weights are shown",
        ),
        ({"num_epochs": 0}, "no SFT: sft.num_epochs is 0, and the policy goes on as it came"),
    ],
)
def test_the_arms_of_a_study_say_what_they_are(tmp_path, sft, told):
    tree = json.loads(json.dumps(CONFIG))
    tree["sft"] |= sft
    html = render_report(load_run_data(make_run(tmp_path / "synthetic", config=tree)))
    assert told in html


def test_a_run_without_sft_has_no_figure_of_it(tmp_path):
    """What the stage leaves then: a table without a row, and no metric."""
    tree = json.loads(json.dumps(CONFIG))
    tree["sft"]["num_epochs"] = 0
    run_dir = make_run(tmp_path / "synthetic", config=tree)
    write_rows(run_dir / "sft" / "weight_samples.parquet", [], WEIGHT_SAMPLES)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    others = [line for line in lines if json.loads(line)["stage"] != "sft"]
    (run_dir / "metrics.jsonl").write_text("".join(others))
    sections = {each.anchor: each for each in build_sections(load_run_data(run_dir))}
    for name in ("weights", "sft"):
        assert sections[name].charts == []
        assert sections[name].missing == [
            "no SFT: sft.num_epochs is 0, and the policy goes on as it came"
        ]
    assert sections["rl"].charts


@pytest.mark.parametrize(
    ("name", "content"),
    [("evaluate/results.json", '{"num_problems": 3}'), ("sft/weight_samples.parquet", "PAR?")],
)
def test_a_broken_input_is_told_and_the_rest_is_drawn(run_dir, tmp_path, name, content):
    broken = tmp_path / "run"
    shutil.copytree(run_dir, broken)
    (broken / "metrics.jsonl").unlink()  # fewer figures: faster
    (broken / name).write_text(content)
    write_report(broken, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert f"{name}: not " in html
    assert "Completion lengths in the corpus</h3>" in html


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        write_report(tmp_path / "nowhere", tmp_path / "report.html")


def test_the_resumed_attempt_is_the_one_drawn(run_dir):
    data = load_run_data(run_dir)
    assert [r.step for r in data.metrics["rl"]] == list(range(1, 61))
    assert [r.attempt for r in data.metrics["rl"]] == [1] * 20 + [2] * 40


def test_corpus_sums_take_only_trained_tokens(run_dir):
    data = load_run_data(run_dir)
    rows = pq.read_table(run_dir / "score" / "scored").to_pylist()
    expected = [
        np.mean([v for v, m in zip(r["behavior_logprobs"], r["loss_mask"], strict=True) if m])
        for r in rows
    ]
    assert data.corpus.num_loss_tokens.tolist() == [sum(r["loss_mask"]) for r in rows]
    np.testing.assert_allclose(data.corpus.behavior_logprob_means, expected, rtol=1e-6)
    assert isinstance(data.weights, WeightSamples)


def test_non_finite_metrics_leave_a_gap(tmp_path):
    for step, value in ((1, 1.0), (2, float("nan")), (3, float("inf"))):
        log = MetricsLog(tmp_path, run="x", stage="rl", attempt=1)
        log.log({"rl/grad_norm": value}, step=step, num_steps=3)
    steps, values = load_run_data(tmp_path).series("rl", "rl/grad_norm")
    assert steps.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(values, [1.0, np.nan, np.nan])
    write_report(tmp_path, tmp_path / "report.html")


def test_running_mean_by_hand():
    values = np.array([1.0, 2.0, np.nan, 6.0, 10.0])
    np.testing.assert_allclose(running_mean(values, window=3), [1.5, 1.5, 4.0, 8.0, 8.0])


def test_long_completions_keep_their_ends():
    text = "a" * SHOWN_CHARS + "END"
    assert shorten(text).endswith("END")
    assert "[... 3 characters left out ...]" in shorten(text)
    assert shorten("short") == "short"


def test_sync_gap_defaults_are_the_engines():
    weights = pytest.importorskip("pear_ray.engines.weights")
    assert MAX_SYNC_GAPS == weights.MAX_GAP
