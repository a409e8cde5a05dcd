"""`handover.json` beside exported weights: what the trainer said of them when it wrote them."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from pear_ray.artifacts.run_dir import write_json
from pear_ray.engines import weights
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.handover.facts import ModelFacts, TokenizerFacts, facts_of_model
from pear_ray.engines.policy import Policy
from pear_ray.engines.trainer import Trainer
from pear_ray.errors import InputError

RECORD_FILE = "handover.json"
_VERSION = 1
_THREADS = 8  # hashing lets go of the interpreter: 1.5 GB/s each


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """One tensor of the weights; `digest` is of its bytes."""

    dtype: str
    shape: list[int]
    digest: str


@dataclass(frozen=True, slots=True)
class Record:
    """What a trainer says of the checkpoint that it has written.

    Attributes:
        canary: The ids that were asked, [seq].
        logprobs: The trainer's log-probs of all but the first, in nats, [seq - 1].
        computed_on: The device that the trainer computed them on, `cpu` or `cuda`.
        vocabulary_tensors: Names of the embedding and, where it is not tied, the output head.
        tensors: The trainer's parameters by name.
        facts: Of the trainer's model and tokenizer.
    """

    canary: list[int]
    logprobs: list[float]
    computed_on: str
    vocabulary_tensors: list[str]
    tensors: dict[str, TensorFacts]
    facts: ModelFacts


def trainers_logprobs(trainer: Trainer) -> np.ndarray:
    """The trainer's log-probs of the canary, float32 [token] (a collective)."""
    size = trainer.module.causal_lm.config.vocab_size
    batch = weights.canary_batch(size, device=_training_device())
    return weights.canary_logprobs(trainer.policy, batch)


def write_record(
    folder: Path,
    policy: Policy,
    chat: ChatTokenizer,
    gathered: Mapping[str, torch.Tensor],
    *,
    logprobs: np.ndarray,
) -> None:
    """Write `handover.json` into the folder that has just been exported (on one rank).

    Args:
        folder: The export.
        policy: What was in training, for its config.
        chat: Its tokenizer.
        gathered: The trainer's whole tensors by the names of the file.
        logprobs: As `trainers_logprobs`.
    """
    written, causal_lm = read_tensors(folder), policy.causal_lm
    # The trainer's own where names are the file's: an exporter that wrote something else is found.
    mine = {name: tensor for name, tensor in gathered.items() if name in written}
    size = causal_lm.config.vocab_size
    record = Record(
        canary=weights.canary_ids(size),
        logprobs=logprobs.astype(float).tolist(),
        computed_on=_training_device().type,
        vocabulary_tensors=[each for each in _vocabulary_names(policy) if each in written],
        tensors=written | _tensor_facts(mine),
        facts=facts_of_model(causal_lm, chat),
    )
    write_json(folder / RECORD_FILE, {"version": _VERSION} | asdict(record))


def read_record(folder: Path) -> Record | None:
    """The record in an exported folder; None where there is none.

    Raises:
        InputError: It is not what this version writes.
    """
    file = folder / RECORD_FILE
    if not file.exists():
        return None
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if tree.pop("version") != _VERSION:
            raise ValueError(f"its version is not {_VERSION}")  # noqa: TRY301 - joins the others
        facts = tree.pop("facts")
        tokenizer = TokenizerFacts(**facts.pop("tokenizer"))
        tensors = {name: TensorFacts(**each) for name, each in tree.pop("tensors").items()}
        return Record(**tree, tensors=tensors, facts=ModelFacts(**facts, tokenizer=tokenizer))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{file}: not a record of this version ({type(error).__name__}: {error}); export the "
            "checkpoint again, or remove the file: it is then compared with models.policy alone"
        ) from error


def read_tensors(folder: Path) -> dict[str, TensorFacts]:
    """Every tensor of the safetensors files of `folder`, read and hashed.

    Raises:
        InputError: A file cannot be read.
    """
    found: dict[str, TensorFacts] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors, ThreadPoolExecutor(_THREADS) as pool:
                names = list(tensors.keys())
                facts = pool.map(lambda name, held=tensors: _facts(held.get_tensor(name)), names)
                found |= dict(zip(names, facts, strict=True))
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file}: not a safetensors file that can be read: {error}") from error
    return found


def _training_device() -> torch.device:
    """Where this process trains; its parameters may be kept in the host's memory all the same."""
    if torch.cuda.is_initialized():  # nothing else in a worker would have done that
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _tensor_facts(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorFacts]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(tensors, pool.map(_facts, tensors.values()), strict=True))


def _facts(tensor: torch.Tensor) -> TensorFacts:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()[:20]
    return TensorFacts(str(tensor.dtype).removeprefix("torch."), list(tensor.shape), digest)


def _vocabulary_names(policy: Policy) -> list[str]:
    """Names of the embedding and of an output head of its own, without the policy's prefix."""
    causal_lm = policy.causal_lm
    head = causal_lm.get_output_embeddings()
    ends = {id(each.weight) for each in (causal_lm.get_input_embeddings(), head)}
    return [name for name, parameter in causal_lm.named_parameters() if id(parameter) in ends]
