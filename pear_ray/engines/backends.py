"""From a run's backend to the trainer that it names."""

from pathlib import Path
from typing import assert_never

from pear_ray.config.backends import DdpBackend, DeepSpeedBackend, FsdpBackend
from pear_ray.config.rl import RlConfig
from pear_ray.config.sections import compute_dtype
from pear_ray.config.sft import SftConfig
from pear_ray.engines.compiling import compile_layers
from pear_ray.engines.native_trainer import NativeTrainer
from pear_ray.engines.policy import Policy, checkpoint_activations, load_policy, replicate, shard
from pear_ray.engines.trainer import Trainer


def make_trainer(
    folder: Path,
    config: SftConfig,
    *,
    num_steps: int,
    device: str,
    dtype: str,
    seed: int,
) -> Trainer:
    """The model of `folder`, ready to train on the backend of `config` (a collective).

    Args:
        folder: The model.
        config: Its fields of the optimizer, and of how and on what the model trains.
        num_steps: Of the learning rate's schedule.
        device: `cpu` or `cuda`.
        dtype: `float32` or `bfloat16`.
        seed: Seed of adapters, which begin alike on every rank.

    Raises:
        InputError: transformers cannot load the folder.
        EngineError: The model's log-probs cannot be had from hidden states; no compiler is there.
    """
    policy = prepared(load_policy(folder), config, base=folder, device=device, seed=seed)
    backend, optimizer, ema_decay = config.backend, config.optimizer, config.ema_decay
    match backend:
        case FsdpBackend():
            spread = shard(
                policy,
                device=device,
                dtype=dtype,
                shard_over=backend.shard_over,
                cpu_offload=backend.cpu_offload,
            )
            return NativeTrainer(spread, optimizer, num_steps=num_steps, ema_decay=ema_decay)
        case DdpBackend():
            whole = replicate(policy, device=device, dtype=dtype)
            return NativeTrainer(whole, optimizer, num_steps=num_steps, ema_decay=ema_decay)
        case DeepSpeedBackend():
            # An extra that an install need not have, and ten seconds to import.
            from pear_ray.engines.deepspeed_trainer import DeepSpeedTrainer  # noqa: PLC0415

            return DeepSpeedTrainer(
                policy,
                optimizer,
                num_steps=num_steps,
                backend=backend,
                dtype=compute_dtype(dtype, device=device),
            )
        case _:
            assert_never(backend)


def prepared(
    policy: Policy, config: SftConfig | RlConfig, *, base: Path, device: str, seed: int
) -> Policy:
    """`policy` with adapters, checkpointed and compiled, as `config` wants it.

    Args:
        policy: The model of `base`, not yet spread over ranks; changed in place.
        config: Its fields of how the model trains, which SFT and RL have alike.
        base: The model's folder.
        device: `cpu` or `cuda`.
        seed: Of adapters, which begin alike on every rank.

    Raises:
        EngineError: No compiler is there.
    """
    if config.lora is not None:
        # An extra that an install need not have, and seconds to import.
        from pear_ray.engines.lora import adapt  # noqa: PLC0415

        adapt(policy, config.lora, base=base, seed=seed)
    if config.activation_checkpointing:
        checkpoint_activations(policy)
    if config.compile:
        compile_layers(policy, device=device)
    return policy
