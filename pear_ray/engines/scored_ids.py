"""Which ids a behavior model scores: the corpus's own, or its own tokenizer's of the same chat."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pear_ray.artifacts.scores import Scores
from pear_ray.config.corpus import train_on
from pear_ray.config.run import RunConfig
from pear_ray.engines.byte_alignment import align_messages, assign
from pear_ray.engines.chat import ChatTokenizer, TrainOn
from pear_ray.engines.model_files import resolve_model
from pear_ray.engines.top_logprobs import MaskedIds, TopLogprobs

Score = Callable[[Sequence[list[int]]], Sequence[Sequence[float] | np.ndarray]]
ScoreTop = Callable[[Sequence[MaskedIds]], Sequence[TopLogprobs]]


def ids_to_score(config: RunConfig, behavior: Path, *, align: str) -> "OwnIds | BehaviorIds":
    """What `align` (as `models.align`) says for the behavior model in `behavior`."""
    if align == "refuse":
        return OwnIds()
    return BehaviorIds(
        target=ChatTokenizer(resolve_model(config.models.policy)),
        behavior=ChatTokenizer(behavior),
        train_on=train_on(config.corpus),
    )


@dataclass(frozen=True, slots=True)
class OwnIds:
    """The behavior model has the policy's tokenizer: it scores exactly the corpus's ids."""

    def scored(self, rows: Sequence[dict[str, Any]], score: Score) -> list[Scores]:
        """Scores of `rows` of the corpus, 0 where nothing trains."""
        found = score([row["token_ids"] for row in rows])
        return [
            Scores(_where_it_trains(values, row)) for row, values in zip(rows, found, strict=True)
        ]

    def scored_top(self, rows: Sequence[dict[str, Any]], score: ScoreTop) -> list[Scores]:
        """Scores of `rows` of the corpus with the candidates of every loss token."""
        found = score([MaskedIds(row["token_ids"], row["loss_mask"]) for row in rows])
        return [
            Scores(
                _where_it_trains(each.logprobs, row),
                top_ids=each.top_ids.ravel(),
                top_logprobs=each.top_logprobs.ravel(),
            )
            for row, each in zip(rows, found, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class BehaviorIds:
    """The behavior model has a tokenizer of its own; its log-probs go to the spans both share."""

    target: ChatTokenizer
    behavior: ChatTokenizer
    train_on: TrainOn

    def scored(self, rows: Sequence[dict[str, Any]], score: Score) -> list[Scores]:
        """Scores of `rows` of the corpus, 0 where nothing trains, each with its spans.

        Raises:
            ValueError: A row cannot be aligned; preparing the corpus sets such rows aside.
        """
        aligned = [
            align_messages(
                self.target, self.behavior, json.loads(row["messages"]), train_on=self.train_on
            )
            for row in rows
        ]
        found = score([each.behavior_ids for each in aligned])
        return [
            Scores(assign(each, list(values)), each.span_ids)
            for each, values in zip(aligned, found, strict=True)
        ]


def _where_it_trains(values: Sequence[float] | np.ndarray, row: dict[str, Any]) -> np.ndarray:
    return np.where(row["loss_mask"], values, np.float32(0))
