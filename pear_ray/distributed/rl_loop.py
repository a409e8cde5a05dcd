"""The RL loop of one worker: an FSDP2 shard and a vLLM engine that take turns on one device."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from pear_ray.algorithms import weight_health
from pear_ray.config.run import RunConfig
from pear_ray.distributed.capacity import engine_spec
from pear_ray.distributed.evaluation import join_evaluation
from pear_ray.distributed.rl_advantages import ALIGNED, Microbatch, give_advantages, rollout_row
from pear_ray.distributed.rl_metrics import lap_times, rollout_sums, step_metrics
from pear_ray.distributed.rl_rollouts import RolloutMaker
from pear_ray.distributed.rl_terms import denominator_of, microbatch_terms
from pear_ray.distributed.sft_loop import TrainJob
from pear_ray.distributed.train_group import (
    MODEL,
    Laps,
    commit,
    export,
    restore,
    start_worker,
    stop_wished,
)
from pear_ray.engines import weights
from pear_ray.engines.batches import (
    Row,
    TokenBatch,
    collate,
    plan_group_microbatches,
    plan_microbatches,
)
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.native_trainer import NativeTrainer
from pear_ray.engines.policy import Policy, load_policy, shard
from pear_ray.engines.trainer import StepResult, gather_over_ranks
from pear_ray.engines.vllm.engine import VllmEngine
from pear_ray.records import RolloutGroup
from pear_ray.tasks.reward_pool import RewardPool
from pear_ray.telemetry.metrics_log import MetricsLog


def rl_loop(job: dict[str, Any]) -> None:
    """Train to the last step and export; Ray Train calls this on every worker."""
    worker = GrpoWorker(TrainJob(**job))
    try:
        worker.run()
    finally:
        worker.pool.close()
        if worker.evaluation:
            worker.evaluation.close()


class GrpoWorker:
    """One rank of the colocated group."""

    def __init__(self, job: TrainJob) -> None:
        run = job.config
        self.config = run.rl
        self.stage_dir = job.run_dir / "rl"
        self.pool = RewardPool(self.config.rewards)  # first: its processes start up meanwhile
        self.device = start_worker(run.cluster)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.chat = ChatTokenizer(job.model)
        # Before the policy: vLLM measures free memory when it sizes its cache.
        self.engine = VllmEngine(
            engine_spec(run, job.model, seed=run.seed),
            takes_weights=True,
        )
        self.evaluation = join_evaluation(run, self.chat, self.engine, self.stage_dir)
        policy = shard(load_policy(job.model), device=run.cluster.device, dtype=run.models.dtype)
        self.reference = _reference(job, run)
        self.canary = weights.canary_batch(policy.causal_lm.config.vocab_size, device=self.device)
        self.max_sync_gap = self.config.max_sync_gap or weights.MAX_GAP[run.models.dtype]
        self.sender = self.engine.weight_sender(policy)
        self.stop = False
        updates = self.config.num_steps * self.config.updates_per_batch
        self.trainer = NativeTrainer(policy, self.config.optimizer, num_steps=updates)
        self.rollouts = RolloutMaker(
            self.config,
            self.chat,
            self.engine,
            self.pool,
            seed=run.seed,
            rank=self.rank,
            world_size=self.world_size,
        )
        self.log = MetricsLog(job.run_dir, run=run.name, stage="rl", attempt=job.attempt)

    def run(self) -> None:
        """All steps from the last checkpoint on, then the export; or until the run is to stop."""
        restore(self.trainer)
        self.publish_weights()
        if self.trainer.step_count == 0 and (before := self._pass_at_k(0)) and self.rank == 0:
            self.log.log(before, step=0, num_steps=self.config.num_steps)
        # Checkpoints are made between rollout batches only.
        done = self.trainer.step_count // self.config.updates_per_batch
        for step in range(done, self.config.num_steps):
            metrics = self.step(step) | self._pass_at_k(step + 1)
            if self.rank == 0:
                self.log.log(metrics, step=step + 1, num_steps=self.config.num_steps)
                if metrics["rl/mismatch/mean_gap"] > self.config.mismatch_alert:
                    self.log.event(
                        "warning",
                        f"step {step + 1}: sampler and trainer log-probs differ by "
                        f"{metrics['rl/mismatch/mean_gap']:.3g} nats per token on average "
                        f"(alert above {self.config.mismatch_alert:g})",
                    )
            last = step + 1 == self.config.num_steps
            if (step + 1) % self.config.checkpoint_every == 0 or last or self.stop:
                commit(self.trainer)
            if self.stop and not last:
                return
        export(self.trainer, self.chat, self.stage_dir / MODEL)

    def _pass_at_k(self, step: int) -> dict[str, float]:
        """What the evaluate stage would say of the weights, where the config wants it now."""
        if self.evaluation and self.evaluation.is_due(step, num_steps=self.config.num_steps):
            return self.evaluation.of_engine()  # it has been given the step's weights
        return {}

    def step(self, step: int) -> dict[str, float]:
        """Sample, reward, train, sync; the metrics of all ranks together.

        Raises:
            RewardError: Too large a share of the rewards could not be computed.
            WeightSyncError: The engine does not hold the new weights.
        """
        laps = Laps()
        sampled = self.rollouts.sample(step)
        laps.lap("sample")
        groups = self.rollouts.reward(sampled, policy_version=self.trainer.step_count)
        self.rollouts.check_rewards(groups)
        laps.lap("reward")
        trained, result = self.train(groups)
        mine = rollout_sums(groups) | {"max/stop": float(stop_wished(self.stage_dir))}
        laps.lap("train")
        gap = self.publish_weights()
        laps.lap("sync")
        sums = _over_ranks(mine | lap_times(laps))
        self.stop = bool(sums["max/stop"])  # the same on every rank
        return step_metrics(trained | sums) | {
            "rl/sync_gap": gap,
            "rl/learning_rate": result.learning_rate,
        }

    def publish_weights(self) -> float:
        """Put the trainer's weights into this rank's engine; compare on the canary (a collective).

        Raises:
            WeightSyncError: Some rank's engine answers otherwise than the trainer; all raise.
        """
        self.sender.publish_weights()
        mine = weights.canary_gap(self.engine, self.trainer.module, self.canary)
        gaps = torch.zeros(self.world_size, dtype=torch.float64)
        gaps[self.rank] = mine
        dist.all_reduce(gaps)
        for rank, gap in enumerate(gaps.tolist()):
            where = f"step {self.trainer.step_count}, rank {rank}"
            weights.check_gap(gap, max_gap=self.max_sync_gap, where=where)
        return float(gaps.max())

    def train(self, groups: Sequence[RolloutGroup]) -> tuple[dict[str, float], StepResult]:
        """`updates_per_batch` optimizer steps on the rollouts of all ranks (a collective).

        Returns:
            The sums of all ranks and updates, and the last update's result.
        """
        minibatches = self.minibatches(groups)
        sums, result = self._update(minibatches[0])
        for minibatch in minibatches[1:]:
            more, result = self._update(minibatch)
            sums = weight_health.merge(sums, more)
        return sums, result

    def minibatches(self, groups: Sequence[RolloutGroup]) -> list[list[Microbatch]]:
        """For each update its microbatches, with all that is known before the first (a collective).

        An update's groups follow each other in the step's order, so that the number of ranks does
        not decide which groups train together.
        """
        size = len(groups) // self.config.updates_per_batch
        masked = self.config.overlong.mask_truncated
        rows = [rollout_row(one, mask_truncated=masked) for each in groups for one in each.rollouts]
        per_update = size * self.config.group_size
        plans = [
            [[begin + place for place in places] for places in self._plan(rows, begin, per_update)]
            for begin in range(0, len(rows), per_update)
        ]
        counts = {f"max/{number}": float(len(plan)) for number, plan in enumerate(plans)}
        most = _over_ranks(counts)  # a rank that runs out still takes part in the others' passes
        minibatches = []
        for number, plan in enumerate(plans):
            padded = plan + [[] for _ in range(int(most[f"max/{number}"]) - len(plan))]
            minibatches.append([Microbatch(each, self._collate(rows, each)) for each in padded])
        together = [each for minibatch in minibatches for each in minibatch]
        self._freeze_logprobs(together)
        give_advantages(together, groups, self.config)
        return minibatches

    def _plan(self, rows: Sequence[Row], begin: int, count: int) -> list[list[int]]:
        chosen = rows[begin : begin + count]
        lengths = [len(row.token_ids) for row in chosen]
        limit: dict[str, Any] = {
            "max_tokens": self.config.microbatch_tokens,
            "device": self.device,
        }
        if not self.trainer.module.packs:
            return plan_microbatches(lengths, packs=False, **limit)
        prompts = [row.loss_mask.count(False) for row in chosen]
        size = self.config.group_size
        return plan_group_microbatches(lengths, prompts, group_size=size, **limit)

    def _collate(self, rows: Sequence[Row], places: Sequence[int]) -> TokenBatch:
        return collate(
            [rows[place] for place in places],
            pad_id=self.chat.pad_id,
            names=ALIGNED,
            device=self.device,
            shares_prompts=self.trainer.module.packs,
        )

    @torch.no_grad()
    def _freeze_logprobs(self, microbatches: Sequence[Microbatch]) -> None:
        """Put the log-probs of proximal and reference policy beside the tokens, where needed."""
        kl = self.config.kl
        in_reward = kl.coefficient > 0 and kl.placement == "reward"
        temperature = self.config.temperature
        for each in microbatches:
            aligned = each.batch.aligned
            if self.config.updates_per_batch > 1 or in_reward:
                aligned["proximal_logprobs"] = self.trainer.policy(
                    each.batch, temperature=temperature
                )
            if self.reference is not None:
                aligned["reference_logprobs"] = self.reference(each.batch, temperature=temperature)

    def _update(self, microbatches: Sequence[Microbatch]) -> tuple[dict[str, float], StepResult]:
        """One optimizer step; the sums of all ranks."""
        sums: dict[str, float] = {}
        wants_entropy = self.config.entropy_coefficient > 0
        for each in microbatches:
            with self.trainer.microbatch(last=each is microbatches[-1]):
                found = self.trainer.policy(
                    each.batch, temperature=self.config.temperature, exact_entropy=wants_entropy
                )
                outputs = found if isinstance(found, dict) else {"logprobs": found}
                terms = microbatch_terms(outputs, each.batch, self.config)
                self.trainer.backward(terms.numerator)
            sums = weight_health.merge(sums, terms.sums)
        sums = _over_ranks(sums)
        denominator = denominator_of(sums, self.config)
        result = self.trainer.step(denominator)
        loss = sums["numerator"] / denominator
        return sums | {"updates": 1.0, "loss": loss, "grad_norm": result.grad_norm}, result


def _reference(job: TrainJob, run: RunConfig) -> Policy | None:
    """The policy that RL starts from, frozen, where a KL is wanted; also after a restart."""
    if not run.rl.kl.coefficient:
        return None
    frozen = load_policy(job.model).requires_grad_(requires_grad=False)
    return shard(frozen, device=run.cluster.device, dtype=run.models.dtype)


def _over_ranks(sums: dict[str, float]) -> dict[str, float]:
    """The sums of all ranks (a collective)."""
    return functools.reduce(weight_health.merge, gather_over_ranks(sums))
