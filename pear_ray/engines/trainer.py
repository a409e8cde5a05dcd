"""Optimizer steps on a policy spread over ranks: what every backend and both loops share."""

import abc
import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pear_ray.config.sections import OptimizerConfig
from pear_ray.engines.policy import Policy
from pear_ray.errors import TrainingError

ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did. `grad_norm` is before clipping."""

    grad_norm: float
    learning_rate: float


class Trainer(abc.ABC):
    """A policy with AdamW and its schedule, on some backend.

    Losses arrive as sums. Gradients of sums are added up over microbatches and ranks, and divided
    once, by the denominator of the whole step: neither microbatches nor ranks can change the
    result.

    Attributes:
        policy: What gives log-probs; called like a `Policy`, and a collective.
        module: The `Policy` itself, without what a backend wraps it in.
        step_count: Optimizer steps behind the weights.
    """

    def __init__(
        self,
        policy: Callable[..., torch.Tensor],
        module: Policy,
        config: OptimizerConfig,
        *,
        num_steps: int,
    ) -> None:
        self.policy = policy
        self.module = module
        self.config = config
        self.num_steps = num_steps
        self.step_count = 0

    def microbatch(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:  # noqa: ARG002
        """Around forward and backward of one microbatch; `last` is the step's last one."""
        return contextlib.nullcontext()

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within this the policy has the average of its weights (a collective where sharded).

        Raises:
            TrainingError: This trainer keeps none.
        """
        raise TrainingError("this trainer keeps no average of the weights")

    def move_optimizer(self, device: torch.device) -> None:
        """Put the optimizer's state into the memory of `device`, the host's or the trainer's own.

        Raises:
            TrainingError: This trainer cannot; its backend has an offload of its own.
        """
        raise TrainingError(f"this trainer's optimizer cannot be moved to {device}")

    def backward(self, numerator: torch.Tensor) -> None:
        """Add the gradient of a microbatch's loss sum (a collective: as often on every rank)."""
        numerator.backward()

    def step(self, denominator: float) -> StepResult:
        """Divide by the global `denominator`, clip, and step (a collective).

        Raises:
            TrainingError: The gradient is not finite, or nothing is left to divide by; the weights
                are left as they were.
        """
        rate = learning_rate_at(self.step_count, num_steps=self.num_steps, config=self.config)
        grad_norm = self._checked_step(denominator, rate)
        self.step_count += 1
        return StepResult(grad_norm=grad_norm, learning_rate=rate)

    def probe(self, denominator: float) -> float:
        """The gradient norm that `step` would find (a collective).

        The gradient is dropped; weights, optimizer and average are left alone, so that training
        goes on with the same bits as without.

        Raises:
            TrainingError: As in `step`.
        """
        return self._checked_step(denominator, None)

    def _checked_step(self, denominator: float, rate: float | None) -> float:
        if not denominator > 0:
            raise TrainingError(
                f"step {self.step_count + 1}: the loss denominator is {denominator:g}, not above "
                "0; look at the rows of this step: no loss token, or weights that are all zero"
            )
        # Every backend averages gradients over ranks; the loss is a sum over them.
        grad_norm = self._apply(denominator / dist.get_world_size(), rate)
        if not math.isfinite(grad_norm):
            raise TrainingError(
                f"step {self.step_count + 1}: the gradient norm is {grad_norm}; "
                "lower the learning rate, or look at the rows of this step for extreme log-probs"
            )
        return grad_norm

    @abc.abstractmethod
    def _apply(self, divisor: float, rate: float | None) -> float:
        """Divide the gradient, clip it, step at `rate` if it is finite; its norm before that.

        Without a rate there is no step. The gradient is gone afterwards in any case.
        """

    @abc.abstractmethod
    def save(self, folder: Path) -> None:
        """Write this rank's part of weights, optimizer and step count (a collective)."""

    @abc.abstractmethod
    def load(self, folder: Path) -> None:
        """Take up exactly where `save` left off (a collective)."""

    def export(
        self, folder: Path, *, save_tokenizer: Callable[[Path], Any]
    ) -> dict[str, torch.Tensor]:
        """Write the whole model as a Hugging Face folder from rank 0 (a collective).

        Adapters are merged into it, and kept beside the weights in the subfolder `adapter`.

        Returns:
            On rank 0 what was to be written, by name; nothing on others.
        """
        found, written = self._gather(), {}
        if dist.get_rank() == 0:
            base = self.module.frozen_base
            if base is None:
                written = write_model(self.module, found, folder, save_tokenizer)
            else:
                # An extra that an install need not have, and seconds to import.
                from pear_ray.engines.lora import merged, write_adapter  # noqa: PLC0415

                write_adapter(self.module, found, folder / ADAPTER)
                policy = merged(base, folder / ADAPTER)
                written = write_model(policy, policy.state_dict(), folder, save_tokenizer)
        dist.barrier()
        return written

    @abc.abstractmethod
    def _gather(self) -> dict[str, torch.Tensor]:
        """The policy's state dict on rank 0, of one with adapters no frozen parameter."""


def write_model(
    policy: Policy,
    full: Mapping[str, Any],
    folder: Path,
    save_tokenizer: Callable[[Path], Any],
) -> dict[str, Any]:
    """Write a policy's whole state dict as a Hugging Face folder, tied weights once; what it was.

    The names are those of the file.
    """
    names: dict[int, str] = {}
    for name, parameter in policy.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    again = {name for name, _ in policy.named_parameters(remove_duplicate=False)}
    again -= set(names.values())
    weights = {
        name.removeprefix("causal_lm."): tensor
        for name, tensor in full.items()
        if name not in again
    }
    policy.causal_lm.save_pretrained(folder, state_dict=weights)
    save_tokenizer(folder)
    return weights


def learning_rate_at(step: int, *, num_steps: int, config: OptimizerConfig) -> float:
    """Rate for step `step` (from 0): a linear rise, then half a cosine to the final fraction."""
    warmup = round(config.warmup_fraction * num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - 1 - warmup)  # 1 at the last step
    shape = config.final_fraction + (1 - config.final_fraction) * 0.5 * (
        1 + math.cos(math.pi * min(1.0, progress))
    )
    return config.learning_rate * shape


def gather_over_ranks(mine: dict[str, float]) -> list[dict[str, float]]:
    """Every rank's dict, in rank order (a collective)."""
    if dist.get_world_size() == 1:
        return [dict(mine)]
    gathered: list[dict[str, float] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return [each for each in gathered if each is not None]
