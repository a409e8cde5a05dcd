"""A behavior model with another tokenizer, from chats to spans, with a real engine."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from other_tokenizers import byte_pair_chat
from transformers import Qwen3Config, Qwen3ForCausalLM

from pear_ray.artifacts.scores import join_scores
from pear_ray.artifacts.tables import SCORED, read_table
from pear_ray.config.corpus import DatasetCorpus
from pear_ray.config.run import RunConfig, validate_run
from pear_ray.corpus.finish import finish
from pear_ray.corpus.parts import find_parts
from pear_ray.corpus.prepare import prepare_job, prepare_part
from pear_ray.distributed.scoring import behavior_job, score_corpus
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.hf_scorer import reference_logprobs
from pear_ray.engines.model_files import resolve_behavior, resolve_model

CHATS = [
    [("user", "what is it"), ("assistant", "the answer is twelve")],
    [("user", "and now"), ("assistant", "hello world\n\n3 + 4 = 7 🙂 日本")],
    [
        ("user", "1 + 2 ="),
        ("assistant", "the other answer is 3"),
        ("user", "sure?"),
        ("assistant", "twenty one, so the world is round"),
    ],
]


def behavior_model(folder: Path) -> Path:
    """A random model of its own vocabulary."""
    chat = byte_pair_chat(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(chat.tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.3,  # far from uniform, so that a token out of place would show
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def run_config(folder: Path) -> RunConfig:
    rows = [
        json.dumps({"messages": [{"role": role, "content": text} for role, text in chat]})
        for chat in CHATS
    ]
    (folder / "chats.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    game = {"games": [{"name": "chain_sum"}], "size": 8}
    return validate_run(
        {
            "name": "aligned",
            "models": {
                "policy": "embedded:student",
                "behavior": str(behavior_model(folder / "behavior")),
                "align": "bytes",
                "dtype": "float32",
                "max_model_len": 200,
            },
            "corpus": {"kind": "dataset", "path": str(folder / "chats.jsonl")},
            "sft": {
                "optimizer": {"learning_rate": 1e-3},
                "weights": {"kind": "pear", "level": "span"},
            },
            "rl": {"problems": game, "optimizer": {"learning_rate": 1e-3}, "num_steps": 1},
            "evaluate": {"problems": game},
            "cluster": {"num_samplers": 1},
        },
        origin="test",
    )


def scored_rows(config: RunConfig, folder: Path) -> list[dict[str, Any]]:
    """The run's corpus, prepared and scored as the stages do it."""
    assert isinstance(config.corpus, DatasetCorpus)
    job = prepare_job(
        config,
        config.corpus,
        resolve_model(config.models.policy),
        resolve_behavior(config.models.behavior),
        folder=folder / "collect",
    )
    parts = find_parts(config.corpus)
    for part in parts:
        prepare_part(part, job)
    finish(parts, job)
    (folder / "score").mkdir()
    score_corpus(behavior_job(config, folder), progress=lambda rows: None)
    join_scores(folder / "collect" / "corpus", folder / "score", "scored", keep_given=False)
    return read_table(folder / "score" / "scored", SCORED).to_pylist()


def test_every_answer_and_span_keeps_its_total(local_ray: None, tmp_path: Path) -> None:
    config = run_config(tmp_path)
    rows = scored_rows(config, tmp_path)
    target = ChatTokenizer(resolve_model(config.models.policy))
    behavior = ChatTokenizer(tmp_path / "behavior")
    assert len(rows) == len(CHATS)
    for row, chat in zip(rows, CHATS, strict=True):
        messages = [{"role": role, "content": text} for role, text in chat]
        encoded = behavior.encode(messages)
        (logprobs,) = reference_logprobs(tmp_path / "behavior", [encoded.token_ids])
        inside = [
            any(answer.begin <= begin and end <= answer.end for answer in encoded.answers)
            for begin, end in encoded.offsets
        ]
        total = np.asarray(logprobs)[inside].sum()
        np.testing.assert_allclose(sum(row["behavior_logprobs"]), total, rtol=1e-5)
        spans = np.asarray(row["span_ids"])
        trained = np.asarray(row["loss_mask"])
        assert ((spans >= 0) == trained).all()
        assert 3 < len(set(spans[trained])) < trained.sum()  # longer than tokens, shorter than rows
        # The first span of the first answer, by hand: the behavior tokens that say its text.
        first = target.tokenizer.decode(np.asarray(row["token_ids"])[spans == 0])
        begin = encoded.answers[0].begin
        said = [begin <= b and e <= begin + len(first) for b, e in encoded.offsets]
        np.testing.assert_allclose(
            np.asarray(row["behavior_logprobs"])[spans == 0].sum(),
            np.asarray(logprobs)[said].sum(),
            rtol=1e-5,
        )
