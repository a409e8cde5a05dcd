"""Training with DeepSpeed ZeRO; the only module that imports DeepSpeed."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from pear_ray.config.backends import PARAMETERS_SPLIT, DeepSpeedBackend
from pear_ray.config.sections import OptimizerConfig
from pear_ray.engines.policy import Policy
from pear_ray.engines.trainer import Trainer
from pear_ray.errors import TrainingError

TAG = "state"
RANKS = "num_ranks.txt"  # beside it


class DeepSpeedTrainer(Trainer):
    """A policy in a DeepSpeed engine, with PyTorch's AdamW.

    DeepSpeed wants to know how many microbatches a step has and divides by that; here their number
    changes from step to step, so the boundary is set by hand and the global denominator enters as
    the loss scale that DeepSpeed takes out of the gradient before it clips.
    """

    def __init__(
        self,
        policy: Policy,
        config: OptimizerConfig,
        *,
        num_steps: int,
        backend: DeepSpeedBackend,
        dtype: str,
    ) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False, verbose=False)
        self._splits = backend.zero_stage == PARAMETERS_SPLIT
        self.engine, *_ = deepspeed.initialize(
            model=policy,
            model_parameters=[each for each in policy.parameters() if each.requires_grad],
            config=_settings(config, backend, dtype),
        )
        super().__init__(self.engine, policy, config, num_steps=num_steps)

    @contextlib.contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        """Gradients are reduced over ranks as ZeRO wants it; a step ends at the last one."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.optimizer.override_loss_scale(1.0)
        yield

    def backward(self, numerator: torch.Tensor) -> None:
        """Add the gradient of a microbatch's loss sum (a collective: as often on every rank)."""
        self.engine.backward(numerator, scale_wrt_gas=False)

    def _apply(self, divisor: float, rate: float | None) -> float:
        optimizer = self.engine.optimizer
        optimizer.override_loss_scale(divisor)
        if rate is None:
            with _without_update(optimizer.optimizer):
                self.engine.step()
        else:
            for group in optimizer.param_groups:
                group["lr"] = rate
            self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None or norm < 0 else float(norm)

    def save(self, folder: Path) -> None:
        """Write this rank's part of weights, optimizer and step count (a collective)."""
        self.engine.save_checkpoint(
            str(folder),
            tag=TAG,
            client_state={"step_count": self.step_count},
            exclude_frozen_parameters=True,  # they come from the model's folder
        )
        if dist.get_rank() == 0:
            (folder / RANKS).write_text(str(dist.get_world_size()), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take up exactly where `save` left off (a collective).

        Raises:
            TrainingError: Another number of ranks saved it; ZeRO's parts fit that number only.
        """
        ranks, here = int((folder / RANKS).read_text(encoding="utf-8")), dist.get_world_size()
        if ranks != here:
            raise TrainingError(
                f"the checkpoint is of {ranks} DeepSpeed trainers, it cannot go on with {here}; "
                f"set cluster.num_trainers={ranks} for the rest of the stage, or remove its "
                "folder to begin it again (sft.backend.kind=fsdp and ddp go on with any number)"
            )
        _, client = self.engine.load_checkpoint(
            str(folder), tag=TAG, load_module_strict=self.module.frozen_base is None
        )
        self.step_count = int(client["step_count"])

    def _gather(self) -> dict[str, torch.Tensor]:
        full: dict[str, torch.Tensor] = {}
        for name, parameter in self.module.named_parameters():  # only one is whole at a time
            if not parameter.requires_grad:
                continue
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._splits):
                if dist.get_rank() == 0:
                    full[name] = parameter.detach().float().cpu().clone()
        kept = self.module.state_dict().keys()  # buffers that are made anew are not among them
        return full | {n: each.cpu() for n, each in self.module.named_buffers() if n in kept}


@contextlib.contextmanager
def _without_update(optimizer: Any) -> Iterator[None]:
    """Within this DeepSpeed reduces, measures and drops gradients, and its AdamW does nothing.

    DeepSpeed knows no way to drop a gradient but a step, whose buffers differ from stage to stage;
    a step at rate 0 would move AdamW's moments.
    """
    optimizer.step = lambda: None  # of this object only: it hides the class's method
    try:
        yield
    finally:
        del optimizer.step


def _settings(config: OptimizerConfig, backend: DeepSpeedBackend, dtype: str) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": backend.zero_stage}
    if backend.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if backend.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants a number; batches are ours
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.learning_rate,
                "betas": [config.beta1, config.beta2],
                "weight_decay": config.weight_decay,
                "torch_adam": True,  # DeepSpeed's own is compiled at first use
            },
        },
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
