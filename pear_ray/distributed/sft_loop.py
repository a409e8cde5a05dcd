"""The SFT loop of one worker: weighted sums over microbatches, one step per global batch."""

import functools
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pear_ray.algorithms import weight_health
from pear_ray.algorithms.talr import batch_tau, sequence_mean_losses
from pear_ray.config.run import RunConfig
from pear_ray.config.sections import compute_dtype
from pear_ray.config.sft import SftConfig, UniformWeights, needs_step_weights
from pear_ray.distributed.draining import Wishes
from pear_ray.distributed.equivalence import ROWS_PER_RANK, check_equivalence
from pear_ray.distributed.evaluation import start_evaluation
from pear_ray.distributed.sft_alarms import WeightAlarms, weights_are_absolute
from pear_ray.distributed.sft_controls import control_step, without_step_control
from pear_ray.distributed.sft_metrics import (
    SAMPLED_TOKENS,
    denominator_of,
    is_sampled,
    step_metrics,
    weight_samples,
    write_weight_samples,
)
from pear_ray.distributed.sft_rows import (
    Collator,
    naming_rows,
    num_sft_steps,
    rows_of_step,
    split_heldout,
    training_rows,
    trains_positively,
)
from pear_ray.distributed.sft_sources import Sources
from pear_ray.distributed.sft_terms import microbatch_terms
from pear_ray.distributed.train_group import MODEL
from pear_ray.distributed.train_worker import Laps, commit, export, restore, start_worker
from pear_ray.distributed.watchdog import Watchdog
from pear_ray.engines.backends import make_trainer
from pear_ray.engines.batches import TokenBatch, plan_microbatches
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.model_files import vocab_size
from pear_ray.engines.trainer import gather_over_ranks
from pear_ray.errors import TrainingError
from pear_ray.telemetry.metrics_log import MetricsLog

COMPARED_ROWS = 4  # per rank, whose gradient is compared with that of uniform weights


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """What every worker of a training group is told.

    Attributes:
        config: The run.
        run_dir: The run's folder, which every worker reaches.
        attempt: Number of this attempt at the run.
        model: Folder of the model to start from.
    """

    config: RunConfig
    run_dir: Path
    attempt: int
    model: Path


def sft_loop(job: dict[str, Any]) -> None:
    """Train to the last step and export; Ray Train calls this on every worker."""
    worker = SftWorker(TrainJob(**job))
    try:
        worker.run()
    finally:
        worker.watchdog.close()
        if worker.evaluation:
            worker.evaluation.close()


class SftWorker:
    """One rank of the SFT group."""

    def __init__(self, job: TrainJob) -> None:
        self.config = job.config.sft
        self.seed = job.config.seed
        self.stage_dir = job.run_dir / "sft"
        self.device = start_worker(job.config.cluster)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.log = MetricsLog(job.run_dir, run=job.config.name, stage="sft", attempt=job.attempt)
        self.watchdog = Watchdog(job.config.cluster, self.stage_dir, rank=self.rank, log=self.log)
        self.chat = ChatTokenizer(job.model)
        self.evaluation = start_evaluation(job.config, self.chat, job.model, self.stage_dir)
        self.rows, self.heldout = split_heldout(
            training_rows(self.config, job.run_dir),
            heldout_rows=self.config.heldout_rows,
            seed=self.seed,
        )
        self.sources = Sources(self.rows)
        self.collator = Collator(
            job.config,
            pad_id=self.chat.pad_id,
            vocab_size=vocab_size(job.model),
            device=self.device,
        )
        self.num_steps = num_sft_steps(job.config, num_rows=len(self.rows))
        self.dtype = compute_dtype(job.config.models.dtype, device=job.config.cluster.device)
        self.trainer = make_trainer(
            job.model,
            self.config,
            num_steps=self.num_steps,
            device=job.config.cluster.device,
            dtype=self.dtype,
            seed=self.seed,
        )
        self.wishes = Wishes(self.stage_dir)
        self.alarms = WeightAlarms(
            self.config.alarms, weights_are_absolute=weights_are_absolute(self.config)
        )

    def run(self) -> None:
        """All steps from the last checkpoint on, then the export; or until the run is to stop."""
        if not restore(self.trainer) and self.config.check_equivalence and self.num_steps:
            self._check_equivalence()
        if self.trainer.step_count == 0 and (before := self._pass_at_k(0)) and self.rank == 0:
            self.log.log(before, step=0, num_steps=self.num_steps)
        for step in range(self.trainer.step_count, self.num_steps):
            self.watchdog.enter("train")
            ratio = self.gradient_ratio(step)
            laps = Laps()
            metrics = self.step(step) | ratio
            laps.lap("step")
            last = step + 1 == self.num_steps
            metrics["sft/tokens_per_s"] = metrics.get("sft/num_tokens", 0) / laps.seconds["step"]
            if last or (step + 1) % self.config.evaluate_every == 0:
                self.watchdog.enter("evaluate")
                metrics |= self.heldout_metrics()
            metrics |= self._pass_at_k(step + 1)
            if self.rank == 0:
                self.log.log(metrics, step=step + 1, num_steps=self.num_steps)
            self._watch(metrics, step + 1)
            if (step + 1) % self.config.checkpoint_every == 0 or last or self.wishes.save:
                self.watchdog.enter("checkpoint")
                commit(self.trainer)
            if self.wishes.stop and not last:
                return
            self.wishes.end_step(is_last=last)
        averaged = self.trainer.averaged() if self.config.export == "ema" else nullcontext()
        self.watchdog.enter("export")
        with averaged:
            export(self.trainer, self.chat, self.stage_dir / MODEL)

    def _pass_at_k(self, step: int) -> dict[str, float]:
        """What the evaluate stage would say of the weights, where the config wants it now."""
        if self.evaluation and self.evaluation.is_due(step, num_steps=self.num_steps):
            self.watchdog.enter("evaluate")
            return self.evaluation.of_trainer(self.trainer, averaged=self.config.export == "ema")
        return {}

    def _watch(self, metrics: dict[str, float], step: int) -> None:
        """Warn of what has happened to the weights, on every rank alike.

        Raises:
            TrainingError: A bound is broken, and the config wants the run to end then.
        """
        if self.config.weights.kind != "pear":  # they are what the run says, and tell of no ratio
            return
        for words in self.alarms.check(metrics, step=step):
            if self.config.alarms.action == "stop":
                raise TrainingError(f"{words} (sft.alarms.action=stop)")
            if self.rank == 0:
                self.log.event("warning", words)

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step on the step's global batch; the metrics of all ranks together.

        Raises:
            TrainingError: A loss, weight or gradient is not finite; the step's rows are named in a
                file beside the checkpoints.
        """
        rows = self._my_rows(step)
        microbatches = self._microbatches(rows)
        keep = self.rank == 0 and is_sampled(step, num_steps=self.num_steps)
        with naming_rows(rows, self._failed_step(step)):
            sums = self._accumulate(microbatches, keep_weights_of=step if keep else None)
            denominator = denominator_of(sums, self.config)
            result = self.trainer.step(denominator)
        self.wishes.agree(sums)
        return step_metrics(sums, self.sources) | {
            "sft/weighted_loss": sums["numerator"] / denominator,
            "sft/grad_norm": result.grad_norm,
            "sft/learning_rate": result.learning_rate,
        }

    def gradient_ratio(self, step: int) -> dict[str, float]:
        """Gradient norm of a few of the step's rows over that of uniform weights, if it is due.

        Both at the weights before the step, of the same rows, with the same objective and
        denominator. Nothing that training reads is changed by it.

        Raises:
            TrainingError: As in `step`.
        """
        every = self.config.alarms.gradient_ratio_every
        if self.config.weights.kind != "pear" or not every or step % every:
            return {}
        rows = [row for row in self._my_rows(step)[:COMPARED_ROWS] if trains_positively(row)]
        microbatches = self._microbatches(rows)
        if not microbatches:  # on no rank is there such a row
            return {}
        plain = self.config.model_copy(update={"weights": UniformWeights()})
        with naming_rows(rows, self._failed_step(step)):
            weighted = self._gradient_norm(microbatches, self.config)
            uniform = self._gradient_norm(microbatches, plain)
        return {"sft/grad_norm_ratio_to_uniform": weighted / uniform} if uniform else {}

    def _gradient_norm(
        self, microbatches: Sequence[list[dict[str, Any]]], settings: SftConfig
    ) -> float:
        """Of microbatches, divided by their global denominator; no step is made of it."""
        sums = self._accumulate(microbatches, settings=settings)
        return self.trainer.probe(denominator_of(sums, settings))

    def _accumulate(
        self,
        microbatches: Sequence[list[dict[str, Any]]],
        *,
        settings: SftConfig | None = None,
        keep_weights_of: int | None = None,
    ) -> dict[str, float]:
        """Forward and backward of the microbatches; the sums over them and all ranks.

        With the run's `settings` if no others are given.
        """
        settings = settings or self.config
        sums: dict[str, float] = {}
        kept: list[dict[str, Any]] = []
        batches, tau = self._batches(microbatches, settings)
        for number, (rows, batch) in enumerate(zip(microbatches, batches, strict=True), start=1):
            self.watchdog.enter("train")
            with self.trainer.microbatch(last=number == len(microbatches)):
                outputs, groups = self._outputs(batch), self.sources.groups_of(rows)
                terms = microbatch_terms(outputs, batch, settings, tau=tau, groups=groups)
                self.trainer.backward(terms.numerator)
            sums = weight_health.merge(sums, terms.sums)
            if keep_weights_of is not None and rows:
                # A share of each: the first microbatches have the longest rows.
                samples = weight_samples(keep_weights_of, rows, batch, terms.weights)
                kept += samples[: SAMPLED_TOKENS // len(microbatches)]
        if kept:
            write_weight_samples(self.stage_dir, kept)
        sums |= self.wishes.mine()
        return functools.reduce(weight_health.merge, gather_over_ranks(sums))

    @torch.no_grad()
    def heldout_metrics(self) -> dict[str, float]:
        """Plain and weighted loss on the rows kept out of training, all ranks together."""
        if not len(self.heldout):
            return {}
        sums: dict[str, float] = {}
        mine = self.heldout.take(list(range(self.rank, len(self.heldout), self.world_size)))
        batches, tau = self._batches(self._microbatches(mine.to_pylist()), self.config)
        for batch in batches:
            terms = microbatch_terms(self._outputs(batch), batch, self.config, tau=tau)
            sums = weight_health.merge(sums, terms.sums)
        sums = functools.reduce(weight_health.merge, gather_over_ranks(sums))
        health = weight_health.finalise(sums)
        return {
            "sft/heldout/nll": health["nll"],
            "sft/heldout/weighted_nll": health["weighted_nll"],
            "sft/heldout/weighted_loss": sums["numerator"] / (sums["denominator"] or 1.0),
            "sft/heldout/ess_fraction": health["ess_fraction"],
        }

    def _check_equivalence(self) -> None:
        """Run the guard on the shortest rows of the first batch."""
        rows = sorted(self._rows_of(0), key=lambda row: len(row["token_ids"]))
        rows = rows[: ROWS_PER_RANK * self.world_size]
        if len(rows) == ROWS_PER_RANK * self.world_size:  # every rank has its own
            settings = self.config
            if needs_step_weights(settings.weights):
                # A row that is on every rank has no weight of the step to itself.
                settings = without_step_control(settings)
            norm = functools.partial(self._gradient_norm, settings=settings)
            check_equivalence(
                norm, rows, rank=self.rank, world_size=self.world_size, dtype=self.dtype
            )

    def _failed_step(self, step: int) -> Path:
        return self.stage_dir / f"failed-step-{step + 1:06d}-rank-{self.rank}.json"

    def _my_rows(self, step: int) -> list[dict[str, Any]]:
        """This rank's share of the step's rows."""
        return self._rows_of(step, rank=self.rank, world_size=self.world_size)

    def _rows_of(self, step: int, **share: int) -> list[dict[str, Any]]:
        config, num_steps = self.config, self.num_steps
        return rows_of_step(
            self.rows, step, config=config, num_steps=num_steps, seed=self.seed, **share
        )

    def _microbatches(self, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """`rows` in microbatches: on every rank as many as on the rank with the most."""
        groups = plan_microbatches(
            [len(row["token_ids"]) for row in rows],
            max_tokens=self.config.microbatch_tokens,
            device=self.device,
            packs=self.trainer.module.packs,
        )
        most = max(int(each["n"]) for each in gather_over_ranks({"n": len(groups)}))
        mine = [[rows[index] for index in group] for group in groups]
        return mine + [[] for _ in range(most - len(groups))]

    def _batches(
        self, microbatches: Sequence[list[dict[str, Any]]], settings: SftConfig
    ) -> tuple[Iterable[TokenBatch], float | None]:
        """The microbatches as batches, with what must be known of all of them before the first.

        That is the averaged weights' log-probs, if ratios are made with them, what a control makes
        of the weights, and TALR's tau (else None). Without any, batches are made one at a time, as
        they are used.
        """
        one_by_one = map(self.collator, microbatches)
        weights, talr = settings.weights, settings.objective.kind == "talr"
        averaged = weights.kind == "pear" and weights.ratio_policy == "ema"
        if not (averaged or talr or needs_step_weights(weights)):
            return one_by_one, None
        batches = list(one_by_one)
        if averaged:
            with self.trainer.averaged(), torch.no_grad():  # once: each time swaps all weights
                for batch in batches:
                    batch.aligned["ema_logprobs"] = self._outputs(batch)["logprobs"]
        if not (talr or needs_step_weights(weights)):
            return batches, None
        with torch.no_grad():  # a pass of its own, for both
            logprobs = [self._outputs(batch)["logprobs"] for batch in batches]
        if needs_step_weights(weights):
            seed, step = self.seed, self.trainer.step_count
            control_step(microbatches, batches, logprobs, weights, seed=seed, step=step)
        return batches, self._tau(batches, logprobs) if talr else None

    def _outputs(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
        objective = self.config.objective
        k = objective.k if objective.kind == "eaft" else 0
        outputs = self.trainer.policy(batch, temperature=1.0, entropy_k=k)
        return outputs if isinstance(outputs, dict) else {"logprobs": outputs}

    def _tau(self, batches: Sequence[TokenBatch], logprobs: Sequence[torch.Tensor]) -> float:
        """TALR's tau of the step's batch over all ranks."""
        means = [
            sequence_mean_losses(-each, batch.sequence_ids, batch.loss_mask).cpu()
            for batch, each in zip(batches, logprobs, strict=True)
        ]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, torch.cat(means))
        return batch_tau(torch.cat(gathered))
