"""The rows that SFT trains on: which, with what beside them, and in which order."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pear_ray.algorithms.packing import split_for_ranks
from pear_ray.artifacts.tables import SCORED, SCORED_TOP, read_table
from pear_ray.config.objectives import reference_top_k
from pear_ray.config.run import RunConfig
from pear_ray.config.sft import SftConfig, needs_initial_policy
from pear_ray.distributed.sft_terms import SOURCE_WEIGHTS
from pear_ray.engines.batches import Row, TokenBatch, collate
from pear_ray.errors import ArtifactError, InputError, TrainingError

INITIAL = "initial"  # folder, in the stage's, of the scores under the initial policy
ROW_NUMBER = "row_number"  # column of the rows that train: which one it is among them


def training_rows(config: SftConfig, run_dir: Path) -> pa.Table:
    """The scored examples that train, in the corpus's order, with what the objective wants of them.

    Each has its number in that order beside it.

    Negatives are left out unless the config says what to do with them.

    Raises:
        ArtifactError: The initial policy's scores are of other rows.
    """
    candidates = config.objective.kind == "forward_kl"
    scored = read_table(run_dir / "score" / "scored", SCORED_TOP if candidates else SCORED)
    if needs_initial_policy(config):
        wanted = SCORED_TOP if reference_top_k(config.objective) else SCORED
        initial = read_table(run_dir / "sft" / INITIAL / "scored", wanted)
        if not scored["example_id"].equals(initial["example_id"]):
            raise ArtifactError(
                f"{run_dir}/sft/{INITIAL}: scores of other rows than {run_dir}/score; remove the "
                "folder, and run the same command again"
            )
        scored = scored.append_column("initial_logprobs", initial["behavior_logprobs"])
        for name in ("top_ids", "top_logprobs"):
            if name in initial.column_names:
                scored = scored.append_column(name, initial[name])
    if config.negatives is None:
        scored = scored.filter(~pc.field("is_negative"))
    numbers = pa.array(np.arange(len(scored)))
    return scored.append_column(ROW_NUMBER, numbers).combine_chunks()


def num_training_rows(config: SftConfig, run_dir: Path) -> int:
    """How many rows `training_rows` has, without reading them."""
    marks = pa.schema([SCORED.field("is_negative")])
    negative = read_table(run_dir / "score" / "scored", marks)["is_negative"]
    if config.negatives is not None:
        return len(negative)
    return len(negative) - int(negative.to_numpy().sum())


def split_heldout(rows: pa.Table, *, heldout_rows: int, seed: int) -> tuple[pa.Table, pa.Table]:
    """What trains, and what is kept out: rows that are no negatives, chosen by the seed.

    Raises:
        InputError: Fewer than two rows would be left to train on.
    """
    if not heldout_rows:
        return rows, rows.slice(0, 0)
    positive = np.flatnonzero(~rows["is_negative"].to_numpy())
    if len(positive) < heldout_rows + 2:
        raise InputError(
            f"sft.heldout_rows={heldout_rows} of {len(positive)} rows that train leaves none to "
            "train on; lower it"
        )
    chosen = np.random.default_rng(seed).choice(positive, heldout_rows, replace=False)
    kept_out = np.zeros(len(rows), dtype=bool)
    kept_out[chosen] = True
    return rows.filter(pa.array(~kept_out)), rows.filter(pa.array(kept_out))


def num_sft_steps(config: RunConfig, *, num_rows: int) -> int:
    """Optimizer steps of the stage; the last batch of an epoch may be smaller."""
    return config.sft.num_epochs * -(-num_rows // config.sft.global_batch_size)


def rows_of_step(
    rows: pa.Table,
    step: int,
    *,
    config: SftConfig,
    num_steps: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[dict[str, Any]]:
    """A rank's share of the rows of a step, which are a slice of the epoch's seeded order.

    Shares have nearly the same number of tokens: all ranks wait for the one with the most.
    """
    size = config.global_batch_size
    epoch, batch = divmod(step, num_steps // config.num_epochs)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(rows), generator=generator)
    taken = order[batch * size : (batch + 1) * size].numpy()
    lengths = _num_tokens(rows)[taken].tolist()
    share = split_for_ranks(lengths, num_ranks=world_size)[rank]
    return rows.take(pa.array(taken[share])).to_pylist()


def _num_tokens(rows: pa.Table) -> np.ndarray:
    """[row], from the lists' offsets: nothing is decoded."""
    return pc.call_function("list_value_length", [rows["token_ids"]]).to_numpy()


class Collator:
    """Makes microbatches of rows, with all that the run's weights and objective read."""

    def __init__(
        self, run: RunConfig, *, pad_id: int, vocab_size: int, device: torch.device
    ) -> None:
        config = run.sft
        names = ["behavior_logprobs"]
        if run.models.align == "bytes":
            names.append("span_ids")  # small whole numbers, which float32 holds exactly
        if needs_initial_policy(config):
            names.append("initial_logprobs")
        if config.negatives is not None:
            names.append("is_negative")
        weights = config.weights
        self._source_weights = weights.weights if weights.kind == "by_source" else None
        if self._source_weights is not None:
            names.append(SOURCE_WEIGHTS)
        self._names = tuple(names)
        distils = config.objective.kind == "forward_kl"
        self._num_candidates = run.score.top_k if distils else reference_top_k(config.objective)
        self._pad_id, self._vocab_size, self._device = pad_id, vocab_size, device

    def __call__(self, rows: Sequence[dict[str, Any]]) -> TokenBatch:
        """`rows` as one batch on the device; none give a batch without a loss token."""
        batch = collate(
            [self._row(row) for row in rows],
            pad_id=self._pad_id,
            names=self._names,
            device=self._device,
            num_candidates=self._num_candidates,
        )
        if batch.candidate_ids is not None:
            # Vocabularies are padded to different sizes: what the policy has no row for is rest.
            batch.candidate_ids.masked_fill_(batch.candidate_ids >= self._vocab_size, -1)
        return batch

    def _row(self, row: dict[str, Any]) -> Row:
        aligned, length = row, len(row["token_ids"])
        if "is_negative" in self._names:
            aligned = aligned | {"is_negative": [row["is_negative"]] * length}
        if self._source_weights is not None:
            weight = self._source_weights[row["source"]]
            aligned = aligned | {SOURCE_WEIGHTS: [weight] * length}
        candidates = (row["top_ids"], row["top_logprobs"]) if self._num_candidates else None
        return Row(row["token_ids"], row["loss_mask"], aligned, candidates)


def trains_positively(row: dict[str, Any]) -> bool:
    """Whether a row has a token to raise the log-prob of."""
    return not row["is_negative"] and any(row["loss_mask"][1:])


@contextlib.contextmanager
def naming_rows(rows: Sequence[dict[str, Any]], file: Path) -> Iterator[None]:
    """Write the rows' ids into `file` if the `with` block cannot train on them.

    Raises:
        TrainingError: The block raised one, or a ValueError; with the file's name.
    """
    try:
        yield
    except (TrainingError, ValueError) as error:
        file.write_text(json.dumps([row["example_id"] for row in rows]), encoding="utf-8")
        raise TrainingError(f"{error} (this rank's rows of the step: {file})") from error
