"""The shipped student and data: as quality.json says, and one token per symbol and log-prob."""

import hashlib
import json

import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from pear_ray.embedded.automaton.tokenizer import SYMBOLS
from pear_ray.embedded.paths import embedded_path
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.model_files import resolve_model

MAX_TOTAL_BYTES = 1_000_000
LOCATION = "embedded:automaton/student"
STUDENT = embedded_path(LOCATION)
PACKAGE = STUDENT.parent
QUALITY = json.loads((PACKAGE / "quality.json").read_text())


@pytest.fixture(scope="module")
def chat() -> ChatTokenizer:
    return ChatTokenizer(STUDENT)


def test_all_of_it_is_small() -> None:
    sizes = [file.stat().st_size for file in PACKAGE.rglob("*") if "__pycache__" not in str(file)]
    assert sum(sizes) < MAX_TOTAL_BYTES


def test_quality_is_of_these_weights_and_this_corpus() -> None:
    assert set(QUALITY["sha256"]) == {"student/model.safetensors", "corpus.parquet"}
    for name, wanted in QUALITY["sha256"].items():
        assert hashlib.sha256((PACKAGE / name).read_bytes()).hexdigest() == wanted


def test_a_run_finds_the_model() -> None:
    assert resolve_model(LOCATION) == STUDENT
    assert AutoConfig.from_pretrained(STUDENT).model_type == "qwen3"
    with safe_open(STUDENT / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - safe_open has no `in`
    model = AutoModelForCausalLM.from_pretrained(STUDENT, use_safetensors=True)
    assert {str(p.dtype) for p in model.parameters()} == {"torch.float32"}
    count = sum(p.numel() for p in model.parameters())
    assert count == QUALITY["num_parameters"] < 120_000


@pytest.mark.parametrize("name", ["heldout_a", "heldout_b"])
def test_rl_has_something_to_do(name: str) -> None:
    """Neither on the floor, which is one state in 16, nor able."""
    found = QUALITY["problems"][name]
    assert 0.07 < found["pass_at_1"] < 0.2
    assert found["pass_at_1"] < found["pass_at_8"] < 0.8


def test_every_row_is_as_many_tokens_as_it_has_logprobs(chat: ChatTokenizer) -> None:
    rows = pq.read_table(PACKAGE / "corpus.parquet").to_pylist()
    assert len(rows) == 512
    unknown = chat.tokenizer.unk_token_id
    for row in rows:
        turns = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        ids, mask = chat.example(turns)
        assert sum(mask) == len(row["behavior_logprobs"]) == 67
        assert unknown not in ids
        trained = [token_id for token_id, trains in zip(ids, mask, strict=True) if trains]
        assert chat.tokenizer.decode(trained) == row["completion"] + "<|end|>"
        assert ids[: len(ids) - 67] == chat.prompt_ids(row["prompt"])


def test_the_share_of_f_is_near_what_was_asked() -> None:
    sources = pq.read_table(PACKAGE / "corpus.parquet")["source"].to_pylist()
    assert set(sources) == {"F", "N"}
    assert abs(sources.count("F") / 512 - 0.15) < 0.05  # three standard errors


def test_every_symbol_is_one_token(chat: ChatTokenizer) -> None:
    ids = [chat.tokenizer.encode(symbol, add_special_tokens=False) for symbol in SYMBOLS]
    assert {len(each) for each in ids} == {1}
    assert len({each[0] for each in ids}) == len(SYMBOLS) == 2 + 16 + 10 + 7 + 24 + 16


def test_a_numbered_operation_is_one_token(chat: ChatTokenizer) -> None:
    assert chat.tokenizer.tokenize("AGcq1z7") == ["A", "G", "c", "q1", "z7"]
    assert chat.tokenizer.tokenize("1qcg") == ["1", "q", "c", "g"]


def test_other_text_is_unknown_and_not_refused(chat: ChatTokenizer) -> None:
    ids = chat.tokenizer.encode("a?\n", add_special_tokens=False)
    assert ids[1:] == [chat.tokenizer.unk_token_id] * 2
