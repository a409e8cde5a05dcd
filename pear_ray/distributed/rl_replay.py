"""`pear rl --train-only`: the training of RL on rollouts that are there, without an engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pear_ray.artifacts.rollouts import FOLDER, read_groups
from pear_ray.distributed.loops import REPLAY_STAGE
from pear_ray.distributed.rl_metrics import lag_sums, lap_times, rollout_sums, step_metrics
from pear_ray.distributed.rl_saving import is_saved, save_rollouts
from pear_ray.distributed.rl_training import RolloutTrainer, over_ranks
from pear_ray.distributed.sft_loop import TrainJob
from pear_ray.distributed.train_worker import Laps, start_worker
from pear_ray.distributed.watchdog import Watchdog
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.telemetry.metrics_log import MetricsLog


def replay_loop(job: dict[str, Any]) -> None:
    """Train to the last step and export; Ray Train calls this on every worker.

    `job` has, beside the fields of `TrainJob`, the `files` of the steps' rollouts in order.
    """
    told = {name: value for name, value in job.items() if name != "files"}
    worker = ReplayWorker(TrainJob(**told), job["files"])
    with worker.watchdog:
        worker.run()


class ReplayWorker(RolloutTrainer):
    """One rank of a group that trains on saved rollouts."""

    def __init__(self, job: TrainJob, files: Sequence[Path]) -> None:
        run = job.config
        device = start_worker(run.cluster)
        self.files, self._has_warned = files, False
        self.stage_dir = job.run_dir / REPLAY_STAGE
        log = MetricsLog(job.run_dir, run=run.name, stage=REPLAY_STAGE, attempt=job.attempt)
        watchdog = Watchdog(run.cluster, self.stage_dir, rank=dist.get_rank(), log=log)
        super().__init__(job, ChatTokenizer(job.model), log, device=device, watchdog=watchdog)

    def begin(self) -> None:
        """Nothing: there is no engine."""

    def before_export(self) -> None:
        """Nothing: the trainer has its device to itself."""

    def look_at(self, metrics: dict[str, float], *, step: int) -> None:
        """Warn of the first step whose rollouts do not fit the policy."""
        if not self._has_warned and (warning := self.warning(metrics)):
            self.log.event("warning", f"step {step + 1}: {warning}")
            self._has_warned = True

    def step(self, step: int) -> dict[str, float]:
        """Train on the step's file; the metrics of all ranks together."""
        laps = Laps(self.device)
        self.watchdog.enter("read")
        rank, world_size = dist.get_rank(), dist.get_world_size()
        groups = read_groups(self.files[step])[rank::world_size]  # dealt as when they were sampled
        lags = lag_sums(groups, self.trainer.step_count)
        laps.lap("read")
        minibatches = self.minibatches(groups)
        trained, result = self.update(minibatches)
        mine = rollout_sums(groups) | lags | self.wishes.mine()
        laps.lap("train")
        self.watchdog.enter("save")
        if is_saved(step, self.config):
            save_rollouts(
                groups,
                self.stage_dir / FOLDER,
                step=step,
                temperature=self.config.temperature,
                minibatches=minibatches,
            )
            laps.lap("save")
        sums = over_ranks(mine | lap_times(laps))
        self.wishes.agree(sums)
        return step_metrics(trained | sums) | {"rl/learning_rate": result.learning_rate}

    def warning(self, metrics: dict[str, float]) -> str:
        """What is wrong with training on these rollouts, or nothing."""
        lag, gap = metrics["rl/policy_lag"], metrics["rl/mismatch/mean_gap"]
        if lag:
            correction = self.config.mismatch_correction
            return (
                f"the rollouts have a policy lag of {lag:g} optimizer step(s): from here on "
                f"training is off-policy (rl.mismatch_correction.level={correction.level}); "
                f"rl/policy_lag and rl/mismatch/mean_gap ({gap:.3g} nats here) say how far"
            )
        if gap > self.config.mismatch_alert:
            return (
                f"the rollouts' log-probs differ by {gap:.3g} nats per token on average from those "
                f"of the same policy version here (alert above {self.config.mismatch_alert:g}): "
                "they may be of other weights"
            )
        return ""
