"""Trainer and engine must answer alike: the canary after every weight sync."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pear_ray.engines.batches import Row, TokenBatch, collate
from pear_ray.engines.policy import Policy
from pear_ray.errors import WeightSyncError

CANARY_TOKENS = 48
CANARY_STRIDE = 7919  # a prime: the ids spread over any vocabulary
MAX_GAP = {
    # Trainer and engine in float32 agree to about 1e-6; one optimizer step moves log-probs by more.
    "float32": 1e-4,
    # bfloat16 rounds differently in the two: on these unlikely ids SmolLM2-135M's mean gap was
    # 0.09 to 0.17 on CPU. This catches a head or an embedding left behind, not one small step.
    "bfloat16": 0.3,
}


class Scorer(Protocol):
    """An engine that gives log-probs of ids."""

    def score(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """Float32 [seq] per sequence, 0 first."""


def canary_ids(vocab_size: int) -> list[int]:
    """The fixed ids on which trainer and engine are compared."""
    return [(index * CANARY_STRIDE) % vocab_size for index in range(1, CANARY_TOKENS + 1)]


def canary_batch(vocab_size: int, *, device: torch.device) -> TokenBatch:
    """The canary as a batch: every token but the first is a loss token."""
    ids = canary_ids(vocab_size)
    row = Row(token_ids=ids, loss_mask=[True] * len(ids), aligned={})
    return collate([row], pad_id=0, names=(), device=device)


def canary_logprobs(policy: Callable[..., torch.Tensor], batch: TokenBatch) -> np.ndarray:
    """The trainer's log-probs on the canary, float32 [token] (a collective when sharded).

    `policy` is one, or what a backend has wrapped it in.
    """
    with torch.no_grad():
        return policy(batch, temperature=1.0).cpu().numpy()


def canary_gap(engine: Scorer, trained: np.ndarray, batch: TokenBatch) -> float:
    """Mean absolute difference of the engine's log-probs on the canary to `trained`, in nats."""
    sampled = engine.score([batch.input_ids.tolist()])[0][1:]
    return float(np.abs(trained - sampled).mean())


def check_held(differing: Sequence[str], *, where: str) -> None:
    """See that an engine holds every parameter as it was sent.

    Args:
        differing: Names of those that it does not.
        where: For the message.

    Raises:
        WeightSyncError: There are some.
    """
    if differing:
        rest = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise WeightSyncError(
            f"{where}: after the weight sync the engine computes with another {differing[0]}{rest} "
            "than the trainer's; nothing was sampled with it. The engine left a parameter out or "
            "kept a copy of it: install the vLLM that requirements/ names, or report the model's "
            "architecture"
        )


def check_gap(gap: float, *, max_gap: float, where: str) -> None:
    """See that a canary gap is small.

    Raises:
        WeightSyncError: It is not (NaN included): the engine does not hold the trainer's weights.
    """
    if not gap <= max_gap:
        raise WeightSyncError(
            f"{where}: after the weight sync the engine's log-probs differ from the trainer's by "
            f"{gap:.3g} nats per token (at most {max_gap:.3g} allowed), so it does not hold the "
            "trainer's weights; nothing was sampled with them. Look for a parameter that the "
            "engine keeps a copy of (a tied or prepacked head), or raise rl.max_sync_gap if the "
            "dtype is coarse"
        )


def load_checkpoint(engine: "CheckpointEngine", folder: Path, *, max_gap: float) -> float:
    """Put the weights of `folder` into `engine`, check them against transformers; the gap found.

    Raises:
        WeightSyncError: The engine answers otherwise than the checkpoint does.
    """
    causal_lm = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True
    )
    policy = Policy(causal_lm)
    engine.wake("weights")
    differing = engine.weight_sender(policy).publish_weights()
    engine.wake("kv_cache")
    check_held(differing, where=str(folder))
    batch = canary_batch(causal_lm.config.vocab_size, device=torch.device("cpu"))
    gap = canary_gap(engine, canary_logprobs(policy, batch), batch)
    check_gap(gap, max_gap=max_gap, where=str(folder))
    return gap


class CheckpointEngine(Scorer, Protocol):
    """An engine that also takes weights."""

    def weight_sender(self, policy: Policy) -> "Sender":
        """The channel from `policy` into the engine."""

    def wake(self, memory: Literal["weights", "kv_cache"]) -> None:
        """Take that memory again, if the engine sleeps."""


class Sender(Protocol):
    """A channel for weights."""

    def publish_weights(self) -> list[str]:
        """Put the policy's weights into the engine; the parameters that it then holds otherwise."""
