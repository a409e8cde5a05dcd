"""Optimizer steps on a sharded policy: the part that SFT and RL share."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from pear_ray.config.sections import OptimizerConfig
from pear_ray.engines.policy import Policy
from pear_ray.errors import TrainingError


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did. `grad_norm` is before clipping."""

    grad_norm: float
    learning_rate: float


class Trainer:
    """A sharded policy with AdamW and its schedule.

    Losses arrive as sums. Gradients of sums are added up over microbatches and ranks, and divided
    once, by the denominator of the whole step: neither microbatches nor ranks can change the
    result.
    """

    def __init__(self, policy: Policy, config: OptimizerConfig, *, num_steps: int) -> None:
        self.policy = policy
        self.config = config
        self.num_steps = num_steps
        self.step_count = 0
        self.optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )

    def backward(self, numerator: torch.Tensor) -> None:
        """Add the gradient of a microbatch's loss sum (a collective: as often on every rank)."""
        numerator.backward()

    def step(self, denominator: float) -> StepResult:
        """Divide by the global `denominator`, clip, and step.

        Raises:
            TrainingError: The gradient is not finite, or nothing is left to divide by; the weights
                are left as they were.
        """
        if not denominator > 0:
            raise TrainingError(
                f"step {self.step_count + 1}: the loss denominator is {denominator:g}, not above "
                "0; look at the rows of this step: no loss token, or weights that are all zero"
            )
        # FSDP has averaged gradients over ranks; the loss is a sum over ranks over one denominator.
        scale = dist.get_world_size() / denominator
        for parameter in self.policy.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        norm = torch.nn.utils.clip_grad_norm_(
            self.policy.parameters(), self.config.max_grad_norm, foreach=True
        )
        grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(grad_norm):
            raise TrainingError(
                f"step {self.step_count + 1}: the gradient norm is {grad_norm}; "
                "lower the learning rate, or look at the rows of this step for extreme log-probs"
            )
        rate = learning_rate_at(self.step_count, num_steps=self.num_steps, config=self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_count += 1
        return StepResult(grad_norm=grad_norm, learning_rate=rate)

    def save(self, folder: Path) -> None:
        """Write this rank's part of weights, optimizer and step count (a collective)."""
        dcp.save(self._state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """Take up exactly where `save` left off (a collective)."""
        state = self._state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.policy,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.step_count = int(state["step_count"])

    def export(self, folder: Path, *, save_tokenizer: Callable[[Path], Any]) -> None:
        """Write the whole model as a Hugging Face folder from rank 0 (a collective)."""
        full = get_model_state_dict(
            self.policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if dist.get_rank() == 0:
            prefix = "causal_lm."
            weights = {name.removeprefix(prefix): tensor for name, tensor in full.items()}
            self.policy.causal_lm.save_pretrained(folder, state_dict=weights)
            save_tokenizer(folder)
        dist.barrier()

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.policy, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "step_count": torch.tensor(self.step_count),
        }


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
    gathered: list[dict[str, float] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return [each for each in gathered if each is not None]
