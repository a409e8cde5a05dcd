"""`pear inspect` on artifacts as stages leave them, and on what is none."""

import json
import math
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_ray import cli
from pear_ray.artifacts import manifest
from pear_ray.artifacts.tables import SCORED
from pear_ray.config.run import dump_run, validate_run
from pear_ray.embedded.tokenizer import build_tokenizer

TREE = {
    "name": "run",
    "models": {"policy": "embedded:student", "behavior": "embedded:teacher"},
    "corpus": {"kind": "dataset", "path": "corpus.jsonl"},
    "sft": {"optimizer": {"learning_rate": 1e-3}},
    "rl": {
        "problems": {"games": [{"name": "chain_sum"}], "size": 4},
        "optimizer": {"learning_rate": 1e-4},
        "num_steps": 1,
    },
    "evaluate": {"problems": {"games": [{"name": "chain_sum"}], "size": 4, "seed": 1}},
}
TEXT = "<|user|>1 + 2 =<|assistant|>3\né<|end|>"
NUM_PROMPT = 6  # <|user|> 1 " + " 2 " =" <|assistant|>


def scored(example_id, logprobs, **changes):
    ids = build_tokenizer().encode(TEXT, add_special_tokens=False).ids
    return {
        "example_id": example_id,
        "source": "teacher",
        "is_negative": False,
        "token_ids": ids,
        "loss_mask": [False] * NUM_PROMPT + [True] * (len(ids) - NUM_PROMPT),
        "behavior_logprobs": [0.0] * NUM_PROMPT + logprobs,
    } | changes


# Loss tokens: 3, newline, two bytes of an é, the end token.
BEHAVIOR = [-1.0, -1.0, -1.0, -1.0, -1.0]
POLICY = [-3.0, -1.0, -0.5, -1.0, -1.25]


def write(path, rows, schema=SCORED):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def finish(stage_dir):
    manifest.begin(stage_dir, "0123456789abcdef")
    return lambda: manifest.complete(stage_dir, counts={"rows": 2}, details={"engine": "vllm"})


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run whose score stage is finished."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1" if name.startswith("HF") else "false")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text('{"name": "run"}')
    (folder / "config.yaml").write_text(dump_run(validate_run(TREE, origin="test")))
    complete = finish(folder / "score")
    write(folder / "score" / "scored" / "a.parquet", [scored("e1", BEHAVIOR)])
    write(
        folder / "score" / "scored" / "b.parquet",
        [scored("e2", BEHAVIOR, source="web"), scored("e3", BEHAVIOR, is_negative=True)],
    )
    complete()
    return folder


def diagnose(run_dir, *, policy=POLICY, **changes):
    complete = finish(run_dir / "diagnose")
    write(run_dir / "diagnose/policy/a.parquet", [scored("e1", policy, **changes)])
    write(
        run_dir / "diagnose/policy/b.parquet",
        [scored("e3", policy, is_negative=True), scored("e2", policy, source="web")],
    )
    return complete


def shown(capsys, *arguments):
    assert cli.main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    assert cli.main(["inspect", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def spans(html):
    """Text and style of each coloured stretch of the page."""
    body = html.partition("<code>")[2]
    return [
        (text.strip(), style) for style, text in re.findall(r'<span class="(r\d+)">([^<]*)<', body)
    ]


def test_facts_of_a_scored_corpus(run_dir, capsys):
    out = shown(capsys, run_dir / "score", "--rows", "0")
    for fact in (
        r"stage +score",
        r"fingerprint +0123456789abcdef",
        r"counts +rows 2",
        r"details +engine vllm",
        r"table +scored",
        r"rows +3 in 2 files",
        r"columns +example_id  string",
        r"behavior_logprobs  list<element: float>",
        r"by source +teacher  2",
        r"web  1",
        r"by is_negative +False  2",
    ):
        assert re.search(fact, out), fact
    assert "<|user|>" not in out


def test_rows_show_every_token_and_behavior_log_probs(run_dir, capsys):
    out = shown(capsys, run_dir / "score", "--rows", "2")
    assert "<|user|>1·+·2·=<|assistant|>3⏎\n◌é<|end|>" in out
    assert "e1 of teacher: 11 tokens, 5 train, mean log-prob -1.000" in out
    assert "e2 of web: 11 tokens" in out
    assert "e3" not in out
    assert "behavior log-prob:" in out
    assert "weight:" not in out


def test_both_scores_give_log_ratios_and_weights(run_dir, capsys):
    diagnose(run_dir)()
    out = shown(capsys, run_dir / "score", "--html", run_dir / "page.html")
    # Log-ratios -2 0 .5 0 -.25: mean -0.35. Clipped -.08 0 .3 0 -.08 and gamma 0.999 give weights
    # exp(.22 - .004), exp(.22 - .003), exp(-.08 - .002), exp(-.08 - .001), 1: mean 1.0661.
    expected = [math.exp(0.22 + 4 * math.log(0.999)), math.exp(0.22 + 3 * math.log(0.999))]
    expected += [math.exp(-0.08 + 2 * math.log(0.999)), math.exp(-0.08 + math.log(0.999)), 1.0]
    mean = sum(expected) / 5
    assert (
        f"e1 of teacher: 11 tokens, 5 train, mean log-ratio -0.350, mean weight {mean:.3f}" in out
    )
    assert f"e2 of web: 11 tokens, 5 train, mean log-ratio -0.350, mean weight {mean:.3f}" in out
    # A negative takes no token weights.
    assert re.search(
        r"e3 of teacher, negative: 11 tokens, 5 train, mean log-ratio -0.350\s*\n", out
    )
    assert "log-ratio, policy minus behavior:" in out
    html = (run_dir / "page.html").read_text()
    assert not re.findall(r"<(script|link|img|iframe|object)\b|http", html)
    assert html.count("&lt;|assistant|&gt;") == 3
    assert "background-color: #d6604d" in html
    coloured = dict(spans(html))
    assert coloured["3"] == coloured["below -1"]
    assert coloured["◌"] == coloured["0.3 to 1.2 (clipped high)"]
    assert coloured["&lt;|end|&gt;"] == coloured["-1 to -0.08 (clipped low)"]


def test_the_diagnose_folder_shows_the_same(run_dir, capsys):
    diagnose(run_dir)()
    out = shown(capsys, run_dir / "diagnose", "--rows", "1")
    assert "mean log-ratio -0.350, mean weight 1.0" in out
    inside = shown(capsys, run_dir / "score" / "scored" / "a.parquet")
    assert "mean log-ratio -0.350" in inside


def test_an_unfinished_diagnose_is_not_used(run_dir, capsys):
    diagnose(run_dir)
    assert "behavior log-prob:" in shown(capsys, run_dir / "score")


def test_scores_of_other_tokens_are_not_used(run_dir, capsys):
    diagnose(run_dir, token_ids=[1] * 11)()
    out = shown(capsys, run_dir / "score")
    assert "does not hold example 'e1' with the same tokens" in out.replace("\n", " ")
    assert "behavior log-prob:" in out


def test_a_log_prob_that_is_no_number_is_shown(run_dir, capsys):
    diagnose(run_dir, policy=[math.nan, *POLICY[1:]])()
    out = shown(capsys, run_dir / "score", "--rows", "1", "--html", run_dir / "page.html")
    assert "mean log-ratio nan" in out
    assert "mean weight" not in out
    assert "background-color: #b3261e" in (run_dir / "page.html").read_text()


def test_the_runs_own_clip_bounds_are_in_the_legend(run_dir, capsys):
    tree = json.loads(json.dumps(TREE))
    tree["sft"]["weights"] = {"kind": "pear", "log_ratio_clip_low": -0.5, "level": "sequence"}
    (run_dir / "config.yaml").write_text(dump_run(validate_run(tree, origin="test")))
    diagnose(run_dir)()
    out = shown(capsys, run_dir / "score", "--rows", "1")
    assert "-2 to -0.5 (clipped low)" in out
    # -.5 + .3 - .25 = -.45 for every token
    assert f"mean weight {math.exp(-0.45):.3f}" in out


def test_uniform_weights_are_shown_as_pears_defaults(run_dir, capsys):
    tree = json.loads(json.dumps(TREE))
    tree["sft"]["weights"] = {"kind": "uniform"}
    (run_dir / "config.yaml").write_text(dump_run(validate_run(tree, origin="test")))
    diagnose(run_dir)()
    assert "sft.weights is uniform" in shown(capsys, run_dir / "score")


def test_a_corpus_shows_log_probs_as_sampled(run_dir, capsys):
    complete = finish(run_dir / "collect")
    sampled = pa.field("given_logprobs", pa.list_(pa.float32()))
    schema = pa.schema([*list(SCORED)[:-2], sampled])  # in place of the behavior log-probs
    rows = [scored("e1", BEHAVIOR), scored("e2", BEHAVIOR)]
    rows[0]["given_logprobs"] = [0.0] * NUM_PROMPT + POLICY
    write(run_dir / "collect" / "corpus" / "part-000000.parquet", rows, schema)
    complete()
    out = shown(capsys, run_dir / "collect")
    assert "log-prob as sampled:" in out
    assert "e1 of teacher: 11 tokens, 5 train, mean log-prob -1.350" in out
    assert re.search(r"e2 of teacher: 11 tokens, 5 train\s*\n", out)


def test_a_table_without_tokens_is_shown_by_field(run_dir, capsys):
    schema = pa.schema([("task", pa.string()), ("completion", pa.string())])
    path = run_dir / "samples.parquet"
    write(path, [{"task": "[red]sum", "completion": "3\x1b[31m" + "x" * 700}], schema)
    out = shown(capsys, path)
    assert re.search(r"by task +\[red\]sum  1", out)
    assert r"3\x1b[31mxxx" in out
    assert "[... 106 more characters]" in out.replace("\n", " ")
    assert "\x1b[31m" not in out


def test_a_table_of_no_run_is_shown_as_ids(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "rows.parquet"
    row = scored("e1", [-1.0], token_ids=[5, 77], loss_mask=[False, True])
    write(path, [row | {"behavior_logprobs": [0.0, -1.0]}])
    out = shown(capsys, path)
    assert "in no run's folder, so no tokenizer is known: tokens are shown as ids" in out
    assert "5·77·" in out


def test_a_model_that_is_gone_leaves_ids(run_dir, capsys):
    tree = json.loads(json.dumps(TREE))
    tree["models"]["policy"] = "./gone"
    (run_dir / "config.yaml").write_text(dump_run(validate_run(tree, origin="test")))
    out = shown(capsys, run_dir / "score", "--rows", "1")
    assert "tokens are shown as ids: models.policy: ./gone: no such model folder" in out
    assert f"{scored('e', BEHAVIOR)['token_ids'][-1]}·" in out


def test_a_path_that_leads_nowhere(tmp_path, capsys):
    message = refused(capsys, tmp_path / "absent")
    assert message.startswith("InputError: ")
    assert "absent: no such file or folder; give a stage's folder" in message


def test_a_whole_run(run_dir, capsys):
    message = refused(capsys, run_dir)
    assert "a whole run, not an artifact; give one of its stages' folders: score" in message


def test_an_unfinished_artifact(run_dir, capsys):
    diagnose(run_dir)
    message = refused(capsys, run_dir / "diagnose")
    assert message.startswith("ArtifactError: ")
    assert "unfinished, so what it holds may be half written; run `pear diagnose" in message


def test_a_folder_or_file_that_is_no_table(run_dir, capsys):
    (run_dir / "report").mkdir()
    assert "holds no Parquet table" in refused(capsys, run_dir / "report")
    assert "config.yaml: not a Parquet file" in refused(capsys, run_dir / "config.yaml")


def test_lists_of_unequal_length_are_refused(run_dir, capsys):
    write(run_dir / "rows.parquet", [scored("e1", BEHAVIOR[1:])])
    message = refused(capsys, run_dir / "rows.parquet")
    assert "example 'e1' has 10 behavior_logprobs for 11 tokens" in message


@pytest.mark.parametrize("number", ["-1", "two", "1.5"])
def test_a_number_of_rows_that_is_none(capsys, number):
    with pytest.raises(SystemExit) as caught:
        cli.main(["inspect", "x", f"--rows={number}"])
    assert caught.value.code == 2
    assert f"'{number}' is not a number of rows; use 0 or more" in capsys.readouterr().err
