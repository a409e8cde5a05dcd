"""`pear rl --rollouts-only`: rollouts of weights that nothing changes."""

from typing import Any

import torch.distributed as dist

from pear_ray.artifacts.rollouts import FOLDER, saved_steps
from pear_ray.distributed.capacity import rl_engine_spec
from pear_ray.distributed.in_process import open_engine
from pear_ray.distributed.loops import ROLLOUTS_STAGE
from pear_ray.distributed.rl_endings import check_endings
from pear_ray.distributed.rl_metrics import lap_times, rollout_metrics, rollout_sums
from pear_ray.distributed.rl_rollouts import RolloutMaker
from pear_ray.distributed.rl_saving import save_rollouts
from pear_ray.distributed.rl_training import over_ranks
from pear_ray.distributed.sft_loop import TrainJob
from pear_ray.distributed.train_group import stop_wished
from pear_ray.distributed.train_worker import Laps, start_worker
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.handover.live import check_engine
from pear_ray.engines.vllm.engine import VllmEngine
from pear_ray.tasks.reward_pool import RewardPool
from pear_ray.telemetry.metrics_log import MetricsLog


def rollouts_loop(job: dict[str, Any]) -> None:
    """Sample, reward and save every step that is not there; Ray Train calls this on every worker.

    Raises:
        HandoverError: The engine does not answer as the trainer did, or completions do not end.
        RewardError: Too large a share of a step's rewards could not be computed.
    """
    told = TrainJob(**job)
    pool = RewardPool(told.config.rl.rewards)  # first: its processes start up meanwhile
    try:
        sample_steps(told, pool, stage=ROLLOUTS_STAGE)
    finally:
        pool.close()


def sample_steps(job: TrainJob, pool: RewardPool, *, stage: str) -> VllmEngine:
    """Rollouts of `rl.num_steps` steps in the folder of `stage`; the engine that made them.

    Errors as in `rollouts_loop`.
    """
    run, settings = job.config, job.config.rl
    device = start_worker(run.cluster)
    stage_dir = job.run_dir / stage
    chat = ChatTokenizer(job.model)
    # As in `rl`, so that the same weights sample the same tokens.
    engine = open_engine(rl_engine_spec(run, job.model))
    check_engine(engine, job.model, dtype=run.models.dtype)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    where = {"rank": rank, "world_size": world_size}
    maker = RolloutMaker(settings, chat, engine, pool, seed=run.seed, **where)
    log = MetricsLog(job.run_dir, run=run.name, stage=stage, attempt=job.attempt)
    # Rank 0 looks for all: on a shared mount others may not see its newest file yet.
    done = [set(saved_steps(stage_dir / FOLDER))]
    dist.broadcast_object_list(done)
    for step in range(settings.num_steps):
        if step + 1 in done[0]:
            continue
        laps = Laps(device)
        sampled = maker.sample(step)
        if step == 0:
            check_endings(maker, sampled)
        laps.lap("sample")
        groups = maker.reward(sampled, policy_version=0)
        maker.check_rewards(groups)
        laps.lap("reward")
        save_rollouts(groups, stage_dir / FOLDER, step=step, temperature=settings.temperature)
        laps.lap("save")
        sums = over_ranks(
            rollout_sums(groups) | lap_times(laps) | {"max/stop": float(stop_wished(stage_dir))}
        )
        if rank == 0:
            log.log(rollout_metrics(sums), step=step + 1, num_steps=settings.num_steps)
        if sums["max/stop"]:  # the same on every rank
            break
    return engine
