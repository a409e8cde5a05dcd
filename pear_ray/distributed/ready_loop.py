"""`pear ready`: rollouts of the SFT checkpoint, and what the base model says of some of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pear_ray.algorithms.policy_losses import kl_k3
from pear_ray.artifacts.rollouts import FOLDER, read_groups, saved_steps
from pear_ray.artifacts.run_dir import write_json
from pear_ray.config.run import RunConfig
from pear_ray.distributed.loops import MEASURED_FILE, READY_STAGE
from pear_ray.distributed.rl_rollouts_loop import sample_steps
from pear_ray.distributed.sft_loop import TrainJob
from pear_ray.distributed.train_group import stop_wished
from pear_ray.engines.handover.live import check_engine, check_reload
from pear_ray.engines.policy import load_policy
from pear_ray.engines.vllm.engine import VllmEngine
from pear_ray.engines.weights import MAX_GAP, load_checkpoint
from pear_ray.records import RolloutGroup
from pear_ray.tasks.reward_pool import RewardPool


def ready_loop(job: dict[str, Any]) -> None:
    """Sample `ready.num_steps` batches, then measure; Ray Train calls this on every worker.

    `job` has, beside the fields of `TrainJob`, the `base`: the folder that SFT began with. Rank 0
    leaves `measured.json`.

    Raises:
        HandoverError: Trainer, transformers and engine are not of one mind about the checkpoint.
        RewardError: Too large a share of a step's rewards could not be computed.
    """
    told = TrainJob(**{name: value for name, value in job.items() if name != "base"})
    run = told.config
    steps = run.rl.model_copy(update={"num_steps": run.ready.num_steps})
    pool = RewardPool(run.rl.rewards)  # first: its processes start up meanwhile
    try:
        sampling = replace(told, config=run.model_copy(update={"rl": steps}))
        engine = sample_steps(sampling, pool, stage=READY_STAGE)
    finally:
        pool.close()
    stage_dir = told.run_dir / READY_STAGE
    rank = dist.get_rank()
    # Rank 0 looks for all: on a shared mount others may not see its newest file yet.
    found: list[Any] = [None, stop_wished(stage_dir)]
    if rank == 0:
        files = saved_steps(stage_dir / FOLDER).values()
        found[0] = [group for file in files for group in read_groups(file)]
    dist.broadcast_object_list(found)
    groups, stop = found
    if stop:
        return
    # On all ranks alike: those next to each other may share one engine.
    measured: dict[str, Any] = {
        "engine_gap": check_engine(engine, told.model, dtype=run.models.dtype)
    }
    if run.ready.drift_completions:
        measured["drift"] = drift(engine, groups, job["base"], config=run)
    if rank == 0:
        policy = load_policy(told.model)
        measured["reload_gap"] = check_reload(policy, told.model, dtype=run.models.dtype)
        write_json(stage_dir / MEASURED_FILE, measured)


def drift(
    engine: VllmEngine, groups: Sequence[RolloutGroup], base: Path, *, config: RunConfig
) -> list[dict[str, float]]:
    """Of some completions of each group, how much likelier the checkpoint finds them than the base.

    Args:
        engine: Holds the checkpoint; afterwards the base.
        groups: Sampled from the checkpoint.
        base: The folder that SFT began with.
        config: The run.

    Returns:
        Per completion its `group` (counted over all steps), its `tokens`, and sums over them:
        `log_ratio` (checkpoint minus base, nats; its mean over samples is KL(checkpoint || base),
        k1) and `kl_k3` (the same expectation with less variance).

    Raises:
        WeightSyncError: The engine did not take the base's weights.
    """
    chosen = [
        (number, one)
        for number, group in enumerate(groups)
        for one in group.rollouts[: config.ready.drift_completions]
    ]
    ids = [[*one.prompt_ids, *one.completion.token_ids] for _, one in chosen]
    # At temperature 1 whatever the samples' own: an engine scores at no other.
    mine = engine.score(ids)
    load_checkpoint(engine, base, max_gap=MAX_GAP[config.models.dtype])
    theirs = engine.score(ids)
    rows = []
    for (number, one), ours, others in zip(chosen, mine, theirs, strict=True):
        begin = len(one.prompt_ids)
        policy, reference = (torch.tensor(each[begin:]).double() for each in (ours, others))
        k3 = kl_k3(policy, reference, torch.ones(len(policy), dtype=torch.bool))
        rows.append(
            {
                "group": number,
                "tokens": len(policy),
                "log_ratio": float((policy - reference).sum()),
                "kl_k3": float(k3.sum()),
            }
        )
    return rows
