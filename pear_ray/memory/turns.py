"""A trainer and an engine in one process: what each holds while it is the other's turn."""

from pear_ray.config.run import RunConfig
from pear_ray.engines.vllm.spec import GATHERED_BYTES
from pear_ray.memory.engine import EnginePlan, engine_resident, engine_sampling, engine_weights
from pear_ray.memory.items import Item, Moment, beside, moment
from pear_ray.memory.spread import PARAMETERS, gathered_root
from pear_ray.memory.trainer_plan import TrainerPlan
from pear_ray.memory.training import trainer_moments, trainer_state

MIB = 2**20


def colocated_moments(
    stage: str,
    config: RunConfig,
    trainer: TrainerPlan,
    engine: EnginePlan,
    handing_over: list[Moment],
) -> list[Moment]:
    """The moments of `sft` or `rl`, where `handing_over` is what giving weights takes besides.

    On a GPU the engine sleeps while the policy trains, where `rl.colocation.sleep` lets it (SFT's,
    which only evaluates, always does). Otherwise both are there all the time.
    """
    between = trainer_state(trainer, gradients=False)
    if config.cluster.device == "cuda" and (stage == "sft" or config.rl.colocation.sleep):
        # The moments are not among them where they rest in the host's memory.
        goes = stage == "rl" and config.rl.colocation.offload == "all"
        left = [item for item in between if not (goes and item.name == PARAMETERS)]
        return [
            *trainer_moments(trainer),
            *beside(handing_over, [engine_weights(engine)]),
            moment("the engine is awake", left, engine_resident(engine)),
        ]
    moments = [*trainer_moments(trainer), *handing_over]
    if config.cluster.device == "cpu":
        moments += beside(engine_sampling(engine), between)
    return list(beside(moments, engine_resident(engine)))


def gathered_for_sync(trainer: TrainerPlan) -> list[Item]:
    """What a sync holds whole: the root, copied for vLLM, and as many layers as may be ahead."""
    shape, each = trainer.shape, trainer.bytes_each
    root = gathered_root(trainer)
    layers = each * shape.num_layers * shape.layer_parameters
    ahead = min(layers, max(GATHERED_BYTES, each * shape.layer_parameters))
    merged = each * shape.layer_parameters if trainer.lora else 0
    return [
        root,
        Item(
            name="merged weights of a layer",
            num_bytes=merged,
            formula=f"{each} bytes x {shape.layer_parameters:,} parameters of a layer",
        ),
        Item(
            name="copy of embedding and head for the engine",
            num_bytes=root.num_bytes,
            formula=root.formula,
        ),
        Item(
            name="layers gathered ahead",
            num_bytes=ahead,
            formula=f"{each} bytes x {shape.layer_parameters:,} parameters of a layer, as many as "
            f"{GATHERED_BYTES // MIB} MiB hold",
        ),
    ]
