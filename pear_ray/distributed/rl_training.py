"""Training on rollouts, wherever they come from: microbatches, advantages, optimizer steps."""

import abc
import functools
from collections.abc import Sequence
from typing import Any

import torch

from pear_ray.algorithms import weight_health
from pear_ray.config.run import RunConfig
from pear_ray.distributed.rl_advantages import ALIGNED, Microbatch, give_advantages, rollout_row
from pear_ray.distributed.rl_terms import denominator_of, microbatch_terms
from pear_ray.distributed.sft_loop import TrainJob
from pear_ray.distributed.watchdog import Watchdog
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


class RolloutTrainer(abc.ABC):
    """One rank of what trains the policy of `job` on rollouts; a subclass gets them.

    Attributes:
        trainer: The policy with its optimizer.
        reference: The policy that RL starts from, frozen, where a KL is wanted.
    """

    def __init__(
        self, job: TrainJob, chat: ChatTokenizer, *, device: torch.device, watchdog: Watchdog
    ) -> None:
        run = job.config
        self.watchdog = watchdog
        self.config, self.chat, self.device = run.rl, chat, device
        policy = load_policy(job.model)
        check_reload(policy, job.model, dtype=run.models.dtype)
        if run.rl.compile:
            compile_layers(policy, device=run.cluster.device)
        policy = shard(policy, device=run.cluster.device, dtype=run.models.dtype)
        self.reference = _reference(job, run)
        updates = self.config.num_steps * self.config.updates_per_batch
        self.trainer = NativeTrainer(policy, self.config.optimizer, num_steps=updates)

    @abc.abstractmethod
    def step(self, step: int) -> dict[str, float]:
        """Train on the rollouts of a step, counted from 0; the metrics of all ranks together."""

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
    """The policy that RL starts from, frozen, where a KL is wanted; also after a restart."""
    if not run.rl.kl.coefficient:
        return None
    frozen = load_policy(job.model).requires_grad_(requires_grad=False)
    if run.rl.compile:
        compile_layers(frozen, device=run.cluster.device)
    return shard(frozen, device=run.cluster.device, dtype=run.models.dtype)


def over_ranks(sums: dict[str, float]) -> dict[str, float]:
    """The sums of all ranks (a collective)."""
    return functools.reduce(weight_health.merge, gather_over_ranks(sums))
