"""Training on rollouts, wherever they come from: microbatches, advantages, optimizer steps."""

import abc
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pear_ray.algorithms import weight_health
from pear_ray.config.run import RunConfig
from pear_ray.distributed.colocation import optimizer_rests_on
from pear_ray.distributed.draining import Wishes
from pear_ray.distributed.rl_advantages import ALIGNED, Microbatch, give_advantages, rollout_row
from pear_ray.distributed.rl_terms import denominator_of, microbatch_terms
from pear_ray.distributed.sft_loop import TrainJob
from pear_ray.distributed.train_group import MODEL
from pear_ray.distributed.train_worker import Resumable, commit, export, restore
from pear_ray.distributed.watchdog import Watchdog
from pear_ray.engines.backends import prepared
from pear_ray.engines.batches import (
    Row,
    TokenBatch,
    collate,
    plan_group_microbatches,
    plan_microbatches,
)
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.compiling import compile_layers
from pear_ray.engines.handover.live import check_reload
from pear_ray.engines.native_trainer import NativeTrainer
from pear_ray.engines.policy import Policy, load_policy, shard
from pear_ray.engines.trainer import StepResult, gather_over_ranks
from pear_ray.records import RolloutGroup
from pear_ray.telemetry.metrics_log import MetricsLog


class RolloutTrainer(abc.ABC):
    """One rank of what trains the policy of `job` on rollouts; a subclass gets them.

    Attributes:
        stage_dir: The stage's folder; the subclass names it.
        trainer: The policy with its optimizer.
        reference: The policy that RL starts from, frozen, where a KL is wanted; none with adapters,
            without which the policy is that.
        kept: What a checkpoint holds beside the trainer.
        wishes: Whether to end at a checkpoint after the step, or to save since a machine goes.
    """

    stage_dir: Path

    def __init__(
        self,
        job: TrainJob,
        chat: ChatTokenizer,
        log: MetricsLog,
        *,
        device: torch.device,
        watchdog: Watchdog,
    ) -> None:
        run = job.config
        self.log, self.watchdog = log, watchdog
        self.wishes = Wishes(self.stage_dir)
        self.kept: Sequence[Resumable] = ()
        self.config, self.chat, self.device = run.rl, chat, device
        policy = load_policy(job.model)
        check_reload(policy, job.model, dtype=run.models.dtype)
        where = run.cluster.device
        policy = prepared(policy, self.config, base=job.model, device=where, seed=run.seed)
        policy = shard(policy, device=where, dtype=run.models.dtype)
        self.reference = _reference(job, run)
        updates = self.config.num_steps * self.config.updates_per_batch
        self.trainer = NativeTrainer(
            policy,
            self.config.optimizer,
            num_steps=updates,
            state_rests_on=optimizer_rests_on(self.config.colocation, device),
        )

    def run(self) -> None:
        """All steps from the last checkpoint on, then the export; or until the run is to stop."""
        restore(self.trainer, *self.kept)
        self.begin()
        num_steps = self.config.num_steps
        # Checkpoints are made between rollout batches only.
        done = self.trainer.step_count // self.config.updates_per_batch
        for step in range(done, num_steps):
            metrics = self.step(step)
            if dist.get_rank() == 0:
                self.log.log(metrics, step=step + 1, num_steps=num_steps)
                self.look_at(metrics, step=step)
            last = step + 1 == num_steps
            if (step + 1) % self.config.checkpoint_every == 0 or last or self.wishes.save:
                self.watchdog.enter("checkpoint")
                commit(self.trainer, *self.kept)
            if self.wishes.stop and not last:
                return
            self.wishes.end_step(is_last=last)
        self.watchdog.enter("export")
        self.before_export()
        export(self.trainer, self.chat, self.stage_dir / MODEL)

    @abc.abstractmethod
    def begin(self) -> None:
        """What is done before the first step, or after a restart."""

    @abc.abstractmethod
    def before_export(self) -> None:
        """Give the trainer its device back, if something else has it."""

    @abc.abstractmethod
    def step(self, step: int) -> dict[str, float]:
        """Train on the rollouts of a step, counted from 0; the metrics of all ranks together.

        All ranks agree on their wishes in it.
        """

    @abc.abstractmethod
    def look_at(self, metrics: dict[str, float], *, step: int) -> None:
        """Warn of what the metrics of a step, counted from 0, show (rank 0)."""

    def train(self, groups: Sequence[RolloutGroup]) -> tuple[dict[str, float], StepResult]:
        """`updates_per_batch` optimizer steps on the rollouts of all ranks (a collective).

        Returns:
            The sums of all ranks and updates, and the last update's result.
        """
        return self.update(self.minibatches(groups))

    def update(
        self, minibatches: Sequence[list[Microbatch]]
    ) -> tuple[dict[str, float], StepResult]:
        """An optimizer step on each of `minibatches` (a collective); what `train` returns.

        Their batches have `proximal_logprobs` afterwards, whether or not the loss wanted them.
        """
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
        most = over_ranks(counts)  # a rank that runs out still takes part in the others' passes
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
        limit["hidden_size"] = self.trainer.module.hidden_size
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
            if kl.is_wanted:
                aligned["reference_logprobs"] = self._reference_logprobs(each.batch)

    def _reference_logprobs(self, batch: TokenBatch) -> torch.Tensor:
        """Of the policy that RL starts from, [token]."""
        temperature = self.config.temperature
        if self.reference is not None:
            return self.reference(batch, temperature=temperature)
        # An extra that an install need not have, and seconds to import.
        from pear_ray.engines.lora import left_out  # noqa: PLC0415

        with left_out(self.trainer.module):
            return self.trainer.policy(batch, temperature=temperature)

    def _update(self, microbatches: Sequence[Microbatch]) -> tuple[dict[str, float], StepResult]:
        """One optimizer step; the sums of all ranks."""
        sums: dict[str, float] = {}
        wants_entropy = self.config.entropy_coefficient > 0
        for each in microbatches:
            self.watchdog.enter("train")
            with self.trainer.microbatch(last=each is microbatches[-1]):
                found = self.trainer.policy(
                    each.batch, temperature=self.config.temperature, exact_entropy=wants_entropy
                )
                outputs = found if isinstance(found, dict) else {"logprobs": found}
                terms = microbatch_terms(outputs, each.batch, self.config)
                self.trainer.backward(terms.numerator)
            sums = weight_health.merge(sums, terms.sums)
            each.batch.aligned.setdefault("proximal_logprobs", outputs["logprobs"].detach())
        sums = over_ranks(sums)
        denominator = denominator_of(sums, self.config)
        result = self.trainer.step(denominator)
        loss = sums["numerator"] / denominator
        return sums | {"updates": 1.0, "loss": loss, "grad_norm": result.grad_norm}, result


def _reference(job: TrainJob, run: RunConfig) -> Policy | None:
    """The policy that RL starts from, frozen, where a KL is wanted; also after a restart.

    A policy with adapters has it inside.
    """
    if not run.rl.kl.is_wanted or run.rl.lora is not None:
        return None
    frozen = load_policy(job.model).requires_grad_(requires_grad=False)
    if run.rl.compile:
        compile_layers(frozen, device=run.cluster.device)
    return shard(frozen, device=run.cluster.device, dtype=run.models.dtype)


def over_ranks(sums: dict[str, float]) -> dict[str, float]:
    """The sums of all ranks (a collective)."""
    return functools.reduce(weight_health.merge, gather_over_ranks(sums))
