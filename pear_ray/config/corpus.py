"""The offline corpus: sampled from the behavior model, or rows that are there; and its scoring."""

from typing import Annotated, Literal

from pydantic import Field

from pear_ray.config.base import Section
from pear_ray.config.problems import ProblemSetConfig
from pear_ray.config.rewards import RewardConfig


class SampledCorpus(Section):
    """The behavior model answers problems; answers that verify become the corpus."""

    kind: Literal["sampled"]
    problems: ProblemSetConfig
    """The problems to answer."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of the sampling; null takes the run's. Runs that differ in their seed share one corpus
    where this is set."""
    samples_per_problem: Annotated[int, Field(gt=0)] = 4
    """Completions sampled for each problem."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature. At any other than 1, the log-probs as sampled are not the model's
    own."""
    max_tokens: Annotated[int, Field(gt=0)] = 128
    """Longest completion, in tokens."""
    keep: Literal["verified", "labelled"] = "verified"
    """`verified` keeps completions that verify; `labelled` keeps the others that ended by
    themselves as well, marked `is_negative`."""
    rewards: RewardConfig = RewardConfig()
    """How completions are verified."""
    tensor_parallel_size: Annotated[int, Field(gt=0)] = 1
    """Devices of one node that each engine is spread over, as `evaluate.tensor_parallel_size`; it
    must divide every behavior model's attention heads."""


class ColumnsConfig(Section):
    """What the corpus calls its columns.

    A row has `messages`, or `prompt` and `completion`, or `token_ids` and `loss_mask`.
    """

    messages: str = "messages"
    """A list of turns with `role` and `content`."""
    prompt: str = "prompt"
    """Text of the user's turn."""
    completion: str = "completion"
    """Text of the assistant's turn."""
    token_ids: str = "token_ids"
    """Ids of the policy's own tokenizer, prompt and completion together."""
    loss_mask: str = "loss_mask"
    """One boolean per id: whether it trains."""
    id: str = "id"
    """The row's own id (optional; file and row number without it)."""
    source: str = "source"
    """Which behavior policy wrote the row (optional)."""
    is_negative: str = "is_negative"
    """Whether the row is known to be wrong (optional)."""
    behavior_logprobs: str = "behavior_logprobs"
    """Log-probs collected before, one per id or one per token that trains (optional)."""


class DatasetCorpus(Section):
    """Rows that are there already, in one file or many, here or on an object store."""

    kind: Literal["dataset"]
    path: str
    """A file, a folder of files, a pattern with `*` (`**` for folders of any depth), a folder made
    by `Dataset.save_to_disk`, an s3:// or gs:// URI of any of the first three, `hub:NAME`, or
    `embedded:automaton/corpus.parquet`, which comes with the package. Files whose name begins with
    a dot are passed over."""
    format: Literal["auto", "jsonl", "parquet", "arrow", "saved", "hub"] = "auto"
    """What the files are; `auto` goes by their endings."""
    split: str = "train"
    """Which split of a saved or hub dataset that has several."""
    columns: ColumnsConfig = ColumnsConfig()
    """What the corpus calls its columns."""
    source: str = "corpus"
    """Which behavior policy wrote the rows that do not say."""
    train_on: Literal["all", "last"] = "all"
    """Which assistant turns train: all of them, or the last one of each row."""
    too_long: Literal["drop", "cut"] = "drop"
    """What becomes of rows longer than `models.max_model_len`: left out, or cut at their end."""
    unreadable_files: Literal["stop", "skip"] = "stop"
    """Whether a file that cannot be read stops the run, once all others are prepared, or is left
    out with a warning."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """A larger share of rows that cannot be used stops the run."""
    rows_per_part: Annotated[int, Field(gt=0)] = 4096
    """Rows prepared, written and taken up again together."""


def train_on(corpus: SampledCorpus | DatasetCorpus) -> Literal["all", "last"]:
    """Which assistant turns train; a sampled row has one."""
    return corpus.train_on if isinstance(corpus, DatasetCorpus) else "all"


def sampling_seed(corpus: SampledCorpus, *, run_seed: int) -> int:
    """The seed that the corpus is sampled with."""
    return run_seed if corpus.seed is None else corpus.seed


CorpusConfig = Annotated[SampledCorpus | DatasetCorpus, Field(discriminator="kind")]


class ScoreConfig(Section):
    """Behavior log-probs of exactly the corpus's token ids."""

    chunk_tokens: Annotated[int, Field(gt=0)] = 2048
    """Tokens of one forward pass while scoring. A longer row is cut into such chunks, so that its
    logits take at most about 9 bytes x `chunk_tokens` x vocabulary."""
    rows_per_block: Annotated[int, Field(gt=0)] = 256
    """Rows scored and written together; a killed run loses at most the blocks in flight."""
    tensor_parallel_size: Annotated[int, Field(gt=0)] = 1
    """Devices of one node that each scoring engine is spread over, for a model that does not fit on
    one; it must divide the model's attention heads. Each takes as many CPUs as a worker, too."""
    top_k: Annotated[int, Field(ge=0, le=1000)] = 0
    """How many candidates to keep for each token that trains, for distillation: the behavior
    model's likeliest ids, the token's own among them, with their log-probs. They take 8 bytes x
    `top_k` per such token; 0 keeps none."""
    given: Literal["rescore", "keep"] = "rescore"
    """What becomes of log-probs that came with a row: scored again, or kept as they are (for
    authors that cannot be scored, such as a closed model)."""
    proxy_sources: list[str] = Field(default=[])
    """Sources whose behavior model is not what wrote them (people, a closed model): their
    log-probs are a stand-in, and `diagnose` says so."""
    audit_rows: Annotated[int, Field(ge=0)] = 8
    """Rows scored again with transformers in float32 to check the engine."""
    max_audit_gap: Annotated[float, Field(gt=0)] = 0.05
    """Largest mean absolute log-prob difference that the audit accepts, in nats per token."""
