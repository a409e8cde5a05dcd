"""The SFT loop of one worker: weighted sums over microbatches, one step per global batch."""

import functools
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pear_ray.algorithms import weight_health
from pear_ray.algorithms.pear import PearWeights
from pear_ray.algorithms.talr import batch_tau, sequence_mean_losses
from pear_ray.artifacts.tables import WEIGHT_SAMPLES, write_rows
from pear_ray.config.run import RunConfig
from pear_ray.distributed.equivalence import ROWS_PER_RANK, check_equivalence
from pear_ray.distributed.sft_alarms import WeightAlarms
from pear_ray.distributed.sft_rows import (
    Collator,
    num_sft_steps,
    rows_of_step,
    split_heldout,
    training_rows,
)
from pear_ray.distributed.sft_terms import Terms, microbatch_terms
from pear_ray.distributed.train_group import (
    MODEL,
    Laps,
    commit,
    export,
    restore,
    start_worker,
    stop_wished,
)
from pear_ray.engines.backends import make_trainer
from pear_ray.engines.batches import TokenBatch, plan_microbatches
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.model_files import vocab_size
from pear_ray.engines.trainer import gather_over_ranks
from pear_ray.errors import TrainingError
from pear_ray.telemetry.metrics_log import MetricsLog

NUM_SAMPLED_STEPS = 5
SAMPLED_TOKENS = 4000  # of such a step, whose weights are kept for the report


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
    SftWorker(TrainJob(**job)).run()


class SftWorker:
    """One rank of the SFT group."""

    def __init__(self, job: TrainJob) -> None:
        self.config = job.config.sft
        self.seed = job.config.seed
        self.stage_dir = job.run_dir / "sft"
        self.device = start_worker(job.config.cluster)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.chat = ChatTokenizer(job.model)
        self.rows, self.heldout = split_heldout(
            training_rows(self.config, job.run_dir),
            heldout_rows=self.config.heldout_rows,
            seed=self.seed,
        )
        self.collator = Collator(
            job.config,
            pad_id=self.chat.pad_id,
            vocab_size=vocab_size(job.model),
            device=self.device,
        )
        self.num_steps = num_sft_steps(job.config, num_rows=len(self.rows))
        self.dtype = job.config.models.dtype if job.config.cluster.device == "cuda" else "float32"
        self.trainer = make_trainer(
            job.model,
            self.config.backend,
            self.config.optimizer,
            num_steps=self.num_steps,
            device=job.config.cluster.device,
            dtype=self.dtype,
            activation_checkpointing=self.config.activation_checkpointing,
            ema_decay=self.config.ema_decay,
        )
        self.stop = False
        self.alarms = WeightAlarms(self.config.alarms)
        self.log = MetricsLog(job.run_dir, run=job.config.name, stage="sft", attempt=job.attempt)

    def run(self) -> None:
        """All steps from the last checkpoint on, then the export; or until the run is to stop."""
        if not restore(self.trainer) and self.config.check_equivalence:
            self._check_equivalence()
        for step in range(self.trainer.step_count, self.num_steps):
            laps = Laps()
            metrics = self.step(step)
            laps.lap("step")
            last = step + 1 == self.num_steps
            metrics["sft/tokens_per_s"] = metrics.get("sft/num_tokens", 0) / laps.seconds["step"]
            if last or (step + 1) % self.config.evaluate_every == 0:
                metrics |= self.heldout_metrics()
            if self.rank == 0:
                self.log.log(metrics, step=step + 1, num_steps=self.num_steps)
            self._watch(metrics, step + 1)
            if (step + 1) % self.config.checkpoint_every == 0 or last or self.stop:
                commit(self.trainer)
            if self.stop and not last:
                return
        averaged = self.trainer.averaged() if self.config.export == "ema" else nullcontext()
        with averaged:
            export(self.trainer, self.chat, self.stage_dir / MODEL)

    def _watch(self, metrics: dict[str, float], step: int) -> None:
        """Warn of what has happened to the weights, on every rank alike.

        Raises:
            TrainingError: A bound is broken, and the config wants the run to end then.
        """
        if self.config.weights.kind == "uniform":
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
        keep = self.rank == 0 and self._is_sampled(step)
        try:
            sums = self._accumulate(microbatches, keep_weights_of=step if keep else None)
            denominator = sums["denominator"] * self._rescale(sums)
            result = self.trainer.step(denominator)
        except (TrainingError, ValueError) as error:
            file = self.stage_dir / f"failed-step-{step + 1:06d}-rank-{self.rank}.json"
            file.write_text(json.dumps([row["example_id"] for row in rows]), encoding="utf-8")
            raise TrainingError(f"{error} (this rank's rows of step {step + 1}: {file})") from error
        self.stop = bool(sums["max/stop"])  # the same on every rank
        return _metrics(sums) | {
            "sft/weighted_loss": sums["numerator"] / denominator,
            "sft/grad_norm": result.grad_norm,
            "sft/learning_rate": result.learning_rate,
        }

    def _accumulate(
        self, microbatches: Sequence[list[dict[str, Any]]], *, keep_weights_of: int | None = None
    ) -> dict[str, float]:
        """Forward and backward of the microbatches; the sums over them and all ranks."""
        sums: dict[str, float] = {}
        kept: list[dict[str, Any]] = []
        tau = self._tau(microbatches)
        for number, rows in enumerate(microbatches, start=1):
            with self.trainer.microbatch(last=number == len(microbatches)):
                terms, batch = self._microbatch(rows, tau)
            sums = weight_health.merge(sums, terms.sums)
            if keep_weights_of is not None and rows:
                # A share of each: the first microbatches have the longest rows.
                samples = _weight_samples(keep_weights_of, rows, batch, terms.weights)
                kept += samples[: SAMPLED_TOKENS // len(microbatches)]
        if kept:
            folder = self.stage_dir / "weight_samples"
            folder.mkdir(exist_ok=True)
            file = folder / f"step-{kept[0]['step']:06d}.parquet"
            write_rows(file, kept, WEIGHT_SAMPLES)
        sums["max/stop"] = float(stop_wished(self.stage_dir))
        return functools.reduce(weight_health.merge, gather_over_ranks(sums))

    @torch.no_grad()
    def heldout_metrics(self) -> dict[str, float]:
        """Plain and weighted loss on the rows kept out of training, all ranks together."""
        if not len(self.heldout):
            return {}
        sums: dict[str, float] = {}
        mine = self.heldout.take(list(range(self.rank, len(self.heldout), self.world_size)))
        microbatches = self._microbatches(mine.to_pylist())
        tau = self._tau(microbatches)
        for rows in microbatches:
            batch = self._batch(rows)
            terms = microbatch_terms(self._outputs(batch), batch, self.config, tau=tau)
            sums = weight_health.merge(sums, terms.sums)
        sums = functools.reduce(weight_health.merge, gather_over_ranks(sums))
        health = weight_health.finalise(sums)
        return {
            "sft/heldout/nll": health["nll"],
            "sft/heldout/weighted_nll": health["weighted_nll"],
            "sft/heldout/weighted_loss": sums["numerator"] / sums["denominator"],
            "sft/heldout/ess_fraction": health["ess_fraction"],
        }

    def _check_equivalence(self) -> None:
        """Run the guard on the shortest rows of the first batch."""

        def probe(microbatches: list[list[dict[str, Any]]]) -> float:
            sums = self._accumulate(microbatches)
            return self.trainer.probe(sums["denominator"] * self._rescale(sums))

        rows = sorted(self._rows_of(0, slice(None)), key=lambda row: len(row["token_ids"]))
        rows = rows[: ROWS_PER_RANK * self.world_size]
        if len(rows) == ROWS_PER_RANK * self.world_size:  # every rank has its own
            check_equivalence(
                probe, rows, rank=self.rank, world_size=self.world_size, dtype=self.dtype
            )

    def _my_rows(self, step: int) -> list[dict[str, Any]]:
        """This rank's share of the step's rows."""
        return self._rows_of(step, slice(self.rank, None, self.world_size))

    def _rows_of(self, step: int, share: slice) -> list[dict[str, Any]]:
        return rows_of_step(
            self.rows,
            step,
            share=share,
            config=self.config,
            num_steps=self.num_steps,
            seed=self.seed,
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

    def _microbatch(
        self, rows: list[dict[str, Any]], tau: float | None
    ) -> tuple[Terms, TokenBatch]:
        """Forward and backward of one microbatch; its terms, and the batch they were made of."""
        batch = self._batch(rows)
        outputs = self._outputs(batch)
        terms = microbatch_terms(outputs, batch, self.config, tau=tau)
        self.trainer.backward(terms.numerator)
        return terms, batch

    def _batch(self, rows: list[dict[str, Any]]) -> TokenBatch:
        """The rows as a batch, with what the averaged weights say of them where that is asked."""
        batch = self.collator(rows)
        weights = self.config.weights
        if weights.kind == "pear" and weights.ratio_policy == "ema":
            with self.trainer.averaged(), torch.no_grad():
                batch.aligned["ema_logprobs"] = self.trainer.policy(batch, temperature=1.0)
        return batch

    def _outputs(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
        objective = self.config.objective
        k = objective.k if objective.kind == "eaft" else 0
        outputs = self.trainer.policy(batch, temperature=1.0, entropy_k=k)
        return outputs if isinstance(outputs, dict) else {"logprobs": outputs}

    def _tau(self, microbatches: Sequence[list[dict[str, Any]]]) -> float | None:
        """TALR's tau of the step's batch over all ranks, in a pass of its own; else None."""
        if self.config.objective.kind != "talr":
            return None
        means = []
        with torch.no_grad():
            for rows in microbatches:
                batch = self.collator(rows)
                flat = (batch.sequence_ids, batch.loss_mask)
                losses = -self._outputs(batch)["logprobs"]
                means.append(sequence_mean_losses(losses, *flat).cpu())
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, torch.cat(means))
        return batch_tau(torch.cat(gathered))

    def _rescale(self, sums: dict[str, float]) -> float:
        """Factor on the denominator that gives the step's weights a mean of 1, where asked for.

        Weights enter the gradient linearly, so dividing them all by their mean is the same as
        multiplying the denominator by it; `weight_norm` has divided by them already.
        """
        weights = self.config.weights
        if (
            weights.kind == "pear"
            and weights.rescale == "batch_mean_one"
            and self.config.reduction != "weight_norm"
        ):
            return sums["weight"] / sums["tokens"]
        return 1.0

    def _is_sampled(self, step: int) -> bool:
        last = self.num_steps - 1
        return step in {round(last * k / (NUM_SAMPLED_STEPS - 1)) for k in range(NUM_SAMPLED_STEPS)}


def _weight_samples(
    step: int, rows: Sequence[dict[str, Any]], batch: TokenBatch, weights: PearWeights
) -> list[dict[str, Any]]:
    """Log-ratio and weight of each loss token of a microbatch, for the report."""
    counts = torch.bincount(batch.sequence_ids, minlength=len(rows))
    left = torch.cat([torch.arange(int(count) - 1, -1, -1) for count in counts])
    columns = zip(
        batch.sequence_ids.tolist(),
        left.tolist(),
        weights.log_ratios.tolist(),
        weights.weights.tolist(),
        strict=True,
    )
    return [
        {
            "step": step + 1,
            "example_id": rows[row]["example_id"],
            "tokens_left": tokens_left,
            "log_ratio": log_ratio,
            "weight": weight,
        }
        for row, tokens_left, log_ratio, weight in columns
    ]


def _metrics(sums: dict[str, float]) -> dict[str, float]:
    """Metrics of a step from its sums; the negatives' apart from the positives'."""
    metrics: dict[str, float] = {}
    if sums["tokens"]:
        health = weight_health.finalise(sums)
        metrics = {f"sft/{name}": value for name, value in health.items()}
        metrics["sft/weight_mass_last_tenth"] = health["last_tenth_weight_share"]
    wrong = sums.get("negative_tokens", 0.0)
    if wrong:
        metrics |= {
            "sft/negatives/num_tokens": wrong,
            "sft/negatives/below_floor_fraction": sums["negative_below_floor"] / wrong,
            "sft/negatives/weighted_loss": sums["negative_weighted_loss"] / wrong,
        }
    return metrics
