"""A run's phases: who is on a device at the same time, and what it has."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pear_ray.config.corpus import SampledCorpus
from pear_ray.config.evaluate import distinct_rewards, suites_of
from pear_ray.config.objectives import reference_top_k
from pear_ray.config.rewards import RewardConfig
from pear_ray.config.run import RunConfig
from pear_ray.config.spans import SPAN_SETTINGS, engine_span
from pear_ray.engines.vllm.spec import MAX_NUM_SEQS
from pear_ray.memory.activations import FLOAT32_BYTES, largest_microbatch
from pear_ray.memory.engine import (
    EnginePlan,
    engine_reload,
    engine_resident,
    engine_sampling,
    engine_scoring,
    engine_shortage,
)
from pear_ray.memory.items import Item, Moment, Phase, beside, moment
from pear_ray.memory.model_shape import ModelShape, read_shape
from pear_ray.memory.slack import engine_slack, trainer_slack
from pear_ray.memory.spread import PARAMETERS, spread_of
from pear_ray.memory.trainer_plan import TrainerPlan
from pear_ray.memory.training import loaded_whole, trainer_moments, trainer_state
from pear_ray.memory.turns import colocated_moments, gathered_for_sync

MIB = 2**20
# Measured by benchmarks/plan.py (figures beginning with "process"), with room for how they vary.
PROCESS_BYTES = {"sft": 520 * MIB, "deepspeed": 600 * MIB, "engine": 640 * MIB, "rl": 740 * MIB}
VERIFIER_BYTES = 140 * MIB
DRIVER_AND_RAY_BYTES = 1400 * MIB
PADDED_NOTE = (
    "the policy's rows are padded while it trains, and the masks of that are not counted: in each "
    "layer a row of the longest row's length in numbers for each token"
)
CUDA_NOTE = "the CUDA context, NCCL's buffers and fragmentation come on top"
REFERENCE_NOTE = (
    "rl.kl keeps a frozen copy of the policy, split like it, whose parameters are not counted here"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShapes:
    """Shapes of the run's models; behavior models by source (`*`: any)."""

    policy: ModelShape
    behavior: Mapping[str, ModelShape]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What there is, as far as it is known.

    Attributes:
        device_bytes: Memory of one GPU, or on CPU one worker's share; None where nobody said.
        host_bytes: Memory of this machine, whose CPUs a local run shares out.
    """

    device_bytes: int | None
    host_bytes: int


def read_shapes(policy: Path, behavior: Mapping[str, Path]) -> ModelShapes:
    """The shapes of the models in these folders.

    Raises:
        InputError: As `read_shape`.
    """
    return ModelShapes(
        policy=read_shape(policy),
        behavior={source: read_shape(folder) for source, folder in behavior.items()},
    )


def plan_phases(
    config: RunConfig, models: ModelShapes, memory: Memory, *, checkpointing: bool = False
) -> list[Phase]:
    """The memory of every stage that computes with a model, in the run's order.

    Args:
        config: The run.
        models: Its models' shapes.
        memory: What there is.
        checkpointing: As if layers were computed again in backward, whatever the run says.
    """
    phases = [
        _sft(config, models.policy, memory, checkpointing=checkpointing),
        _rl(config, models.policy, memory, checkpointing=checkpointing),
        _evaluate(config, models.policy, memory),
    ]
    if not models.behavior:  # the corpus brings its log-probs: no engine scores it
        return phases
    largest = max(models.behavior.values(), key=lambda shape: shape.num_parameters)
    phases = [_score(config, largest, memory), *phases]
    if isinstance(config.corpus, SampledCorpus):
        return [_collect(config, config.corpus, largest, memory), *phases]
    return phases


def _collect(config: RunConfig, corpus: SampledCorpus, shape: ModelShape, memory: Memory) -> Phase:
    engine = _engine(config, shape, memory, "collect")
    moments = beside(engine_sampling(engine), engine_resident(engine))
    return _engine_phase("collect", config, engine, memory, moments, corpus.rewards)


def _score(config: RunConfig, shape: ModelShape, memory: Memory) -> Phase:
    engine = _engine(
        config,
        shape,
        memory,
        "score",
        chunk_tokens=config.score.chunk_tokens,
        num_sequences=config.score.rows_per_block,
        top_k=config.score.top_k,
    )
    moments = beside(engine_scoring(engine), engine_resident(engine))
    return _engine_phase("score", config, engine, memory, moments)


def _evaluate(config: RunConfig, shape: ModelShape, memory: Memory) -> Phase:
    engine = _engine(config, shape, memory, "evaluate")
    resident = engine_resident(engine)
    moments = (
        moment("loading a checkpoint", resident, _loaded_checkpoint(engine)),
        *beside(engine_sampling(engine), resident),
    )
    # Suites that are verified alike share their processes.
    pools = distinct_rewards(config.evaluate)
    num_processes = sum(each.num_processes for each in pools)
    rewards = pools[0].model_copy(update={"num_processes": num_processes})
    phase = _engine_phase("evaluate", config, engine, memory, moments, rewards)
    on_host = (_whole_checkpoint(engine),) if engine.device == "cuda" else ()
    return dataclasses.replace(phase, on_host=on_host)


def _loaded_checkpoint(engine: EnginePlan) -> list[Item]:
    """What is there besides while an engine takes the weights of a checkpoint."""
    # transformers loads it into the host's memory, wherever the engine computes.
    whole = [_whole_checkpoint(engine)] if engine.device == "cpu" else []
    return [*whole, *engine_reload(engine)]


def _whole_checkpoint(engine: EnginePlan) -> Item:
    total = engine.shape.num_parameters
    return Item(
        name="checkpoint while it is loaded",
        num_bytes=FLOAT32_BYTES * total,
        formula=f"{FLOAT32_BYTES} bytes x {total:,} parameters, beside the engine's own",
    )


def _engine_phase(
    name: str,
    config: RunConfig,
    engine: EnginePlan,
    memory: Memory,
    moments: tuple[Moment, ...],
    rewards: RewardConfig | None = None,
) -> Phase:
    """A stage of `cluster.num_samplers` engines; its verifiers, if any, are beside the driver."""
    cluster = config.cluster
    num_workers = cluster.num_samplers * engine.tensor_parallel_size
    verifiers = rewards.num_processes * VERIFIER_BYTES if rewards else 0
    if cluster.device == "cuda" and engine.device_bytes is not None:
        moments = (moment("the engine", engine_resident(engine)),)  # passes are inside its share
    return Phase(
        name=name,
        num_workers=num_workers,
        moments=beside(moments, _process(config, "engine")),
        available_bytes=_available(config, memory, num_workers, beside_them=verifiers),
        shortage=engine_shortage(engine),
        slack_bytes=engine_slack(engine, moments),
        notes=_notes(config, engine.shape),
    )


def _sft(config: RunConfig, shape: ModelShape, memory: Memory, *, checkpointing: bool) -> Phase:
    trainer = TrainerPlan(
        shape=shape,
        num_trainers=config.cluster.num_trainers,
        batch=largest_microbatch(
            microbatch_tokens=config.sft.microbatch_tokens,
            max_model_len=config.models.max_model_len,
            num_rows=config.sft.global_batch_size // config.cluster.num_trainers,
            device=config.cluster.device,
            packs=shape.packs,
            setting="sft.microbatch_tokens",
        ),
        device=config.cluster.device,
        dtype=config.models.dtype,
        checkpointing=checkpointing or config.sft.activation_checkpointing,
        backend=config.sft.backend,
        keeps_average=config.sft.ema_decay is not None,
        num_candidates=_num_candidates(config),
        lora=config.sft.lora,
    )
    notes = _training_notes(config, shape)
    kind = "deepspeed" if config.sft.backend.kind == "deepspeed" else "sft"
    if config.sft.pass_at_k is not None:
        engine = _engine(config, shape, memory, "evaluate")
        between = trainer_state(trainer, gradients=False)
        loading = moment("loading weights to evaluate", between, _loaded_checkpoint(engine))
        verifiers = _verifiers(config, "evaluate", suites_of(config.evaluate)[0].rewards)
        return _colocated("sft", config, memory, trainer, engine, [loading], verifiers, notes)
    return Phase(
        name="sft",
        num_workers=config.cluster.num_trainers,
        moments=beside(trainer_moments(trainer), _process(config, kind)),
        available_bytes=_available(config, memory, config.cluster.num_trainers),
        slack_bytes=trainer_slack(trainer),
        on_host=_on_host(trainer),
        notes=notes,
    )


def _rl(config: RunConfig, shape: ModelShape, memory: Memory, *, checkpointing: bool) -> Phase:
    """Trainer and engine in one process, both there all the time."""
    ranks = config.cluster.num_trainers
    num_rows = config.rl.prompts_per_step // ranks * config.rl.group_size
    trainer = TrainerPlan(
        shape=shape,
        num_trainers=ranks,
        batch=largest_microbatch(
            microbatch_tokens=config.rl.microbatch_tokens,
            max_model_len=config.models.max_model_len,
            num_rows=num_rows,
            device=config.cluster.device,
            packs=shape.packs,
            setting="rl.microbatch_tokens",
            width_of_groups=shape.hidden_size,
        ),
        device=config.cluster.device,
        dtype=config.models.dtype,
        checkpointing=checkpointing or config.rl.activation_checkpointing,
        moments_on_host=config.cluster.device == "cuda" and config.rl.colocation.offload != "none",
        lora=config.rl.lora,
    )
    verifiers = _verifiers(config, "rl", config.rl.rewards)
    if config.rl.pass_at_k is not None:
        num_rows = max(num_rows, MAX_NUM_SEQS)  # a call of the evaluation fills the engine
        verifiers += _verifiers(config, "evaluate", suites_of(config.evaluate)[0].rewards)
    engine = _engine(config, shape, memory, "rl", num_sequences=num_rows)
    between = trainer_state(trainer, gradients=False)
    sync = moment("weight sync", between, gathered_for_sync(trainer), engine_reload(engine))
    notes = _training_notes(config, shape)
    if config.rl.kl.is_wanted and config.rl.lora is None:
        notes = (*notes, REFERENCE_NOTE)
    phase = _colocated("rl", config, memory, trainer, engine, [sync], verifiers, notes)
    if config.cluster.device == "cuda" and config.rl.colocation.offload == "all":
        moved = [item for item in between if item.name == PARAMETERS]
        phase = dataclasses.replace(phase, on_host=(*phase.on_host, *moved))
    return phase


def _colocated(
    name: str,
    config: RunConfig,
    memory: Memory,
    trainer: TrainerPlan,
    engine: EnginePlan,
    handing_over: list[Moment],
    verifiers: list[Item],
    notes: tuple[str, ...],
) -> Phase:
    """A stage whose workers each hold a trainer and an engine."""
    alone = beside(engine_sampling(engine), engine_resident(engine))
    moments = colocated_moments(name, config, trainer, engine, handing_over)
    return Phase(
        name=name,
        num_workers=config.cluster.num_trainers,
        moments=beside(moments, [*_process(config, "rl"), *verifiers]),
        available_bytes=_available(config, memory, config.cluster.num_trainers),
        shortage=engine_shortage(engine),
        slack_bytes=trainer_slack(trainer) + engine_slack(engine, alone),
        on_host=_on_host(trainer),
        notes=notes,
    )


def _on_host(trainer: TrainerPlan) -> tuple[Item, ...]:
    """What a rank on a GPU has in the host's memory, at one time or another."""
    loaded = [loaded_whole(trainer)] if trainer.device == "cuda" else []
    return (*spread_of(trainer).kept_on_host, *loaded)


def _engine(
    config: RunConfig,
    shape: ModelShape,
    memory: Memory,
    stage: str,
    *,
    chunk_tokens: int | None = None,
    num_sequences: int = MAX_NUM_SEQS,
    top_k: int = 0,
) -> EnginePlan:
    """An engine of `stage`."""
    return EnginePlan(
        shape=shape,
        dtype=config.models.dtype,
        device=config.cluster.device,
        max_model_len=config.models.max_model_len,
        kv_cache_gib=config.cluster.kv_cache_gib,
        gpu_memory_fraction=config.cluster.gpu_memory_fraction,
        device_bytes=memory.device_bytes,
        chunk_tokens=chunk_tokens,
        num_sequences=num_sequences,
        top_k=top_k,
        tensor_parallel_size=engine_span(config, stage),
        parallel_setting=SPAN_SETTINGS[stage],
    )


def _process(config: RunConfig, kind: str) -> list[Item]:
    """On CPU a worker's code is in the same memory; on CUDA it is in the host's."""
    size = PROCESS_BYTES[kind] if config.cluster.device == "cpu" else 0
    return [Item(name="process with its libraries", num_bytes=size, formula="as measured")]


def _verifiers(config: RunConfig, section: str, rewards: RewardConfig) -> list[Item]:
    num = rewards.num_processes
    return [
        Item(
            name="verifier processes",
            num_bytes=num * VERIFIER_BYTES if config.cluster.device == "cpu" else 0,
            formula=f"{VERIFIER_BYTES // MIB} MiB as measured x {num}",
            setting=f"{section}.rewards.num_processes",
        )
    ]


def _available(
    config: RunConfig, memory: Memory, num_workers: int, *, beside_them: int = 0
) -> int | None:
    """What one worker has; on this machine its equal share of what driver and Ray leave."""
    if memory.device_bytes is not None:
        return memory.device_bytes
    if config.cluster.device == "cuda" or config.cluster.address is not None:
        return None
    return max(0, memory.host_bytes - DRIVER_AND_RAY_BYTES - beside_them) // num_workers


def _num_candidates(config: RunConfig) -> int:
    """Ids besides its own that SFT compares each token on."""
    objective = config.sft.objective
    return config.score.top_k if objective.kind == "forward_kl" else reference_top_k(objective)


def _notes(config: RunConfig, shape: ModelShape) -> tuple[str, ...]:
    notes = (shape.estimated,) if shape.estimated else ()
    return (*notes, CUDA_NOTE) if config.cluster.device == "cuda" else notes


def _training_notes(config: RunConfig, shape: ModelShape) -> tuple[str, ...]:
    return (*(() if shape.packs else (PADDED_NOTE,)), *_notes(config, shape))
