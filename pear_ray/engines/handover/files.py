"""The hand-over gate's look at files: what a checkpoint's folder says against what it should."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pear_ray.engines.handover.facts import ModelFacts, facts_of_folder
from pear_ray.engines.handover.record import (
    RECORD_FILE,
    Record,
    TensorFacts,
    read_record,
    read_tensors,
)
from pear_ray.engines.model_files import check_model_folder
from pear_ray.errors import HandoverError, InputError

SHOWN = 3  # of many names that differ alike


class Check(StrEnum):
    """What a hand-over can fail at; the name that an error has in front."""

    FILES = "files"
    VOCABULARY = "vocabulary"
    TIED_WEIGHTS = "tied_weights"
    DTYPE = "dtype"
    CONFIG = "config"
    WEIGHTS = "weights"
    END_TOKENS = "end_tokens"
    CHAT_TEMPLATE = "chat_template"
    RELOAD = "reload"
    ENGINE = "engine"
    ENDINGS = "endings"


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it should be, with what to do about it."""

    check: Check
    words: str


@dataclass(frozen=True, slots=True)
class Source:
    """What a checkpoint is compared with.

    Attributes:
        facts: What it should have.
        record: Of the trainer that wrote it; None where it has none.
        name: Whose they are, for messages.
    """

    facts: ModelFacts
    record: Record | None
    name: str


_CONFIG_CHECKS = {
    "vocab_size": Check.VOCABULARY,
    "tie_word_embeddings": Check.TIED_WEIGHTS,
    "dtype": Check.DTYPE,
    "bos_token_id": Check.END_TOKENS,
    "eos_token_id": Check.END_TOKENS,
    "pad_token_id": Check.END_TOKENS,
}


def check_files(folder: Path, base: Path) -> tuple[Source, str]:
    """See that the checkpoint in `folder` is whole and is what was exported; no engine is needed.

    Where it has no `handover.json` (it was put there by hand, or by an older version), the model
    that training began with stands in for the trainer: same vocabulary, config, ends and template.

    Args:
        folder: The checkpoint.
        base: The folder of `models.policy`.

    Returns:
        What it was compared with, and what is to be warned of all the same.

    Raises:
        HandoverError: Something differs; every difference is named.
    """
    source = _source(folder, base)
    fail(folder, list(_folder_differences(folder)))
    try:
        found = facts_of_folder(folder)
        differences = [
            *_config_differences(found.config, source),
            *_tokenizer_differences(found, source),
            *_end_differences(found, source),
            *_tensor_differences(folder, source),
        ]
        if not differences:  # what is left has its own words, such as ids beyond the vocabulary
            check_model_folder(folder)
        note = _no_end(found)
    except InputError as error:
        differences, note = [Difference(Check.FILES, str(error))], ""
    fail(folder, differences)
    return source, note


def fail(folder: Path, differences: Sequence[Difference]) -> None:
    """Raise what was found, if anything.

    Raises:
        HandoverError: There is a difference.
    """
    if not differences:
        return
    lines = "".join(f"\n  {each.check}: {each.words}" for each in differences)
    raise HandoverError(
        f"hand-over: {folder} cannot be trained on as it is:{lines}\n"
        f"Nothing was trained on it. If nobody meant to change it, remove {folder.parent} and run "
        f"`pear {folder.parent.name} RUN.yaml` again; a checkpoint put there on purpose has no "
        f"{RECORD_FILE}, and is compared with models.policy alone"
    )


def _source(folder: Path, base: Path) -> Source:
    try:
        record = read_record(folder)
    except InputError as error:
        raise HandoverError(f"hand-over: {Check.FILES}: {error}") from error
    if record is not None:
        return Source(record.facts, record, "the trainer")
    return Source(facts_of_folder(base), None, f"models.policy ({base})")


def _folder_differences(folder: Path) -> Iterator[Difference]:
    """What is missing altogether."""
    if not folder.is_dir():
        yield Difference(Check.FILES, "there is no such folder")
        return
    if not (folder / "config.json").exists():
        yield Difference(Check.FILES, "no config.json")
    if not any(folder.glob("*.safetensors")):
        yield Difference(Check.FILES, "no *.safetensors weights (pickles are never loaded)")
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        yield Difference(Check.FILES, "no tokenizer.json")


def _config_differences(found: dict[str, Any], source: Source) -> Iterator[Difference]:
    wanted = source.facts.config
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) == wanted.get(key):
            continue
        if source.record is None and key in {"dtype", "architectures"}:
            continue  # an export is in float32, whatever the base was saved in
        yield Difference(
            _CONFIG_CHECKS.get(key, Check.CONFIG),
            f"config.json has {key}={found.get(key)!r}, {source.name} {wanted.get(key)!r}; "
            "an engine would compute another model: put it back",
        )


def _tokenizer_differences(found: ModelFacts, source: Source) -> Iterator[Difference]:
    mine, theirs = found.tokenizer, source.facts.tokenizer
    if mine.vocabulary != theirs.vocabulary:
        yield Difference(
            Check.VOCABULARY,
            f"the tokenizer has {mine.num_tokens} tokens, that of {source.name} "
            f"{theirs.num_tokens}, or other ids for them: prompts would be other ids than were "
            "trained on; copy the tokenizer's files from models.policy",
        )
    if not mine.template:
        yield Difference(
            Check.CHAT_TEMPLATE,
            "there is no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json), so that no prompt can be written; copy it from models.policy",
        )
    elif mine.template != theirs.template:
        at = next(
            (
                i
                for i, (a, b) in enumerate(zip(mine.template, theirs.template, strict=False))
                if a != b
            ),
            min(len(mine.template), len(theirs.template)),
        )
        yield Difference(
            Check.CHAT_TEMPLATE,
            f"the chat template is not that of {source.name}: at character {at} it has "
            f"{mine.template[at : at + 20]!r} for {theirs.template[at : at + 20]!r}; SFT has "
            "taught the other: copy it from models.policy",
        )
    elif mine.vocabulary == theirs.vocabulary and (
        (mine.prompt_ids, mine.chat_ids, mine.chat_mask)
        != (theirs.prompt_ids, theirs.chat_ids, theirs.chat_mask)
    ):
        yield Difference(
            Check.CHAT_TEMPLATE,
            "a chat becomes other ids, or other tokens of it train, than with the tokenizer of "
            f"{source.name}, though vocabulary and template are the same; copy all the tokenizer's "
            "files from models.policy",
        )


def _end_differences(found: ModelFacts, source: Source) -> Iterator[Difference]:
    wanted = source.facts
    if found.tokenizer.end_id != wanted.tokenizer.end_id:
        yield Difference(
            Check.END_TOKENS,
            f"the tokenizer's end token is {found.tokenizer.end_token!r} (id "
            f"{found.tokenizer.end_id}), that of {source.name} {wanted.tokenizer.end_token!r} (id "
            f"{wanted.tokenizer.end_id}); set eos_token in tokenizer_config.json back",
        )
    if found.end_ids != wanted.end_ids:
        yield Difference(
            Check.END_TOKENS,
            f"generation_config.json has eos_token_id={found.end_ids}, {source.name} "
            f"{wanted.end_ids}; an engine would end completions elsewhere: set it back",
        )


def _no_end(found: ModelFacts) -> str:
    """What speaks against completions that end, though all readers agree; nothing else does."""
    ending = found.tokenizer.answer_ending
    if any(token in ending for token in found.end_tokens):
        return ""
    return (
        f"an engine ends completions at {' or '.join(found.end_tokens)}, and the chat template "
        f"writes {ending!r} behind an answer: SFT has hardly taught an end. Where the first batch "
        "is cut all the same, set eos_token in the tokenizer_config.json of models.policy (or "
        "eos_token_id in its generation_config.json) to the template's end token"
    )


def _tensor_differences(folder: Path, source: Source) -> Iterator[Difference]:
    try:
        tensors = read_tensors(folder)
    except InputError as error:
        yield Difference(Check.WEIGHTS, str(error))
        return
    if source.record is None:
        return
    wanted, of_vocabulary = source.record.tensors, source.record.vocabulary_tensors
    is_tied = bool(source.facts.config.get("tie_word_embeddings"))
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    heads = [name for name in (*missing, *extra) if name.startswith("lm_head.")]
    if heads:
        said = "is in the files" if heads[0] in extra else "is missing from the files"
        yield Difference(
            Check.TIED_WEIGHTS,
            f"{heads[0]} {said}, and the trainer's output head was "
            f"{'tied to the embedding' if is_tied else 'a matrix of its own'}; save it as it was",
        )
    for said, names in (("missing", missing), ("not the trainer's", extra)):
        if rest := [name for name in names if name not in heads]:
            yield Difference(Check.WEIGHTS, f"{_some(rest)} {said}; export the checkpoint again")
    both = [name for name in sorted(wanted) if name in tensors]
    yield from _same_tensors(tensors, wanted, both, of_vocabulary)


def _same_tensors(
    tensors: dict[str, TensorFacts],
    wanted: dict[str, TensorFacts],
    names: Sequence[str],
    of_vocabulary: Sequence[str],
) -> Iterator[Difference]:
    """Shapes, then dtypes, then bytes: each only where the one before does not say it all."""
    shapes = [name for name in names if tensors[name].shape != wanted[name].shape]
    for name in shapes[:SHOWN]:
        check = Check.VOCABULARY if name in of_vocabulary else Check.WEIGHTS
        yield Difference(
            check,
            f"{name} has shape {tensors[name].shape}, the trainer's {wanted[name].shape}; export "
            "the checkpoint again",
        )
    dtypes = [name for name in names if tensors[name].dtype != wanted[name].dtype]
    if dtypes:
        name = dtypes[0]
        yield Difference(
            Check.DTYPE,
            f"{_some(dtypes)} in {tensors[name].dtype}, the trainer's in {wanted[name].dtype}: "
            "what SFT learned last may be rounded away; keep the exported dtype",
        )
    told = {*shapes, *dtypes}
    values = [
        name for name in names if name not in told and tensors[name].digest != wanted[name].digest
    ]
    if values:
        yield Difference(
            Check.WEIGHTS, f"{_some(values)} not of the trainer's values; export it again"
        )


def _some(names: Sequence[str]) -> str:
    """`a, b, c and 4 more are`."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    verb = "is" if len(names) == 1 else "are"
    return f"{', '.join(names[:SHOWN])}{more} {verb}"
