"""The GRPO loop of one worker: an FSDP2 shard and a vLLM engine that take turns on one device."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pear_ray.algorithms import advantages, mismatch, weight_health
from pear_ray.algorithms.policy_losses import clipped_surrogate
from pear_ray.algorithms.reduce import loss_numerator
from pear_ray.distributed.capacity import engine_spec
from pear_ray.distributed.evaluation import join_evaluation
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
from pear_ray.engines.batches import Row, collate, plan_microbatches
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.native_trainer import NativeTrainer
from pear_ray.engines.policy import load_policy, shard
from pear_ray.engines.trainer import StepResult, gather_over_ranks
from pear_ray.engines.vllm.engine import VllmEngine
from pear_ray.engines.vllm.spec import Sampling
from pear_ray.errors import RewardError
from pear_ray.records import (
    Completion,
    FinishReason,
    Problem,
    RewardStatus,
    Rollout,
    RolloutGroup,
)
from pear_ray.tasks.games import make_problems
from pear_ray.tasks.reward_pool import RewardPool
from pear_ray.telemetry.metrics_log import MetricsLog

ALIGNED = ("behavior_logprobs", "advantages")


@dataclass(frozen=True, slots=True)
class Sampled:
    """The completions of one problem, before they are rewarded."""

    problem: Problem
    prompt_ids: list[int]
    completions: list[Completion]


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
        self.config, self.seed = run.rl, run.seed
        self.stage_dir = job.run_dir / "rl"
        self.pool = RewardPool(self.config.rewards)  # first: its processes start up meanwhile
        self.device = start_worker(run.cluster)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.chat = ChatTokenizer(job.model)
        # Before the policy: vLLM measures free memory when it sizes its cache.
        self.engine = VllmEngine(
            engine_spec(run, job.model, seed=self.seed),
            takes_weights=True,
        )
        self.evaluation = join_evaluation(run, self.chat, self.engine, self.stage_dir)
        policy = shard(load_policy(job.model), device=run.cluster.device, dtype=run.models.dtype)
        self.canary = weights.canary_batch(policy.causal_lm.config.vocab_size, device=self.device)
        self.max_sync_gap = self.config.max_sync_gap or weights.MAX_GAP[run.models.dtype]
        self.sender = self.engine.weight_sender(policy)
        self.stop = False
        self.trainer = NativeTrainer(policy, self.config.optimizer, num_steps=self.config.num_steps)
        self.problems = make_problems(self.config.problems)
        self.log = MetricsLog(job.run_dir, run=run.name, stage="rl", attempt=job.attempt)

    def run(self) -> None:
        """All steps from the last checkpoint on, then the export; or until the run is to stop."""
        restore(self.trainer)
        self.publish_weights()
        if self.trainer.step_count == 0 and (before := self._pass_at_k(0)) and self.rank == 0:
            self.log.log(before, step=0, num_steps=self.config.num_steps)
        for step in range(self.trainer.step_count, self.config.num_steps):
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
        """Sample, reward, train once, sync; the metrics of all ranks together.

        Raises:
            RewardError: Too large a share of the rewards could not be computed.
            WeightSyncError: The engine does not hold the new weights.
        """
        laps = Laps()
        problems = self._my_problems(step)
        sampled = self._sample(step, problems)
        laps.lap("sample")
        groups = self._reward(sampled)
        self._check_rewards(groups)
        laps.lap("reward")
        sums, result = self._train(groups)
        sums["max/stop"] = float(stop_wished(self.stage_dir))
        laps.lap("train")
        gap = self.publish_weights()
        laps.lap("sync")
        sums = functools.reduce(
            weight_health.merge, gather_over_ranks(sums | _rollout_sums(groups) | _times(laps))
        )
        self.stop = bool(sums["max/stop"])  # the same on every rank
        return _metrics(sums) | {
            "rl/sync_gap": gap,
            "rl/grad_norm": result.grad_norm,
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

    def _my_problems(self, step: int) -> list[tuple[int, Problem]]:
        """This rank's problems of the step, each with its place in the endless seeded order."""
        begin = step * self.config.prompts_per_step
        places = range(begin, begin + self.config.prompts_per_step)[self.rank :: self.world_size]
        return [(place, self.problems[self._order(place)]) for place in places]

    def _order(self, place: int) -> int:
        epoch, index = divmod(place, len(self.problems))
        return _permutation(len(self.problems), self.seed * 1_000_003 + epoch)[index]

    def _sample(self, step: int, problems: Sequence[tuple[int, Problem]]) -> list[Sampled]:
        """`group_size` completions of each problem."""
        prompts = [self.chat.prompt_ids(problem.question) for _, problem in problems]
        sampling = [
            Sampling(
                num_samples=self.config.group_size,
                temperature=self.config.temperature,
                max_tokens=self.config.max_tokens,
                # Keyed by place, not by rank or batch: a resumed or resharded run samples alike.
                seed=_seed(self.seed, step, place),
            )
            for place, _ in problems
        ]
        completions = self.engine.generate(prompts, sampling)
        return [
            Sampled(problem, prompt, group)
            for (_, problem), prompt, group in zip(problems, prompts, completions, strict=True)
        ]

    def _reward(self, sampled: Sequence[Sampled]) -> list[RolloutGroup]:
        """The completions with their rewards, one group per problem."""
        pairs = [(each.problem, one.text) for each in sampled for one in each.completions]
        rewards = iter(self.pool.verify_all(pairs))
        return [
            RolloutGroup(
                [
                    Rollout(
                        problem=each.problem,
                        prompt_ids=each.prompt_ids,
                        completion=completion,
                        policy_version=self.trainer.step_count,
                        reward=next(rewards),
                    )
                    for completion in each.completions
                ]
            )
            for each in sampled
        ]

    def _check_rewards(self, groups: Sequence[RolloutGroup]) -> None:
        mine = [one for group in groups for one in group.rollouts]
        gathered = gather_over_ranks(
            {"rollouts": len(mine), "errored": sum(map(_is_errored, mine))}
        )
        errored = sum(each["errored"] for each in gathered)
        total = sum(each["rollouts"] for each in gathered)
        if errored > self.config.rewards.max_errored_fraction * total:
            detail = next(
                (one.reward.detail for one in mine if _is_errored(one)), "on another rank"
            )
            raise RewardError(
                f"{errored:g} of {total:g} rewards of this step could not be computed "
                f"(rl.rewards.max_errored_fraction={self.config.rewards.max_errored_fraction:g}); "
                f"the first: {detail}"
            )

    def _train(self, groups: Sequence[RolloutGroup]) -> tuple[dict[str, float], StepResult]:
        """One optimizer step on the rollouts of all ranks; this rank's sums."""
        rows = self._rows(groups)
        loss_tokens = sum(sum(row.loss_mask) for row in rows)
        batches = plan_microbatches(
            [len(row.token_ids) for row in rows],
            max_tokens=self.config.microbatch_tokens,
            device=self.device,
            packs=self.trainer.module.packs,
        )
        shares = gather_over_ranks({"tokens": loss_tokens, "batches": len(batches)})
        sums: dict[str, float] = {}
        for number in range(max(int(share["batches"]) for share in shares)):
            chosen = [rows[index] for index in batches[number]] if number < len(batches) else []
            sums = weight_health.merge(sums, self._microbatch(chosen))
        # Token mean over the whole step (DAPO, arXiv 2503.14476): long completions keep their
        # weight.
        result = self.trainer.step(sum(share["tokens"] for share in shares))
        return sums, result

    def _microbatch(self, rows: Sequence[Row]) -> dict[str, float]:
        """Forward and backward of one microbatch; its sums."""
        batch = collate(rows, pad_id=self.chat.pad_id, names=ALIGNED, device=self.device)
        logprobs = self.trainer.policy(batch, temperature=self.config.temperature)
        behavior = batch.aligned["behavior_logprobs"]
        surrogate = clipped_surrogate(
            logprobs,
            behavior,
            batch.aligned["advantages"],
            batch.loss_mask,
            clip_low=self.config.clip_low,
            clip_high=self.config.clip_high,
        )
        numerator = loss_numerator(
            surrogate.losses,
            torch.ones_like(behavior),
            batch.sequence_ids,
            batch.loss_mask,
            reduction="token_mean",
        )
        self.trainer.backward(numerator)
        return mismatch.mismatch_sums(logprobs.detach(), behavior, batch.loss_mask) | {
            "loss": float(numerator.detach()),
            "clipped": float(surrogate.clipped.sum()),
            "max/ratio": float(surrogate.ratios.max()) if rows else 0.0,
        }

    def _rows(self, groups: Sequence[RolloutGroup]) -> list[Row]:
        """Rollouts as rows to train on, with their advantages; errored ones get none."""
        rollouts = [(number, one) for number, group in enumerate(groups) for one in group.rollouts]
        estimate = {
            "grpo": advantages.grpo_advantages,
            "mean_baseline": advantages.mean_baseline_advantages,
        }[self.config.advantage]
        estimated = estimate(*_reward_tensors(groups))
        return [
            _row(rollout, advantage)
            for (_, rollout), advantage in zip(rollouts, estimated.tolist(), strict=True)
        ]


def _row(rollout: Rollout, advantage: float) -> Row:
    num_prompt, completion = len(rollout.prompt_ids), rollout.completion
    num_tokens = len(completion.token_ids)
    return Row(
        token_ids=[*rollout.prompt_ids, *completion.token_ids],
        loss_mask=[False] * num_prompt + [True] * num_tokens,
        aligned={
            "behavior_logprobs": [0.0] * num_prompt + completion.behavior_logprobs,
            "advantages": [0.0] * num_prompt + [advantage] * num_tokens,
        },
    )


def _reward_tensors(
    groups: Sequence[RolloutGroup],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards, group of each, and whether it is a verdict at all: [row] each."""
    rows = [(one, number) for number, group in enumerate(groups) for one in group.rollouts]
    return (
        torch.tensor([one.reward.value for one, _ in rows], dtype=torch.float32),
        torch.tensor([number for _, number in rows]),
        torch.tensor([not _is_errored(one) for one, _ in rows]),
    )


def _rollout_sums(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """What the step's metrics need of this rank's rollouts."""
    rollouts = [one for group in groups for one in group.rollouts]
    judged = [one for one in rollouts if not _is_errored(one)]
    completions = [one.completion for one in rollouts]
    return {
        "rollouts": len(rollouts),
        "judged": len(judged),
        "reward": sum(one.reward.value for one in judged),
        "completion_tokens": sum(len(each.token_ids) for each in completions),
        "truncated": sum(each.finish_reason is FinishReason.LENGTH for each in completions),
        "surprise": -sum(sum(each.behavior_logprobs) for each in completions),
        "groups": len(groups),
        "degenerate": advantages.degenerate_group_fraction(*_reward_tensors(groups)) * len(groups),
    }


def _times(laps: Laps) -> dict[str, float]:
    """The slowest rank's time counts: the others wait for it."""
    return {f"max/time/{phase}_s": seconds for phase, seconds in laps.seconds.items()}


def _metrics(sums: dict[str, float]) -> dict[str, float]:
    """The step's metrics from the sums of all ranks."""
    tokens, rollouts = sums["completion_tokens"], sums["rollouts"]
    times = {key.removeprefix("max/"): value for key, value in sums.items() if "max/time/" in key}
    step_s = sum(times.values())
    gaps = mismatch.finalise_mismatch(sums)
    return {
        "rl/reward/mean": sums["reward"] / max(1.0, sums["judged"]),
        "rl/errored_fraction": 1 - sums["judged"] / rollouts,
        "rl/completion_length/mean": tokens / rollouts,
        "rl/truncated_fraction": sums["truncated"] / rollouts,
        # The mean surprise of sampled tokens estimates the policy's entropy without bias.
        "rl/entropy": sums["surprise"] / tokens,
        "rl/degenerate_group_fraction": sums["degenerate"] / sums["groups"],
        "rl/loss": sums["loss"] / tokens,
        "rl/clip_fraction": sums["clipped"] / tokens,
        "rl/ratio/max": sums["max/ratio"],
        "rl/mismatch/mean_gap": gaps["abs_gap/mean"],
        "rl/mismatch/max_gap": gaps["abs_gap/max"],
        "rl/mismatch/ess_fraction": gaps["ess_fraction"],
        "rl/mismatch_kl": gaps["mismatch_kl_k3"],
        "rl/tokens_per_s": tokens / step_s,
        **times,
        "time/step_s": step_s,
    }


def _is_errored(rollout: Rollout) -> bool:
    return rollout.reward.status is RewardStatus.ERRORED


@functools.lru_cache(maxsize=2)
def _permutation(size: int, seed: int) -> list[int]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


def _seed(*parts: int) -> int:
    """A sampler seed that no other step or place shares, inside the range that vLLM takes."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
