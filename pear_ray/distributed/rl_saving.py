"""A step's rollouts of all ranks into the step's file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from pear_ray.artifacts.rollouts import TrainedNumbers, rollouts_table, write_step
from pear_ray.config.rl import RlConfig
from pear_ray.distributed.rl_advantages import Microbatch
from pear_ray.records import RolloutGroup


def is_saved(step: int, settings: RlConfig) -> bool:
    """Whether the rollouts of `step`, counted from 0, are to be kept."""
    every = settings.save_rollouts_every
    return every > 0 and (step % every == 0 or step + 1 == settings.num_steps)


def save_rollouts(
    groups: Sequence[RolloutGroup],
    folder: Path,
    *,
    step: int,
    temperature: float,
    minibatches: Sequence[Sequence[Microbatch]] = (),
) -> None:
    """Write the rollouts of all ranks as the file of `step`, counted from 0 (a collective).

    Args:
        groups: This rank's; the step's groups were dealt to the ranks in turn.
        folder: Where the files of all steps are; rank 0 alone writes there.
        step: Counted from 0; its file is named by the steps done with it.
        temperature: At which the completions were sampled.
        minibatches: What `RolloutTrainer.update` has trained on, where it has: all of `groups`.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    table = rollouts_table(
        groups,
        step=step + 1,
        places=range(rank, rank + world_size * len(groups), world_size),
        temperature=temperature,
        trained=_trained_numbers(groups, minibatches) if minibatches else None,
    )
    tables: list[pa.Table | None] = [table]
    if world_size > 1:
        tables = [None] * world_size
        dist.gather_object(table, tables if rank == 0 else None)
    if rank == 0:
        write_step(folder, step + 1, [each for each in tables if each is not None])


def _trained_numbers(
    groups: Sequence[RolloutGroup], minibatches: Sequence[Sequence[Microbatch]]
) -> TrainedNumbers:
    num_rollouts = sum(len(group.rollouts) for group in groups)
    advantages = [0.0] * num_rollouts
    logprobs: list[Sequence[float]] = [[]] * num_rollouts
    for microbatch in (each for minibatch in minibatches for each in minibatch):
        batch = microbatch.batch
        counts = np.bincount(batch.sequence_ids.cpu().numpy(), minlength=len(microbatch.rows))
        ends = np.cumsum(counts)[:-1]
        found = [
            np.split(batch.aligned[name].float().cpu().numpy(), ends)
            for name in ("advantages", "proximal_logprobs")
        ]
        for row, of_advantage, of_logprobs in zip(microbatch.rows, *found, strict=False):
            # All equal, but where a KL in the reward gives each token its own.
            advantages[row] = float(of_advantage.mean()) if len(of_advantage) else 0.0
            logprobs[row] = of_logprobs
    return TrainedNumbers(advantages, logprobs)
