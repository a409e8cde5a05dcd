"""The offline corpus: sampled from the behavior model, or read from a file; and its scoring."""

from typing import Annotated, Literal

from pydantic import Field

from pear_ray.config.base import Section
from pear_ray.config.problems import ProblemSetConfig, RewardConfig


class SampledCorpus(Section):
    """The behavior model answers problems; answers that verify become the corpus."""

    kind: Literal["sampled"]
    problems: ProblemSetConfig
    """The problems to answer."""
    samples_per_problem: Annotated[int, Field(gt=0)] = 4
    """Completions sampled for each problem."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature. At any other than 1, the log-probs as sampled are not the model's
    own."""
    max_tokens: Annotated[int, Field(gt=0)] = 128
    """Longest completion, in tokens."""
    rewards: RewardConfig = RewardConfig()
    """How completions are verified."""


class JsonlCorpus(Section):
    """A file of rows, each `messages` (role and content) or `prompt` and `completion`."""

    kind: Literal["jsonl"]
    path: str
    """The JSONL file."""


CorpusConfig = Annotated[SampledCorpus | JsonlCorpus, Field(discriminator="kind")]


class ScoreConfig(Section):
    """Behavior log-probs of exactly the corpus's token ids."""

    rows_per_block: Annotated[int, Field(gt=0)] = 64
    """Rows scored and written together; a killed run loses at most the blocks in flight."""
    audit_rows: Annotated[int, Field(ge=0)] = 8
    """Rows scored again with transformers in float32 to check the engine."""
    max_audit_gap: Annotated[float, Field(gt=0)] = 0.05
    """Largest mean absolute log-prob difference that the audit accepts, in nats per token."""
