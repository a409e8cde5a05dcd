"""The turns that a trainer and an engine take on one device."""

from collections.abc import Sequence

import torch

from pear_ray.config.colocation import ColocationConfig
from pear_ray.engines import weights
from pear_ray.engines.batches import TokenBatch
from pear_ray.engines.policy import Policy
from pear_ray.engines.trainer import Trainer
from pear_ray.engines.vllm.engine import VllmEngine

HOST = torch.device("cpu")


def optimizer_rests_on(config: ColocationConfig, device: torch.device) -> torch.device | None:
    """Where the optimizer's state is between two updates; None: where the parameters are.

    Neither the engine nor a forward or backward pass has to leave room for it then.
    """
    return HOST if device.type == "cuda" and config.offload != "none" else None


class SharedDevice:
    """One rank's device. On a CPU nothing moves, and the same calls run."""

    def __init__(
        self,
        config: ColocationConfig,
        engine: VllmEngine,
        trainer: Trainer,
        *,
        sender: weights.Sender,
        reference: Policy | None,
        device: torch.device,
    ) -> None:
        self.sender = sender
        self._engine, self._trainer = engine, trainer
        self._reference, self._device = reference, device
        # The optimizer's state rests in the host's memory all the time: see `optimizer_rests_on`.
        self._moves_weights = device.type == "cuda" and config.offload == "all"

    def to_trainer(self) -> None:
        """The policy trains next: the engine sleeps, and what was moved away comes back."""
        self._engine.sleep()
        if self._moves_weights:
            self._move_weights(self._device)

    @property
    def takes_turns(self) -> bool:
        """Whether the engine has nothing after a `to_trainer`."""
        return self._engine.spec.sleeps

    def to_engine(self, canary: TokenBatch) -> tuple[Sequence[str], float]:
        """The engine samples next, with the trainer's weights.

        The engine's cache comes last, when the trainer has given up all that it can: the two are
        the largest there are. A collective when the policy is sharded.

        Returns:
            Parameters that the engine holds otherwise than they were sent, and the gap on `canary`,
            in nats.
        """
        self._release()
        self._engine.wake("weights")
        differing = self.sender.publish_weights()
        trained = weights.canary_logprobs(self._trainer.module, canary)
        if self._moves_weights:
            self._move_weights(HOST)
        self._release()
        self._engine.wake("kv_cache")
        return differing, weights.canary_gap(self._engine, trained, canary)

    def _move_weights(self, device: torch.device) -> None:
        self._trainer.module.to(device)
        if self._reference is not None:
            self._reference.to(device)

    def _release(self) -> None:
        """Give back what PyTorch keeps of freed tensors: the engine allocates past PyTorch."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
