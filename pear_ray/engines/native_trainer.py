"""Training with PyTorch's own FSDP2 or DistributedDataParallel, checkpointed by DCP."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pear_ray.config.sections import OptimizerConfig
from pear_ray.engines.policy import Policy
from pear_ray.engines.trainer import Trainer

# Parameters that, whole and with whole gradients, are little beside any device's memory.
SMALL_BYTES = 64 * 2**20


class NativeTrainer(Trainer):
    """A policy that `policy.shard` or `policy.replicate` has spread, with AdamW.

    On a CPU an update is one pass over each tensor (fused), without temporaries. Where the
    optimizer's state has another place to rest, it is on the parameters' device for the update
    alone, which then goes tensor by tensor: PyTorch would otherwise make temporaries of all of them
    at once on a GPU, as large as the parameters.
    """

    def __init__(
        self,
        policy: Policy | DistributedDataParallel,
        config: OptimizerConfig,
        *,
        num_steps: int,
        ema_decay: float | None = None,
        state_rests_on: torch.device | None = None,
    ) -> None:
        wrapped = isinstance(policy, DistributedDataParallel)
        module: Any = policy.module if wrapped else policy
        super().__init__(policy, module, config, num_steps=num_steps)
        self._spread = policy
        self._trained = [each for each in policy.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self._trained,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            foreach=None if state_rests_on is None else False,
            fused=True if self._trained[0].device.type == "cpu" else None,
        )
        self._state_rests_on = state_rests_on
        whole = sum(each.numel() * each.element_size() for each in policy.parameters())
        is_small = isinstance(policy, FSDPModule) and whole <= SMALL_BYTES
        self._small_root = policy if is_small else None
        # Not the root: it stays whole between its forward and its backward pass anyway.
        self._layers = [
            each for each in module.modules() if isinstance(each, FSDPModule) and each is not module
        ]

        self._ema_decay = ema_decay
        self._average: dict[str, torch.Tensor] = {}
        if ema_decay is not None:
            self._average = {
                name: parameter.detach().clone() for name, parameter in self._named_trained()
            }

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within this the policy has the average of its weights (a collective where sharded)."""
        return self._with_average() if self._average else super().averaged()

    @contextlib.contextmanager
    def _with_average(self) -> Iterator[None]:
        self._swap_average()
        try:
            yield
        finally:
            self._swap_average()

    @torch.no_grad()
    def _swap_average(self) -> None:
        # The root stays gathered after a forward pass, and all of a small model within a step: what
        # is gathered would not be what is swapped.
        for unit in (self.module, *self._layers):
            if isinstance(unit, FSDPModule):
                unit.reshard()
        for name, parameter in self._named_trained():
            live, average = _local(parameter), _local(self._average[name])
            held = live.clone()
            live.copy_(average)
            average.copy_(held)

    def move_optimizer(self, device: torch.device) -> None:
        """Put the optimizer's state into the memory of `device`; step counts stay on the host."""
        for state in self.optimizer.state.values():
            for name, value in state.items():
                if torch.is_tensor(value) and value.dim():
                    state[name] = value.to(device)

    def microbatch(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients are averaged at the last microbatch only, where what that holds is little."""
        if isinstance(self._spread, DistributedDataParallel):
            return contextlib.nullcontext() if last else self._spread.no_sync()
        if self._small_root is None:
            return contextlib.nullcontext()
        return self._kept_whole(self._small_root, last=last)

    @contextlib.contextmanager
    def _kept_whole(self, root: FSDPModule, *, last: bool) -> Iterator[None]:
        """FSDP2 gathers once per step and reduces once, at the step's last microbatch.

        On small models the copying to and fro for each layer of each microbatch is what sharding
        costs. With one rank the gradients are the same to the bit.
        """
        root.set_requires_gradient_sync(last)
        root.set_reshard_after_backward(last)
        for layer in self._layers:
            layer.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            # A pass without gradients, such as the canary's, has no backward pass to let go in.
            for layer in self._layers:
                layer.set_reshard_after_forward(True, recurse=False)

    def _apply(self, divisor: float, rate: float | None) -> float:
        gradients = [each.grad for each in self._trained if each.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, 1 / divisor)
        norm = torch.nn.utils.clip_grad_norm_(
            self._trained, self.config.max_grad_norm, foreach=True
        )
        grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if rate is not None and math.isfinite(grad_norm):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self._update()
            self._move_average()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _update(self) -> None:
        """One step of AdamW, its state on the parameters' device meanwhile."""
        if self._state_rests_on is None:
            self.optimizer.step()
            return
        self.move_optimizer(self._trained[0].device)
        self.optimizer.step()
        self.move_optimizer(self._state_rests_on)

    @torch.no_grad()
    def _move_average(self) -> None:
        if self._ema_decay is None:
            return
        for name, parameter in self._named_trained():
            _local(self._average[name]).lerp_(_local(parameter), 1 - self._ema_decay)

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
            # Frozen parameters are not in a checkpoint: they come from the model's folder.
            options=StateDictOptions(strict=self.module.frozen_base is None),
        )
        self.step_count = int(state["step_count"])
        if self._state_rests_on is not None:  # it was loaded beside the parameters
            self.move_optimizer(self._state_rests_on)

    def _gather(self) -> dict[str, torch.Tensor]:
        options = StateDictOptions(
            full_state_dict=True,
            cpu_offload=True,
            ignore_frozen_params=self.module.frozen_base is not None,
        )
        found: dict[str, Any] = get_model_state_dict(self._spread, options=options)
        return found

    def _named_trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((name, each) for name, each in self.module.named_parameters() if each.requires_grad)

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(
            self._spread,
            self.optimizer,
            options=StateDictOptions(ignore_frozen_params=self.module.frozen_base is not None),
        )
        return {
            "model": model,
            "optimizer": optimizer,
            "step_count": torch.tensor(self.step_count),
            "average": self._average,
        }


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
