"""The hand-over gate's look at what was loaded: log-probs of trainer and engine on the canary."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from pear_ray.config.sections import compute_dtype
from pear_ray.engines.handover.files import Check, Difference, fail
from pear_ray.engines.handover.record import read_record
from pear_ray.engines.policy import Policy
from pear_ray.engines.weights import MAX_GAP, canary_batch, canary_logprobs


class LoadedEngine(Protocol):
    """An engine with the weights of the folder that it was started on."""

    def score(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """Float32 [seq] per sequence, 0 first."""

    def end_tokens(self) -> list[str]:
        """At which it ends completions."""


def check_reload(policy: Policy, folder: Path, *, dtype: str) -> float | None:
    """See that the model loaded from `folder` gives the log-probs of the trainer that wrote it.

    Args:
        policy: Whole, in float32 on the CPU: as it was loaded.
        folder: Where it was loaded from.
        dtype: As `models.dtype`.

    Returns:
        The mean gap in nats per token; None where the folder has no record.

    Raises:
        HandoverError: It does not.
    """
    record = read_record(folder)
    if record is None:
        return None
    batch = canary_batch(policy.causal_lm.config.vocab_size, device=torch.device("cpu"))
    found = canary_logprobs(policy, batch)
    limit = MAX_GAP[compute_dtype(dtype, device=record.computed_on)]
    gap = float(np.abs(found - np.asarray(record.logprobs)).mean())
    if not gap <= limit:
        words = (
            f"loaded again, log-probs differ from the trainer's by {gap:.3g} nats per token (at "
            f"most {limit:g}): the files do not hold the model that was trained, or transformers "
            "makes another of them; compare the versions in sft/manifest.json with those here"
        )
        fail(folder, [Difference(Check.RELOAD, words)])
    return gap


def check_engine(engine: LoadedEngine, folder: Path, *, dtype: str) -> float | None:
    """See that an engine started on `folder` answers and ends as the trainer that wrote it.

    Args:
        engine: Before anything was published into it.
        folder: What it was started on.
        dtype: As `models.dtype`.

    Returns:
        The mean gap in nats per token; None where the folder has no record: the sync before the
        first step then compares engine and trainer.

    Raises:
        HandoverError: It does not.
    """
    record = read_record(folder)
    if record is None:
        return None
    gap = float(np.abs(engine.score([record.canary])[0][1:] - np.asarray(record.logprobs)).mean())
    differences = []
    if not gap <= MAX_GAP[dtype]:
        words = (
            f"the engine's log-probs differ from the trainer's by {gap:.3g} nats per token (at "
            f"most {MAX_GAP[dtype]:g} in {dtype}): it computes another model from the same files; "
            "install the vLLM that requirements/ names, or report the architecture"
        )
        differences.append(Difference(Check.ENGINE, words))
    ends = sorted(engine.end_tokens())
    if ends != record.facts.end_tokens:
        words = (
            f"the engine ends completions at {', '.join(ends)}, the trainer's tokenizer and "
            f"generation config at {', '.join(record.facts.end_tokens)}; look at eos_token_id in "
            "generation_config.json"
        )
        differences.append(Difference(Check.END_TOKENS, words))
    fail(folder, differences)
    return gap
