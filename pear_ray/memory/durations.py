"""How long each phase of a run will take: FLOPs and bytes over a pace, and measured start-ups.

An estimate: it knows neither how long rows are (the workload says) nor how full a GPU is kept (the
pace assumes). FLOPs of a pass over given tokens are 2 N per token and, for attention, 4 x layers x
width of the queries x length per token, as if it were not causal; a training step takes three such
passes (6 N), with activation checkpointing four (8 N), and RL another for the log-probs of a
reference, and of the policy before a batch's updates, where it wants them.
"""

import math
from dataclasses import dataclass

from pear_ray.algorithms.batch_sizes import ENOUGH_TOKENS, enough_group_tokens
from pear_ray.config.corpus import SampledCorpus
from pear_ray.config.evaluate import suites_of
from pear_ray.config.rl import RlConfig
from pear_ray.config.run import RunConfig
from pear_ray.config.sft import needs_initial_policy, needs_step_weights
from pear_ray.config.spans import engine_span
from pear_ray.engines.vllm.spec import MAX_NUM_SEQS
from pear_ray.memory.engine import DTYPE_BYTES
from pear_ray.memory.model_shape import ModelShape
from pear_ray.memory.pace import Pace
from pear_ray.memory.phases import ModelShapes
from pear_ray.tasks.problem_sets import num_problems

FORWARDS_PER_STEP, FORWARDS_WHEN_CHECKPOINTING = 3, 4
ROWS_WITHOUT_NUMBER = 1000  # what is planned of a corpus that nobody has counted
# Measured on the demo, on two CPU cores (docs/planning.md): what its stages took but for sampling
# and training, which is to start processes and engines. A GPU's engine takes longer: it captures
# graphs.
START_S = {"collect": 10.0, "score": 12.0, "sft": 16.0, "rl": 24.0, "evaluate": 14.0}
# From the same run, beside computing: a decoding step of all sequences (of vLLM), a training step
# (of rewards, checks, weight sync and logs), and each of a rank's microbatches (of PyTorch).
DECODE_STEP_S = 0.006
UPDATE_S = 0.05
MICROBATCH_S = 0.06


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Sizes that a run file does not hold.

    Attributes:
        num_rows: Rows of the corpus; None where nobody said.
        row_tokens: Mean tokens of a row, prompt and completion.
        completion_tokens: Mean tokens of a sampled completion; None: half of what is allowed.
    """

    num_rows: int | None
    row_tokens: int
    completion_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Something a phase spends time on, and how that was worked out."""

    name: str
    seconds: float
    formula: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Duration:
    """How long a phase takes."""

    phase: str
    parts: tuple[Part, ...]

    @property
    def seconds(self) -> float:
        """All parts, one after the other."""
        return sum(part.seconds for part in self.parts)


def plan_durations(
    config: RunConfig, models: ModelShapes, pace: Pace, workload: Workload
) -> list[Duration]:
    """The time of every stage that computes with a model, in the run's order."""
    # Of a corpus that brings its log-probs nobody scores a row.
    scorers = list(models.behavior.values()) or [models.policy]
    largest = max(scorers, key=lambda shape: shape.num_parameters)
    corpus, cluster = config.corpus, config.cluster
    policy, rows = models.policy, num_rows(config, workload)
    decode = _Decoding(config, pace, workload)
    phases: dict[str, list[Part]] = {}
    if isinstance(corpus, SampledCorpus):
        sequences = num_problems(corpus.problems) * corpus.samples_per_problem
        phases["collect"] = decode.parts(
            largest,
            sequences,
            corpus.max_tokens,
            engines=cluster.num_samplers,
            span=engine_span(config, "collect"),
        )
    if models.behavior:
        over = cluster.num_samplers * engine_span(config, "score")
        phases["score"] = [
            _passes("scoring", largest, rows, workload, pace, share=pace.prefill_share, over=over)
        ]
    phases["sft"] = _sft(config, policy, rows, workload, pace)
    phases["rl"] = _rl(config, policy, decode, workload, pace)
    phases["evaluate"] = [
        part
        for suite in suites_of(config.evaluate)
        for part in decode.parts(
            policy,
            len(config.evaluate.checkpoints) * num_problems(suite.problems) * suite.num_samples,
            suite.max_tokens,
            engines=cluster.num_samplers,
            span=engine_span(config, "evaluate"),
        )
    ]
    on_cpu = cluster.device == "cpu"
    return [
        Duration(phase=name, parts=(*parts, *([_start(name)] if on_cpu else [])))
        for name, parts in phases.items()
    ]


def num_rows(config: RunConfig, workload: Workload) -> int:
    """Rows of the corpus: as said, or all samples that may be kept, or a thousand."""
    if workload.num_rows is not None:
        return workload.num_rows
    if isinstance(config.corpus, SampledCorpus):
        return num_problems(config.corpus.problems) * config.corpus.samples_per_problem
    return ROWS_WITHOUT_NUMBER


def forward_flops(shape: ModelShape, length: int) -> float:
    """FLOPs of a pass over a row of `length` tokens."""
    attention = 4 * shape.num_layers * shape.query_size * length
    return float(length * (2 * shape.num_parameters + attention))


def _sft(
    config: RunConfig, shape: ModelShape, rows: int, workload: Workload, pace: Pace
) -> list[Part]:
    sft, ranks = config.sft, config.cluster.num_trainers
    forwards = FORWARDS_WHEN_CHECKPOINTING if sft.activation_checkpointing else FORWARDS_PER_STEP
    averages = sft.weights.kind == "pear" and sft.weights.ratio_policy == "ema"
    forwards += averages + (sft.objective.kind == "talr" or needs_step_weights(sft.weights))
    parts = [
        _passes(
            "training",
            shape,
            rows * sft.num_epochs,
            workload,
            pace,
            share=pace.training_share,
            over=ranks,
            forwards=forwards,
        )
    ]
    if needs_initial_policy(sft):
        scorers = config.cluster.num_samplers
        share = pace.prefill_share
        name = "scores of the initial policy"
        parts.append(_passes(name, shape, rows, workload, pace, share=share, over=scorers))
    if config.cluster.device == "cpu":
        steps = sft.num_epochs * math.ceil(rows / sft.global_batch_size)
        tokens = min(rows, sft.global_batch_size) / ranks * workload.row_tokens
        enough = max(ENOUGH_TOKENS["cpu"], workload.row_tokens) if shape.packs else math.inf
        parts.append(_besides(steps, math.ceil(tokens / min(sft.microbatch_tokens, enough))))
    return parts


def _rl(
    config: RunConfig, shape: ModelShape, decode: "_Decoding", workload: Workload, pace: Pace
) -> list[Part]:
    """A step samples with every rank's engine, trains on all of it, and copies the weights."""
    rl, ranks = config.rl, config.cluster.num_trainers
    sequences = rl.prompts_per_step * rl.group_size
    span = rl.tensor_parallel_size
    sampling = decode.parts(
        shape, sequences, rl.max_tokens, engines=ranks // span, span=span, times=rl.num_steps
    )
    training = _passes(
        "training",
        shape,
        sequences * rl.num_steps,
        workload,
        pace,
        share=pace.training_share,
        over=ranks,
        forwards=_rl_forwards(rl),
    )
    copied = 2 * DTYPE_BYTES[config.models.dtype] * shape.num_parameters  # read, and written
    sync = Part(
        name="weight sync",
        seconds=rl.num_steps * copied / (pace.bytes_per_s * pace.decoding_share),
        formula=f"{rl.num_steps} x {copied:,} bytes",
    )
    parts = [*sampling, training, sync]
    if config.cluster.device == "cpu":
        parts.append(_besides(rl.num_steps, _rl_microbatches(config, shape, workload)))
    return parts


def _rl_microbatches(config: RunConfig, shape: ModelShape, workload: Workload) -> int:
    """Of a rank in a step on CPU. A policy that packs computes a group's prompt once."""
    rl, ranks = config.rl, config.cluster.num_trainers
    rows = rl.prompts_per_step * rl.group_size / ranks
    given = math.ceil(rows * workload.row_tokens / rl.microbatch_tokens)
    if not shape.packs:
        return given
    enough = max(enough_group_tokens("cpu", hidden_size=shape.hidden_size), workload.row_tokens)
    prompt, completion = _row_parts(workload, rl.max_tokens)
    computed = rows * completion + rl.prompts_per_step / ranks * prompt
    return max(given, math.ceil(computed / enough))


def _rl_forwards(rl: RlConfig) -> int:
    """Passes over a trained row: those of a step, and those that only give log-probs."""
    forwards = FORWARDS_WHEN_CHECKPOINTING if rl.activation_checkpointing else FORWARDS_PER_STEP
    in_reward = rl.kl.coefficient > 0 and rl.kl.placement == "reward"
    return forwards + (rl.updates_per_batch > 1 or in_reward) + rl.kl.is_wanted


def _passes(
    name: str,
    shape: ModelShape,
    rows: int,
    workload: Workload,
    pace: Pace,
    *,
    share: float,
    over: int,
    forwards: int = 1,
) -> Part:
    """Passes over given rows, split over `over` workers."""
    flops = forwards * rows * forward_flops(shape, workload.row_tokens)
    each = f"{2 * forwards} x {shape.num_parameters:,} parameters and attention"
    return Part(
        name=name,
        seconds=flops / (pace.flops_per_s * share * over),
        formula=f"{rows:,} rows x {workload.row_tokens:,} tokens x ({each}) = {flops:.2g} FLOPs "
        f"over {over} worker{'s' if over > 1 else ''}",
    )


@dataclass(frozen=True, slots=True)
class _Decoding:
    """Sampling: prompts are passes over given tokens, completions one token of all at a time."""

    config: RunConfig
    pace: Pace
    workload: Workload

    def parts(
        self,
        shape: ModelShape,
        sequences: int,
        max_tokens: int,
        *,
        engines: int,
        span: int,
        times: int = 1,
    ) -> list[Part]:
        """Of `sequences` over `engines` of `span` devices each, done `times` times.

        What the devices of an engine tell each other is not counted.
        """
        pace, dtype_bytes = self.pace, DTYPE_BYTES[self.config.models.dtype]
        prompt, completion = _row_parts(self.workload, max_tokens)
        mine = math.ceil(sequences / engines)
        waves = math.ceil(mine / MAX_NUM_SEQS)
        batch = math.ceil(mine / waves)
        cached = batch * (prompt + completion // 2) * 2 * shape.num_layers * shape.key_size
        read = dtype_bytes * (shape.num_parameters + cached)
        by_bytes = read / (pace.bytes_per_s * pace.decoding_share * span)
        by_flops = 2 * shape.num_parameters * batch / (pace.flops_per_s * pace.prefill_share * span)
        besides = DECODE_STEP_S if self.config.cluster.device == "cpu" else 0.0
        steps = times * waves * completion
        bound = "memory" if by_bytes >= by_flops else "computing"
        prompts = times * mine * forward_flops(shape, prompt)
        over = f" of {span} devices" if span > 1 else ""
        return [
            Part(
                name="prompts",
                seconds=prompts / (pace.flops_per_s * pace.prefill_share * span),
                formula=f"{times * mine:,} x {prompt:,} tokens for each engine{over}",
            ),
            Part(
                name="decoding",
                seconds=steps * (max(by_bytes, by_flops) + besides),
                formula=f"{steps:,} steps of {batch} sequences, each bound by {bound}: "
                f"{read:.2g} bytes, {2 * shape.num_parameters * batch:.2g} FLOPs"
                + (f", and {1e3 * besides:g} ms" if besides else ""),
            ),
        ]


def _start(name: str) -> Part:
    return Part(name="start", seconds=START_S[name], formula="as the demo took on two CPU cores")


def _row_parts(workload: Workload, max_tokens: int) -> tuple[int, int]:
    """Mean tokens of a prompt and of its completion of at most `max_tokens`."""
    completion = workload.completion_tokens or max(1, max_tokens // 2)
    return max(1, workload.row_tokens - completion), completion


def _besides(steps: int, microbatches: int) -> Part:
    """Of `steps` steps on CPU, each of so many microbatches of a rank."""
    return Part(
        name="beside computing",
        seconds=steps * (UPDATE_S + microbatches * MICROBATCH_S),
        formula=f"{steps:,} steps x ({UPDATE_S:g} s + {microbatches} microbatches x "
        f"{MICROBATCH_S:g} s), as the demo took",
    )
