"""The SFT loop of one worker: weighted sums over microbatches, one step per global batch."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist

from pear_ray.algorithms import objectives, weight_health
from pear_ray.algorithms.packing import length_sorted_microbatches
from pear_ray.algorithms.pear import PearWeights
from pear_ray.algorithms.reduce import loss_denominator, loss_numerator
from pear_ray.artifacts.tables import SCORED, WEIGHT_SAMPLES, read_table, write_rows
from pear_ray.config import sft as sft_config
from pear_ray.config.run import RunConfig
from pear_ray.distributed.equivalence import ROWS_PER_RANK, check_equivalence
from pear_ray.distributed.train_group import Laps, commit, export, restore, start_worker
from pear_ray.engines.backends import make_trainer
from pear_ray.engines.batches import Row, TokenBatch, collate
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.trainer import gather_over_ranks
from pear_ray.telemetry.metrics_log import MetricsLog
from pear_ray.weighting import clips, pear_weights

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


def training_rows(run_dir: Path) -> pa.Table:
    """The scored examples that train, in the corpus's order: negatives are left out."""
    scored = read_table(run_dir / "score" / "scored", SCORED)
    return scored.filter(~pc.field("is_negative")).combine_chunks()


def num_sft_steps(config: RunConfig, *, num_rows: int) -> int:
    """Optimizer steps of the stage; the last batch of an epoch may be smaller."""
    return config.sft.num_epochs * -(-num_rows // config.sft.global_batch_size)


def token_weights(
    logprobs: torch.Tensor,
    batch: TokenBatch,
    config: sft_config.UniformWeights | sft_config.PearWeights,
) -> PearWeights:
    """The weight of each loss token, with the log-ratios behind it; uniform weights are all 1."""
    spans = batch.aligned.get("span_ids")
    weigh = functools.partial(
        pear_weights,
        logprobs,
        batch.aligned["behavior_logprobs"],
        batch.sequence_ids,
        batch.loss_mask,
        span_ids=None if spans is None else spans.long(),
    )
    if config.kind == "pear":
        return weigh(config=config)
    # Log-ratios are still worth seeing: they tell what PEAR would have done.
    measured = weigh(config=sft_config.PearWeights(level="sequence"))
    ones = torch.ones_like(measured.weights)
    return dataclasses.replace(measured, weights=ones, log_weights=torch.zeros_like(ones))


class SftWorker:
    """One rank of the SFT group."""

    def __init__(self, job: TrainJob) -> None:
        self.config = job.config.sft
        self.seed = job.config.seed
        self.stage_dir = job.run_dir / "sft"
        self.device = start_worker(job.config.cluster)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.chat = ChatTokenizer(job.model)
        self.rows = training_rows(job.run_dir)
        # Spans are small whole numbers, which float32 holds exactly.
        spans = ("span_ids",) if job.config.models.align == "bytes" else ()
        self.aligned = ("behavior_logprobs", *spans)
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
        )
        self.log = MetricsLog(job.run_dir, run=job.config.name, stage="sft", attempt=job.attempt)

    def run(self) -> None:
        """All steps from the last checkpoint on, then the export."""
        if not restore(self.trainer) and self.config.check_equivalence:
            self._check_equivalence()
        for step in range(self.trainer.step_count, self.num_steps):
            laps = Laps()
            metrics = self.step(step)
            laps.lap("step")
            if self.rank == 0:
                metrics["sft/tokens_per_s"] = metrics["sft/num_tokens"] / laps.seconds["step"]
                self.log.log(metrics, step=step + 1, num_steps=self.num_steps)
            if (step + 1) % self.config.checkpoint_every == 0 or step + 1 == self.num_steps:
                commit(self.trainer)
        export(self.trainer, self.chat, self.stage_dir / "model")

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step on the step's global batch; the metrics of all ranks together."""
        microbatches = self._microbatches(self._my_rows(step))
        keep = self.rank == 0 and self._is_sampled(step)
        sums = self._accumulate(microbatches, keep_weights_of=step if keep else None)
        denominator = sums["denominator"] * self._rescale(sums)
        result = self.trainer.step(denominator)
        health = weight_health.finalise(sums)
        return {f"sft/{name}": value for name, value in health.items()} | {
            "sft/weighted_loss": sums["numerator"] / denominator,
            "sft/weight_mass_last_tenth": health["last_tenth_weight_share"],
            "sft/grad_norm": result.grad_norm,
            "sft/learning_rate": result.learning_rate,
        }

    def _accumulate(
        self, microbatches: Sequence[list[dict[str, Any]]], *, keep_weights_of: int | None = None
    ) -> dict[str, float]:
        """Forward and backward of the microbatches; the sums over them and all ranks."""
        sums: dict[str, float] = {}
        for number, rows in enumerate(microbatches, start=1):
            with self.trainer.microbatch(last=number == len(microbatches)):
                part, batch, weights = self._microbatch(rows)
            sums = weight_health.merge(sums, part)
            if keep_weights_of is not None:
                self._keep_weights(keep_weights_of, rows, batch, weights)
        return functools.reduce(weight_health.merge, gather_over_ranks(sums))

    def _check_equivalence(self) -> None:
        """Run the guard on the shortest rows of the first batch."""

        def probe(microbatches: list[list[dict[str, Any]]]) -> float:
            sums = self._accumulate(microbatches)
            return self.trainer.probe(sums["denominator"] * self._rescale(sums))

        rows = sorted(self._rows_of(0), key=lambda row: len(row["token_ids"]))
        rows = rows[: ROWS_PER_RANK * self.world_size]
        if len(rows) == ROWS_PER_RANK * self.world_size:  # every rank has its own
            check_equivalence(
                probe, rows, rank=self.rank, world_size=self.world_size, dtype=self.dtype
            )

    def _my_rows(self, step: int) -> list[dict[str, Any]]:
        """This rank's share of the step's rows."""
        return self._rows_of(step)[self.rank :: self.world_size]

    def _rows_of(self, step: int) -> list[dict[str, Any]]:
        """The rows of a step, over all ranks: a slice of the epoch's seeded order."""
        size = self.config.global_batch_size
        epoch, batch = divmod(step, self.num_steps // self.config.num_epochs)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.rows), generator=generator)
        taken = order[batch * size : (batch + 1) * size]
        return self.rows.take(pa.array(taken.numpy())).to_pylist()

    def _microbatches(self, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """`rows` in microbatches: on every rank as many as on the rank with the most."""
        groups = length_sorted_microbatches(
            [len(row["token_ids"]) for row in rows], max_tokens=self.config.microbatch_tokens
        )
        most = max(int(each["n"]) for each in gather_over_ranks({"n": len(groups)}))
        mine = [[rows[index] for index in group] for group in groups]
        return mine + [[] for _ in range(most - len(groups))]

    def _microbatch(
        self, rows: list[dict[str, Any]]
    ) -> tuple[dict[str, float], TokenBatch, PearWeights]:
        """Forward and backward of one microbatch; its sums, and what they were made of."""
        batch = collate(
            [Row(row["token_ids"], row["loss_mask"], row) for row in rows],
            pad_id=self.chat.pad_id,
            names=self.aligned,
            device=self.device,
        )
        logprobs = self.trainer.policy(batch, temperature=1.0)
        weights = token_weights(logprobs, batch, self.config.weights)
        losses = {"nll": objectives.nll, "dft": objectives.dft}[self.config.objective](
            logprobs, batch.loss_mask
        )
        flat = (weights.weights, batch.sequence_ids, batch.loss_mask)
        numerator = loss_numerator(losses, *flat, reduction=self.config.reduction)
        self.trainer.backward(numerator)
        settings = self.config.weights
        if settings.kind == "uniform":
            settings = sft_config.PearWeights()  # log-ratios are counted against the paper's bounds
        ratio_clip, weight_clip = clips(settings)
        sums = weight_health.weight_sums(
            weights,
            logprobs.detach(),
            batch.sequence_ids,
            batch.loss_mask,
            log_ratio_clip=ratio_clip,
            log_weight_clip=weight_clip,
        )
        sums["numerator"] = float(numerator.detach())
        sums["denominator"] = float(loss_denominator(*flat, reduction=self.config.reduction))
        return sums, batch, weights

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

    def _keep_weights(
        self, step: int, rows: list[dict[str, Any]], batch: TokenBatch, weights: PearWeights
    ) -> None:
        """Write log-ratios and weights of this rank's tokens, for the report."""
        counts = torch.bincount(batch.sequence_ids, minlength=len(rows))
        left = torch.cat([torch.arange(int(count) - 1, -1, -1) for count in counts])
        columns = zip(
            batch.sequence_ids.tolist(),
            left.tolist(),
            weights.log_ratios.tolist(),
            weights.weights.tolist(),
            strict=True,
        )
        kept = [
            {
                "step": step + 1,
                "example_id": rows[row]["example_id"],
                "tokens_left": tokens_left,
                "log_ratio": log_ratio,
                "weight": weight,
            }
            for row, tokens_left, log_ratio, weight in columns
        ][:SAMPLED_TOKENS]
        folder = self.stage_dir / "weight_samples"
        folder.mkdir(exist_ok=True)
        write_rows(folder / f"step-{step + 1:06d}.parquet", kept, WEIGHT_SAMPLES)
