"""Bad input is one clear error before anything starts: exit code 2, and nothing left behind."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pear_ray import cli
from pear_ray.embedded.paths import embedded_path

GOOD_ROW = json.dumps({"prompt": "1 + 2 =", "completion": "3"})
RUN = """\
name: bad
models: {policy: embedded:student, behavior: embedded:teacher, dtype: float32, max_model_len: 96}
corpus: {kind: dataset, path: corpus.jsonl}
sft: {optimizer: {learning_rate: 1e-3}}
rl:
  problems: {games: [{name: chain_sum}], size: 4}
  optimizer: {learning_rate: 1e-4}
  num_steps: 1
  max_tokens: 16
evaluate: {problems: {games: [{name: chain_sum}], size: 4, seed: 1}, max_tokens: 16}
cluster: {num_trainers: 1, num_samplers: 1}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own with a run that could start, as the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "TRANSFORMERS_VERBOSITY",
        "HF_HUB_DISABLE_PROGRESS_BARS",
        "TOKENIZERS_PARALLELISM",
    ):
        monkeypatch.setenv(name, "false" if name.startswith("TOK") else "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    (tmp_path / "run.yaml").write_text(RUN, encoding="utf-8")
    (tmp_path / "corpus.jsonl").write_text(GOOD_ROW + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command line; the one error it must end with."""

    def run(*overrides: str, command: str = "run", run_file: str = "run.yaml") -> str:
        assert cli.main([command, run_file, *overrides]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
        assert not Path("outputs/bad").exists()
        return captured.err

    return run


def model(name: str) -> Path:
    return Path(shutil.copytree(embedded_path(name), name))


def test_the_run_itself_could_start(capsys: pytest.CaptureFixture[str]) -> None:
    """So that every refusal below is of what its test spoils."""
    assert cli.main(["run", "run.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count("  make\n") == 6
    memory = out.split("\nmemory\n")[1].splitlines()
    assert [line.split()[0] for line in memory] == ["score", "sft", "rl", "evaluate"]
    assert not Path("outputs").exists()


def test_unknown_key(refused: Callable[..., str]) -> None:
    message = refused("sft.num_epoch=2")
    assert message.startswith("ConfigError: run.yaml: 1 problem")
    assert "sft.num_epoch: unknown key; did you mean 'num_epochs'? (got 2)" in message


def test_wrong_type(refused: Callable[..., str]) -> None:
    message = refused("sft.num_epochs=two")
    assert "sft.num_epochs: Input should be a valid integer (got 'two')" in message


def test_missing_run_file(refused: Callable[..., str]) -> None:
    message = refused(run_file="absent.yaml")
    assert "absent.yaml: cannot read the run file (No such file or directory)" in message
    assert "jobs/runs/" in message


def test_weights_of_sources_that_the_corpus_will_not_have(refused: Callable[..., str]) -> None:
    """Known before the first engine samples: rows of a sampled corpus are of its models."""
    message = refused(
        "corpus={kind: sampled, problems: {games: [{name: chain_sum}], size: 4}, max_tokens: 16}",
        "sft.weights={kind: by_source, weights: {F: 1, N: 0}}",
    )
    assert message == (
        "ConfigError: sft.weights.weights names F, N, and the sources of models.behavior are "
        "teacher: no weight for teacher; no row of F, N; give each source of the corpus a weight, "
        "and no other\n"
    )


def test_missing_corpus_file(refused: Callable[..., str]) -> None:
    message = refused("corpus.path=absent.jsonl")
    assert message.startswith("InputError: corpus.path=absent.jsonl: no such file or folder; give")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_corpus_file(here: Path, refused: Callable[..., str], text: str) -> None:
    (here / "corpus.jsonl").write_text(text, encoding="utf-8")
    message = refused()
    assert "corpus.jsonl" in message
    assert "empty; it needs at least one row" in message


@pytest.mark.parametrize("command", ["run", "collect"])
def test_a_row_with_no_trainable_token(
    here: Path, refused: Callable[..., str], command: str
) -> None:
    bad = json.dumps({"messages": [{"role": "user", "content": "hello?"}]})
    (here / "corpus.jsonl").write_text(f"{GOOD_ROW}\n{bad}\n", encoding="utf-8")
    message = refused(command=command)
    assert "corpus.jsonl: 1 of 2 rows cannot be used, more than corpus.max_bad_fraction" in message
    assert "/corpus.jsonl row 2: messages: no assistant turn" in message


def test_a_row_longer_than_the_model(here: Path, refused: Callable[..., str]) -> None:
    long = json.dumps({"prompt": "a" * 100, "completion": "b"})
    (here / "corpus.jsonl").write_text(f"{GOOD_ROW}\n{long}\n", encoding="utf-8")
    message = refused()
    assert "/corpus.jsonl row 2: 105 tokens, more than models.max_model_len=96" in message


def test_a_prompt_longer_than_the_model(refused: Callable[..., str]) -> None:
    message = refused(
        "rl.problems.games=[{name: chain_sum, params: {min_terms: 40, max_terms: 40}}]"
    )
    assert "rl.problems: problem chain_sum/" in message
    assert "with rl.max_tokens=16 that is more than models.max_model_len=96" in message


def test_sequences_longer_than_the_model_was_made_for(refused: Callable[..., str]) -> None:
    message = refused("models.max_model_len=512")
    assert "models.max_model_len=512 is more than the 256 positions" in message


def test_a_model_folder_without_tokenizer(refused: Callable[..., str]) -> None:
    (model("student") / "tokenizer.json").unlink()
    message = refused("models.policy=./student")
    assert message.startswith("InputError: models.policy: ")
    assert "no tokenizer" in message
    assert "save the model's tokenizer into the same folder" in message


def test_a_model_folder_with_pickled_weights_only(refused: Callable[..., str]) -> None:
    weights = model("teacher") / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    message = refused("models.behavior=./teacher")
    assert message.startswith("InputError: models.behavior: ")
    assert "only pickled weights (pytorch_model.bin)" in message
    assert "safe_serialization=True" in message


def test_a_model_folder_with_a_broken_config(refused: Callable[..., str]) -> None:
    (model("student") / "config.json").write_text("{", encoding="utf-8")
    assert "config.json: not valid JSON" in refused("models.policy=./student")


def change_json(file: Path, **changes: object) -> None:
    tree = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(tree | changes), encoding="utf-8")


def test_a_tokenizer_with_more_ids_than_the_model(refused: Callable[..., str]) -> None:
    change_json(model("student") / "config.json", vocab_size=200, eos_token_id=0, pad_token_id=1)
    message = refused("models.policy=./student")
    assert message.startswith("InputError: models.policy: ")
    assert "the tokenizer has ids up to 255, the model embeddings for 200 (config.json" in message
    assert "save the model's own tokenizer beside it" in message


@pytest.mark.parametrize(("name", "found"), [("eos_token_id", [1, 272]), ("pad_token_id", 300)])
def test_a_special_id_that_the_model_has_not(
    refused: Callable[..., str], name: str, found: object
) -> None:
    change_json(model("student") / "config.json", **{name: found})
    largest = found if isinstance(found, int) else 272
    assert f"config.json: {name}={largest} is outside of vocab_size=272" in refused(
        "models.policy=./student"
    )


def test_an_end_token_that_was_added_without_an_embedding(
    here: Path, refused: Callable[..., str]
) -> None:
    for name in ("student", "teacher"):
        folder = model(name)
        tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        added = tree["added_tokens"]
        names = {270: "<|a|>", 271: "<|b|>", 272: "<|stop|>"}  # the last one is one too many
        added += [added[0] | {"id": token_id, "content": names[token_id]} for token_id in names]
        change_json(folder / "tokenizer.json", added_tokens=added)
        change_json(folder / "tokenizer_config.json", eos_token="<|stop|>")
    message = refused("models.policy=./student", "models.behavior=./teacher")
    assert "eos_token is 272, and the model has embeddings for 272 ids" in message
    assert "resize its embeddings to its tokenizer's length" in message


def test_a_model_folder_without_a_chat_template(refused: Callable[..., str]) -> None:
    (model("student") / "chat_template.jinja").unlink()
    message = refused("models.policy=./student")
    assert message.startswith("InputError: models.policy: ")
    assert "the tokenizer has no chat template, so prompts cannot be written; add chat_" in message


def test_an_unknown_embedded_model_names_its_key(refused: Callable[..., str]) -> None:
    message = refused("models.behavior=embedded:techer")
    assert message.startswith("ConfigError: models.behavior: no embedded model is called `techer`")


def test_models_with_different_vocabularies(refused: Callable[..., str]) -> None:
    file = model("teacher") / "tokenizer.json"
    tree = json.loads(file.read_text(encoding="utf-8"))
    vocab = tree["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(tree), encoding="utf-8")
    assert "have different vocabularies" in refused("models.behavior=./teacher")


def test_more_devices_than_there_are(refused: Callable[..., str]) -> None:
    message = refused("cluster.num_samplers=100000")
    assert message.startswith("CapacityError: asked for 100000 CPU, the cluster has ")
    assert "lower cluster.num_trainers=1, cluster.num_samplers=100000" in message
    message = refused(
        "cluster.num_trainers=64", "rl.prompts_per_step=64", "cluster.cpus_per_worker=99"
    )
    assert message.startswith("CapacityError: asked for 6336 CPU, the cluster has ")


def test_unknown_game(refused: Callable[..., str]) -> None:
    assert "chain_some" in refused("evaluate.problems.games=[{name: chain_some}]")


def test_problems_of_a_file_without_a_verifier(refused: Callable[..., str]) -> None:
    message = refused("rl.problems={kind: file, path: own.jsonl}")
    assert "rl.problems are of a file, and rl.rewards.components has kind game" in message
    assert "name another, e.g. rl.rewards.components=[{kind: exact}]" in message


def test_a_band_without_rates(refused: Callable[..., str]) -> None:
    message = refused("rl.difficulty={rates: {kind: table, path: none.parquet}}")
    assert message.startswith("InputError: rl.difficulty.rates.path=none.parquet: no Parquet file")
    message = refused("rl.difficulty={low: 0.2}")
    assert "rl: difficulty.rates.kind=column reads the problem file, and problems are ga" in message


def test_a_problem_set_of_an_unknown_kind(refused: Callable[..., str]) -> None:
    message = refused("rl.problems={kind: files, path: own.jsonl}")
    assert "rl.problems: kind of a problem set is `games`, `file` or `hub`" in message


@pytest.mark.parametrize(
    ("row", "component", "said"),
    [
        ({"question": "?"}, "kind: exact", "row 2: prompt: missing; the row has question; set "),
        ({"prompt": "?"}, "kind: exact", "row 2: answer: missing, and the component `exact` "),
        ({"prompt": "?"}, "kind: unit_tests", "row 1: tests: expected Python text or a list of "),
    ],
)
def test_a_problem_that_cannot_be_used(
    here: Path, refused: Callable[..., str], row: dict[str, str], component: str, said: str
) -> None:
    rows = [{"prompt": "1 + 1?", "answer": 2}, row]
    (here / "own.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    message = refused(
        "rl.problems={kind: file, path: own.jsonl}", f"rl.rewards.components=[{{{component}}}]"
    )
    assert f"rl.problems: own.jsonl {said}" in message


def test_a_missing_problem_file(refused: Callable[..., str]) -> None:
    message = refused(
        "rl.problems={kind: file, path: absent.jsonl}", "rl.rewards.components=[{kind: exact}]"
    )
    assert "absent.jsonl: cannot be read (No such file or directory); give a JSONL or" in message


def test_a_verifier_that_cannot_be_imported(refused: Callable[..., str]) -> None:
    message = refused("rl.rewards.components=[{kind: function, function: 'absent:verify'}]")
    assert message.startswith("ConfigError: rl.rewards: verifier `absent:verify` cannot be loaded")


def test_a_verifier_of_the_folder_and_what_it_is_in_words(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "mine.py").write_text("def verify(problem, text): return 1.0\n", encoding="utf-8")
    component = "{kind: function, function: 'mine:verify', weight: 0.5}"
    command = ["run", "run.yaml", f"rl.rewards.components=[{{kind: game}}, {component}]"]
    assert cli.main([*command, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "  rl        4 problems of chain_sum: game x 1, outcome + function x 0.5\n" in out
    assert "  evaluate  4 problems of chain_sum: game x 1, outcome\n" in out
    assert "mine" not in sys.modules


def test_a_stage_whose_inputs_are_missing(refused: Callable[..., str]) -> None:
    message = refused(command="score")
    assert "stage 'collect', which 'score' builds on, is missing" in message
    assert "run `pear collect RUN.yaml` first" in message


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_an_output_folder_of_another_run(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    folder = Path("outputs/bad")
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"name": "good"}', encoding="utf-8")
    assert cli.main(["run", "run.yaml", *flags]) == 2
    message = capsys.readouterr().err
    assert "belongs to run 'good', not 'bad'; choose another name or output_dir" in message
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_an_output_folder_that_is_not_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("outputs/bad")
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("mine", encoding="utf-8")
    assert cli.main(["run", "run.yaml"]) == 2
    assert "holds files but no run.json" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_an_object_store_where_nobody_answers(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of-a-test")
    message = refused("output_dir=s3://runs/x?endpoint_override=http://127.0.0.1:1&region=y")
    assert "output_dir=s3://runs/x/bad?" in message
    assert "the store cannot be used" in message
    assert "AWS_ACCESS_KEY_ID" in message


def test_credentials_in_the_corpus_path_are_neither_kept_nor_shown(
    refused: Callable[..., str],
) -> None:
    for path in ("s3://AKIA:hid/den@rows/a.jsonl", "s3://rows/*?secret_key=hid/den&region=x"):
        message = refused(f"corpus.path={path}")
        assert message.startswith("InputError: corpus.path=s3://...: carries credentials (")
        assert "hid" not in message


def test_weights_that_need_what_an_alignment_has_not(refused: Callable[..., str]) -> None:
    assert "models.align=bytes has one per span only" in refused("models.align=bytes")
    message = refused("sft.weights={kind: pear, level: span}")
    assert "sft.weights.level=span is for models.align=bytes" in message


def test_a_source_whose_model_is_missing_names_it(refused: Callable[..., str]) -> None:
    message = refused("models.behavior={a: embedded:teacher, b: ./absent}")
    assert message.startswith("InputError: models.behavior: source 'b': ./absent: no such model")


def test_candidates_that_a_vocabulary_has_not(refused: Callable[..., str]) -> None:
    message = refused("score.top_k=273")
    assert message.startswith("ConfigError: score.top_k=273 is more than the 272 ids of models.beh")
    assert "(source '*'); lower it" in message


def test_heads_that_do_not_split(refused: Callable[..., str]) -> None:
    message = refused("score.tensor_parallel_size=2")
    assert message.startswith("ConfigError: score.tensor_parallel_size=2 does not divide the 3 att")
    assert "heads of models.policy" in message
    assert "use a divisor of 3" in message


@pytest.mark.parametrize("section", ["score", "evaluate"])
def test_a_vocabulary_that_does_not_split(refused: Callable[..., str], section: str) -> None:
    message = refused(f"{section}.tensor_parallel_size=3")
    assert message.startswith(f"ConfigError: {section}.tensor_parallel_size=3 does not divide the ")
    assert "320 rows that vLLM makes of the vocabulary" in message


def test_candidates_of_another_tokenizer(refused: Callable[..., str]) -> None:
    message = refused("score.top_k=5", "models.align=bytes")
    assert message.startswith("ConfigError: ")
    assert "score.top_k=5 wants candidates that are ids of the policy" in message


@pytest.mark.parametrize("top_k", ["-1", "1001", "2.5"])
def test_numbers_of_candidates_out_of_bounds(refused: Callable[..., str], top_k: str) -> None:
    assert "score.top_k: " in refused(f"score.top_k={top_k}")


def test_reusing_what_is_no_run(refused: Callable[..., str]) -> None:
    Path("other").mkdir()
    message = refused("--reuse", "other")
    assert message.startswith("InputError: --reuse other: no run's folder (it has no run.json)")


def test_reusing_a_run_that_shares_nothing(refused: Callable[..., str]) -> None:
    Path("other").mkdir()
    Path("other/run.json").write_text('{"name": "other"}', encoding="utf-8")
    message = refused("--reuse", "other")
    assert message.startswith("ArtifactError: --reuse other: none of its complete stages")


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_layers_that_the_policy_has_not(refused: Callable[..., str], stage: str) -> None:
    message = refused(f"{stage}.lora={{target_modules: [v_proj, q_porj, lm_head]}}")
    assert message.startswith(
        f"ConfigError: {stage}.lora.target_modules: no linear layer of the policy's decoder is "
        "called 'q_porj', 'lm_head'; did you mean 'q_proj'?; there are down_proj, gate_proj, "
        "k_proj, o_proj, q_proj, up_proj, v_proj ("
    )


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_adapters_without_their_library(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # as Python has it where there is none
    message = refused(f"{stage}.lora={{}}")
    assert message.startswith(f"ConfigError: {stage}.lora wants peft, which is not installed; pip")
