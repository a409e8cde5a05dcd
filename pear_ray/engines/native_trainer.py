"""Training with PyTorch's own FSDP2 or DistributedDataParallel, checkpointed by DCP."""

import contextlib
import math
from collections.abc import Callable, Iterable
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
from torch.nn.parallel import DistributedDataParallel

from pear_ray.config.sections import OptimizerConfig
from pear_ray.engines.policy import Policy
from pear_ray.engines.trainer import Trainer, write_model


class NativeTrainer(Trainer):
    """A policy that `policy.shard` or `policy.replicate` has spread, with AdamW."""

    def __init__(
        self, policy: Policy | DistributedDataParallel, config: OptimizerConfig, *, num_steps: int
    ) -> None:
        wrapped = isinstance(policy, DistributedDataParallel)
        module: Any = policy.module if wrapped else policy
        super().__init__(policy, module, config, num_steps=num_steps)
        self._spread = policy
        self.optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )

    def microbatch(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """With DDP, gradients are averaged at the last microbatch only."""
        if isinstance(self._spread, DistributedDataParallel) and not last:
            return self._spread.no_sync()
        return contextlib.nullcontext()

    def _apply(self, divisor: float, rate: float) -> float:
        for parameter in self._spread.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1 / divisor)
        norm = torch.nn.utils.clip_grad_norm_(
            self._spread.parameters(), self.config.max_grad_norm, foreach=True
        )
        grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if math.isfinite(grad_norm):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _optimizer_states(self) -> Iterable[dict[str, Any]]:
        return self.optimizer.state.values()

    def save(self, folder: Path) -> None:
        """Write this rank's part of weights, optimizer and step count (a collective)."""
        dcp.save(self._state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """Take up exactly where `save` left off (a collective)."""
        state = self._state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self._spread,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.step_count = int(state["step_count"])

    def export(self, folder: Path, *, save_tokenizer: Callable[[Path], Any]) -> None:
        """Write the whole model as a Hugging Face folder from rank 0 (a collective)."""
        full = get_model_state_dict(
            self._spread, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if dist.get_rank() == 0:
            write_model(self.module, full, folder, save_tokenizer)
        dist.barrier()

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._spread, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "step_count": torch.tensor(self.step_count),
        }
