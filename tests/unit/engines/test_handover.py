"""The hand-over gate: every kind of broken checkpoint, planted, is stopped by its name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pear_ray.config.sections import OptimizerConfig
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.handover.files import check_files
from pear_ray.engines.handover.live import check_engine, check_reload
from pear_ray.engines.handover.record import (
    RECORD_FILE,
    read_record,
    trainers_logprobs,
    write_record,
)
from pear_ray.engines.hf_scorer import reference_logprobs
from pear_ray.engines.native_trainer import NativeTrainer
from pear_ray.engines.policy import load_policy, shard
from pear_ray.errors import HandoverError

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"


@pytest.fixture
def exported(student: Path, process_group: None, tmp_path: Path) -> Path:
    """What SFT leaves of a student that it has moved a little."""
    policy = shard(load_policy(student), device="cpu", dtype="float32")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.01)
    trainer = NativeTrainer(policy, OptimizerConfig(learning_rate=1e-3), num_steps=1)
    chat, folder = ChatTokenizer(student), tmp_path / "sft" / "model"
    logprobs = trainers_logprobs(trainer)
    gathered = trainer.export(folder, save_tokenizer=chat.tokenizer.save_pretrained)
    write_record(folder, trainer.module, chat, gathered, logprobs=logprobs)
    return folder


def edit(file: Path, **changes: Any) -> None:
    tree = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(tree), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def untie(folder: Path) -> None:
    edit(folder / "config.json", tie_word_embeddings=False)


def untie_with_head(folder: Path) -> None:
    untie(folder)
    edit_weights(folder, lambda held: held.update({"lm_head.weight": held[EMBEDDING].clone()}))


def stray_head(folder: Path) -> None:
    edit_weights(folder, lambda held: held.update({"lm_head.weight": held[EMBEDDING] * 2}))


def swap_layers(folder: Path) -> None:
    def swap(held: dict[str, torch.Tensor]) -> None:
        first, second = (f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1))
        held[first], held[second] = held[second], held[first]

    edit_weights(folder, swap)


def one_bit(folder: Path) -> None:
    def change(held: dict[str, torch.Tensor]) -> None:
        held[NORM][3] = torch.nextafter(held[NORM][3], torch.tensor(9.0))

    edit_weights(folder, change)


def truncate_vocabulary(folder: Path) -> None:
    edit_weights(folder, lambda held: held.update({EMBEDDING: held[EMBEDDING][:200].clone()}))
    edit(folder / "config.json", vocab_size=200)


def half(folder: Path) -> None:
    edit_weights(folder, lambda held: held.update({n: t.bfloat16() for n, t in held.items()}))


def drop_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def edit_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text(encoding="utf-8").replace("<|end|>", "\n"), encoding="utf-8")


def add_token(folder: Path) -> None:
    chat = ChatTokenizer(folder)
    chat.tokenizer.add_tokens(["<think>"])
    chat.tokenizer.save_pretrained(folder)


PLANTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "untied in the config": (untie, r"tied_weights: config.json has tie_word_embeddings=False, "),
    "untied with a head": (untie_with_head, r"tied_weights: lm_head.weight is in the files"),
    "a stray head": (stray_head, r"tied_weights: lm_head.weight is in the files, and .* was tied"),
    "two layers swapped": (
        swap_layers,
        r"weights: model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight are not",
    ),
    "one bit": (one_bit, r"weights: model.norm.weight is not of the trainer's values"),
    "a weight missing": (
        lambda folder: edit_weights(folder, lambda held: held.pop(NORM)),
        r"weights: model.norm.weight is missing",
    ),
    "a shorter vocabulary": (truncate_vocabulary, r"vocabulary: .* has shape \[200, 96\]"),
    "a shorter vocabulary in the config": (
        lambda folder: edit(folder / "config.json", vocab_size=200),
        r"vocabulary: config.json has vocab_size=200, the trainer 272",
    ),
    "another token": (add_token, r"vocabulary: the tokenizer has 27\d tokens, that of the trainer"),
    "bfloat16 files": (half, r"dtype: .* and 32 more are in bfloat16, the trainer's in float32"),
    "bfloat16 in the config": (
        lambda folder: edit(folder / "config.json", dtype="bfloat16"),
        r"dtype: config.json has dtype='bfloat16', the trainer 'float32'",
    ),
    "another rope": (
        lambda folder: edit(
            folder / "config.json", rope_parameters={"rope_theta": 1e4, "rope_type": "default"}
        ),
        r"config: config.json has rope_parameters=",
    ),
    "another end in the config": (
        lambda folder: edit(folder / "config.json", eos_token_id=256),
        r"end_tokens: config.json has eos_token_id=256, the trainer 257",
    ),
    "another stop token": (
        lambda folder: edit(folder / "generation_config.json", eos_token_id=[256, 257]),
        r"end_tokens: generation_config.json has eos_token_id=\[256, 257\], the trainer \[257\]",
    ),
    "another end token": (
        lambda folder: edit(folder / "tokenizer_config.json", eos_token="<|pad|>"),
        r"end_tokens: the tokenizer's end token is '<\|pad\|>' \(id 256\), that of the trainer",
    ),
    "no template": (drop_template, r"chat_template: there is no chat template"),
    "another template": (edit_template, r"chat_template: the chat template is not that of the tra"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        r"files: no \*.safetensors weights",
    ),
    "no tokenizer": (
        lambda folder: [each.unlink() for each in folder.glob("tokenizer*")],
        r"files: no tokenizer.json",
    ),
    "half a file": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x08" + b"\0" * 40),
        r"weights: .*model.safetensors: not a safetensors file that can be read",
    ),
    "a record of another version": (
        lambda folder: edit(folder / RECORD_FILE, version=99),
        r"files: .*handover.json: not a record of this version",
    ),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_broken_hand_over_is_stopped_by_its_name(
    exported: Path, student: Path, kind: str
) -> None:
    plant, named = PLANTED[kind]
    plant(exported)
    with pytest.raises(HandoverError, match=named) as error:
        check_files(exported, student)
    assert "hand-over: " in str(error.value)


def test_what_was_exported_passes(exported: Path, student: Path) -> None:
    source, note = check_files(exported, student)
    assert note == ""
    assert source.record is not None
    assert len(source.record.tensors) == 35
    assert source.record.vocabulary_tensors == [EMBEDDING]
    assert source.record.facts.end_tokens == ["<|end|>"]
    gap = check_reload(load_policy(exported), exported, dtype="float32")
    assert gap is not None
    assert gap < 1e-5


def test_all_that_differs_is_told_at_once(exported: Path, student: Path) -> None:
    untie(exported)
    half(exported)
    drop_template(exported)
    with pytest.raises(HandoverError) as error:
        check_files(exported, student)
    named = [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:-1]]
    assert named == ["tied_weights", "chat_template", "dtype"]


def test_an_exporter_that_writes_something_else_is_found(
    exported: Path, student: Path, tmp_path: Path
) -> None:
    """The record has the trainer's tensors, not the file's."""
    policy = load_policy(exported)
    held = {n.removeprefix("causal_lm."): p for n, p in policy.named_parameters()}
    held[NORM] = held[NORM].detach() + 0.5
    logprobs = np.zeros(47, dtype=np.float32)
    write_record(exported, policy, ChatTokenizer(exported), held, logprobs=logprobs)
    with pytest.raises(HandoverError, match=r"weights: model.norm.weight is not of the trainer's"):
        check_files(exported, student)


def test_a_checkpoint_put_there_by_hand_is_compared_with_the_base(
    exported: Path, student: Path
) -> None:
    (exported / RECORD_FILE).unlink()
    edit_weights(exported, lambda held: held.update({NORM: held[NORM] * 1.1}))  # nobody knows
    source, _ = check_files(exported, student)
    assert source.record is None
    assert check_reload(load_policy(exported), exported, dtype="float32") is None
    drop_template(exported)
    edit(exported / "generation_config.json", eos_token_id=256)
    with pytest.raises(HandoverError, match=r"(?s)chat_template: .*end_tokens: .*models.policy \("):
        check_files(exported, student)


def test_a_base_that_teaches_no_end_is_warned_of(
    exported: Path, student: Path, tmp_path: Path
) -> None:
    """Trainer, exporter and engine agree; whether completions end is for the samples to say."""
    base = tmp_path / "base"
    shutil.copytree(student, base)
    edit_template(exported)
    edit_template(base)
    (exported / RECORD_FILE).unlink()
    _, note = check_files(exported, base)
    assert note.startswith("an engine ends completions at <|end|>, and the chat template writes ")


def test_a_model_that_loads_as_another_is_stopped(exported: Path, student: Path) -> None:
    """The student that it began as: as if the optimizer's work had been lost on the way."""
    with pytest.raises(HandoverError, match=r"reload: loaded again, log-probs differ .* by 0\.\d"):
        check_reload(load_policy(student), exported, dtype="float32")


class Loaded:
    """transformers in the engine's place, ending at `ends`."""

    def __init__(self, folder: Path, ends: list[str]) -> None:
        self.folder, self.ends = folder, ends

    def score(self, sequences: list[list[int]]) -> list[np.ndarray]:
        return [np.asarray(each) for each in reference_logprobs(self.folder, sequences)]

    def end_tokens(self) -> list[str]:
        return self.ends


def test_an_engine_with_another_model_or_other_ends_is_stopped(
    exported: Path, student: Path
) -> None:
    gap = check_engine(Loaded(exported, ["<|end|>"]), exported, dtype="float32")
    assert gap is not None
    assert gap < 1e-5
    with pytest.raises(HandoverError, match=r"(?s)engine: .* by 0\.\d.*end_tokens: .*<\|pad\|>, "):
        check_engine(Loaded(student, ["<|pad|>", "<|end|>"]), exported, dtype="float32")


def test_the_record_survives_the_file(exported: Path) -> None:
    record = read_record(exported)
    assert record is not None
    own = reference_logprobs(exported, [record.canary])[0][1:]
    assert np.abs(np.asarray(own) - record.logprobs).mean() < 1e-5
