"""The sources of the corpus, which SFT logs apart where there is more than one."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from pear_ray.algorithms.group_health import finalise_groups
from pear_ray.distributed.sft_terms import RowGroups

SOURCE = "sft/source/"  # before a source's name, in the names of its metrics

LARGEST = 20  # sources logged one by one: each adds ten numbers to every step
OTHER = "other"  # what all smaller ones are logged as, together
MAX_NAME_CHARS = 60


class Sources:
    """Which group of metrics each row counts in: decided by the rows alone, so on all ranks alike.

    Attributes:
        names: Of the groups in metrics, the largest source first; none for a corpus of one source.
    """

    def __init__(self, rows: pa.Table) -> None:
        """Group the rows that train and are no negatives, by their tokens."""
        lengths = [chunk.value_lengths() for chunk in rows["token_ids"].chunks]
        sizes = rows.select(["source", "is_negative"]).append_column(
            "tokens", pa.chunked_array(lengths, type=pa.int32())
        )
        sizes = sizes.filter(~pc.field("is_negative"))
        totals = sizes.group_by("source").aggregate([("tokens", "sum")]).to_pylist()
        totals.sort(key=lambda each: (-each["tokens_sum"], each["source"]))
        sources = [each["source"] for each in totals]
        shown, smaller = sources[:LARGEST], sources[LARGEST:]
        if len(sources) < 2:  # noqa: PLR2004 - one source's numbers are the step's
            shown = []
        self.names = [*metric_names(shown), *([OTHER] if smaller else [])]
        self._groups = {source: group for group, source in enumerate(shown)}

    def groups_of(self, rows: Sequence[Mapping[str, Any]]) -> RowGroups | None:
        """The place in `names` of each row's source; None for a corpus of one source.

        Negatives of a source without a positive row get the last place; no metric counts them.
        """
        if not self.names:
            return None
        last = len(self.names) - 1
        places = [self._groups.get(row["source"], last) for row in rows]
        return RowGroups(torch.tensor(places, dtype=torch.long), len(self.names))

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """`sft/source/NAME/...` of a step, from its merged sums."""
        found = finalise_groups(sums, num_groups=len(self.names))
        return {
            f"{SOURCE}{name}/{metric}": value
            for name, values in zip(self.names, found, strict=True)
            for metric, value in values.items()
        }


def metric_names(sources: Sequence[str]) -> list[str]:
    """What the sources are called in metrics: letters, digits, `.`, `_` and `-`, each name once."""
    names: list[str] = []
    for source in sources:
        # The end tells paths apart.
        stem = re.sub(r"[^a-zA-Z0-9._-]+", "_", source).strip("_")[-MAX_NAME_CHARS:] or "unnamed"
        name, number = stem, 1
        while name in (*names, OTHER):
            number += 1
            name = f"{stem}_{number}"
        names.append(name)
    return names
