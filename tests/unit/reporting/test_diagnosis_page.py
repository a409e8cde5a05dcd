"""The page and the JSON say the diagnosis's numbers, whatever the sources are called."""

import json
import re
from xml.etree import ElementTree as ET

import pytest
from scored_rows import constant, second, worked

from pear_ray.config.sft import PearWeights, UniformWeights
from pear_ray.reporting.diagnosis.numbers import diagnose
from pear_ray.reporting.diagnosis.page import HTML_FILE, JSON_FILE, write_diagnosis

NASTY = ("<b>bold</b>", "_hidden", r"$\frac{$", "a/very/long/path/to/some/model/of/theirs")


def written(rows, folder, *, weights=None, **options):
    diagnosis = diagnose([rows], weights=weights or PearWeights(), **options)
    write_diagnosis(diagnosis, folder, name="my <run>", facts=[("policy", "embedded:student")])
    return json.loads((folder / JSON_FILE).read_text()), (folder / HTML_FILE).read_text()


def test_the_json_has_every_number(tmp_path):
    tree, _ = written([worked(source="a"), second(source="b", is_negative=True)], tmp_path)
    (source,) = tree["sources"]
    assert tree["overall"] | {"source": "a"} == source
    assert source["health"]["effective_sample_size"] == pytest.approx(5.886130, abs=1e-5)
    assert source["decile_weight_means"][2] is None
    assert source["decile_weight_means"][8] == 1.0
    assert sum(source["log_ratio_shares"]) == pytest.approx(1.0)
    assert tree["weights"]["gamma"] == 0.999
    assert (tree["is_assumed"], tree["num_negative_rows"]) == (False, {"b": 1})
    assert tree["warnings"][0]["rule"] == "flat_weights"
    assert tree["verdict"].startswith("Look before training: PEAR does little here (a). ")


def test_the_page_says_the_numbers(tmp_path):
    rows = [worked(source="a"), second(source="b"), second(source="c", is_negative=True)]
    _, html = written(rows, tmp_path)
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", html)
    for row in (
        [
            "a",
            "1",
            "6",
            "0.122",
            "0.371",
        ],  # log-ratios: mean 0.73 / 6, variance 0.9129 / 6 - mean^2
        ["a", "1.18"],  # weights: 7.064795 / 6
        ["b", "2.0", "2: 1.00", "2: 1.00", "2: 1.00"],  # lengths
        ["all sources", "4.0", "2: 1.00", "2: 1.00", "2: 1.00", "6: 1.00", "6: 1.00"],
    ):
        assert any(cells[k : k + len(row)] == row for k in range(len(cells))), row
    assert "1 rows of c" in html
    assert "<dt>policy</dt><dd>embedded:student</dd>" in html
    assert "<code>sft.weights.kind=uniform</code>" in html
    assert "my &lt;run&gt;" in html


def test_one_source_needs_no_sum(tmp_path):
    _, html = written([worked(source="a")], tmp_path)
    assert "all sources" not in html


def test_the_page_is_one_file_without_network_or_script(tmp_path):
    _, html = written([constant(-0.5, length=30, source=name) for name in NASTY], tmp_path)
    assert not re.findall(r"<(script|link|img|iframe|object)\b", html)
    assert all(link.startswith("#") for link in re.findall(r'(?:href|src)="([^"]*)"', html))
    assert "http" not in html.partition("</style>")[2]
    figures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(figures) == 3
    for svg in figures:
        drawn = "".join(ET.fromstring(svg).itertext())
        for label in ("<b>bold</b>", "_hidden", r"$\frac{$", "…ath/to/some/model/of/theirs"[-20:]):
            assert label in drawn
    assert "<b>" not in html
    assert "&lt;b&gt;bold&lt;/b&gt;" in html


def test_many_sources_are_all_in_the_tables(tmp_path):
    rows = [constant(-0.05, length=10 + k, source=f"source-{k}") for k in range(7)]
    _, html = written(rows, tmp_path)
    assert html.count("Drawn are the 5 largest sources; the tables have 2 more.") == 3
    assert html.count('<th scope="row">source-0</th>') == 3
    legends = re.findall(r"source-(\d)</text>", html)
    assert set(legends) == {"2", "3", "4", "5", "6"}


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        (PearWeights(level="block", block_size=8), "pear, block level, 8 tokens, gamma 0.999"),
        (PearWeights(level="sequence"), "pear, sequence level<"),
        (UniformWeights(), "pear, token level, gamma 0.999 (assumed)"),
        (PearWeights(rescale="batch_mean_one"), "before <code>sft.weights.rescale</code>"),
    ],
)
def test_the_settings_are_said(tmp_path, weights, told):
    _, html = written([worked()], tmp_path, weights=weights)
    assert told in html


def test_writing_leaves_two_files(tmp_path):
    written([worked()], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [HTML_FILE, JSON_FILE]
