"""The RL loop of one worker: an FSDP2 shard and a vLLM engine that take turns on one device."""

from typing import Any

import torch
import torch.distributed as dist

from pear_ray.artifacts.rollouts import FOLDER as ROLLOUTS
from pear_ray.distributed.capacity import rl_engine_spec
from pear_ray.distributed.colocation import SharedDevice
from pear_ray.distributed.evaluation import join_evaluation
from pear_ray.distributed.in_process import close_rewards, open_engine, open_rewards
from pear_ray.distributed.rl_ahead import AheadMaker
from pear_ray.distributed.rl_metrics import lag_sums, lap_times, rollout_sums, step_metrics
from pear_ray.distributed.rl_rollouts import RolloutMaker
from pear_ray.distributed.rl_sampling import BatchMaker, sampling_metrics
from pear_ray.distributed.rl_saving import is_saved, save_rollouts
from pear_ray.distributed.rl_self_test import check_start
from pear_ray.distributed.rl_training import RolloutTrainer, over_ranks
from pear_ray.distributed.sft_loop import TrainJob
from pear_ray.distributed.train_worker import Laps, start_worker
from pear_ray.distributed.watchdog import Watchdog
from pear_ray.engines import weights
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.handover.live import check_engine
from pear_ray.telemetry.metrics_log import MetricsLog


def rl_loop(job: dict[str, Any]) -> None:
    """Train to the last step and export; Ray Train calls this on every worker."""
    worker = GrpoWorker(TrainJob(**job))
    try:
        worker.run()
    finally:
        worker.watchdog.close()
        worker.batches.close()
        close_rewards(worker.pool)
        if worker.evaluation:
            worker.evaluation.close()


class GrpoWorker(RolloutTrainer):
    """One rank of the colocated group."""

    def __init__(self, job: TrainJob) -> None:
        run = job.config
        self.config, self.dtype = run.rl, run.models.dtype
        self.stage_dir = job.run_dir / "rl"
        self.pool = open_rewards(self.config.rewards)  # first: its processes start up meanwhile
        self.device = start_worker(run.cluster)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.log = MetricsLog(job.run_dir, run=run.name, stage="rl", attempt=job.attempt)
        self.watchdog = Watchdog(run.cluster, self.stage_dir, rank=self.rank, log=self.log)
        self.chat = ChatTokenizer(job.model)
        # Before the policy: vLLM measures free memory when it sizes its cache.
        self.engine = open_engine(rl_engine_spec(run, job.model))
        check_engine(self.engine, job.model, dtype=run.models.dtype)
        self.engine.sleep()  # until the first weight sync
        self.evaluation = join_evaluation(run, self.chat, self.engine, self.stage_dir)
        super().__init__(job, self.chat, self.log, device=self.device, watchdog=self.watchdog)
        policy = self.trainer.module
        self.canary = weights.canary_batch(policy.causal_lm.config.vocab_size, device=self.device)
        self.max_sync_gap = self.config.max_sync_gap or weights.MAX_GAP[run.models.dtype]
        self.shared = SharedDevice(
            self.config.colocation,
            self.engine,
            self.trainer,
            sender=self.engine.weight_sender(policy),
            reference=self.reference,
            device=self.device,
        )
        self.rollouts = RolloutMaker(
            self.config,
            self.chat,
            self.engine,
            self.pool,
            seed=run.seed,
            rank=self.rank,
            world_size=self.world_size,
        )
        enter = self.watchdog.enter
        self.batches: BatchMaker | AheadMaker = (
            AheadMaker(self.rollouts, enter=enter)
            if self.config.rollouts_ahead
            else BatchMaker(self.rollouts, warn=self._warn, enter=enter)
        )
        self.kept = (self.batches,)

    def begin(self) -> None:
        """See that trainer and engine say the same, before the first step or after a restart."""
        self.publish_weights()
        before = check_start(self, dtype=self.dtype)  # also where a restart put it elsewhere
        if self.config.rollouts_ahead and self.config.mismatch_correction.level == "off":
            self._warn(
                "rl.rollouts_ahead=1 trains on rollouts of an older policy, and with "
                "rl.mismatch_correction.level=off nothing makes up for that"
            )
        if self.trainer.step_count == 0:
            before |= self._pass_at_k(0)
            if self.rank == 0:
                self.log.log(before, step=0, num_steps=self.config.num_steps)

    def before_export(self) -> None:
        """The export asks the policy for log-probs and gathers it: its weights must be there."""
        self.shared.to_trainer()

    def look_at(self, metrics: dict[str, float], *, step: int) -> None:
        """Warn of a gap between sampler and trainer, in every step that has one.

        Of rollouts that lag behind the gap is what was learnt since.
        """
        if metrics.get("rl/policy_lag"):
            return
        if metrics["rl/mismatch/mean_gap"] > self.config.mismatch_alert:
            self._warn(
                f"step {step + 1}: sampler and trainer log-probs differ by "
                f"{metrics['rl/mismatch/mean_gap']:.3g} nats per token on average "
                f"(alert above {self.config.mismatch_alert:g})"
            )

    def _warn(self, message: str) -> None:
        if self.rank == 0:
            self.log.event("warning", message)

    def _pass_at_k(self, step: int) -> dict[str, float]:
        """What the evaluate stage would say of the weights, where the config wants it now."""
        if self.evaluation and self.evaluation.is_due(step, num_steps=self.config.num_steps):
            self.watchdog.enter("evaluate")
            return self.evaluation.of_engine()  # it has been given the step's weights
        return {}

    def step(self, step: int) -> dict[str, float]:
        """Sample, reward, train, sync, evaluate; the metrics of all ranks together.

        Raises:
            RewardError: Too large a share of the rewards could not be computed.
            WeightSyncError: The engine does not hold the new weights.
        """
        laps = Laps(self.device)
        batch = self.batches.make(step, policy_version=self.trainer.step_count, laps=laps)
        self.watchdog.enter("train")
        self.shared.to_trainer()
        laps.lap("wake_trainer")
        lags = lag_sums(batch.groups, self.trainer.step_count) if self.config.rollouts_ahead else {}
        minibatches = self.minibatches(batch.groups)
        trained, result = self.update(minibatches)
        # Of all that was sampled: what dynamic sampling leaves says little of the policy.
        mine = rollout_sums(batch.sampled) | batch.sums | lags | self.wishes.mine()
        laps.lap("train")
        self.watchdog.enter("sync")
        gap = self.publish_weights()
        laps.lap("sync")
        self.watchdog.enter("save")
        if is_saved(step, self.config):
            save_rollouts(
                batch.groups,
                self.stage_dir / ROLLOUTS,
                step=step,
                temperature=self.config.temperature,
                minibatches=minibatches,
            )
            laps.lap("save")
        sums = over_ranks(mine | lap_times(laps))
        self.wishes.agree(sums)
        metrics = step_metrics(trained | sums) | sampling_metrics(sums)
        metrics |= {"rl/sync_gap": gap, "rl/learning_rate": result.learning_rate}
        return metrics | self._pass_at_k(step + 1)

    def publish_weights(self) -> float:
        """Put the trainer's weights into this rank's engine; compare on the canary (a collective).

        Raises:
            WeightSyncError: Some rank's engine answers otherwise than the trainer; all raise.
        """
        differing, mine = self.shared.to_engine(self.canary)
        found = torch.zeros(self.world_size, 2, dtype=torch.float64)
        found[self.rank] = torch.tensor([mine, len(differing)])
        if self.world_size > 1:
            dist.all_reduce(found)
        names: list[Any] = [()] * self.world_size
        if found[:, 1].any():  # seldom: the names themselves are a slower collective
            dist.all_gather_object(names, differing)
        for rank, gap in enumerate(found[:, 0].tolist()):
            where = f"step {self.trainer.step_count}, rank {rank}"
            weights.check_held(names[rank], where=where)
            weights.check_gap(gap, max_gap=self.max_sync_gap, where=where)
        return float(found[:, 0].max())
