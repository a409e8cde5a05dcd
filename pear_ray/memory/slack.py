"""By how much measured peaks on CPU were above a plan: glibc's heap, and what varies."""

from collections.abc import Sequence

from pear_ray.memory.activations import FLOAT32_BYTES, LARGE_BLOCK_BYTES, small_block_bytes
from pear_ray.memory.engine import EnginePlan
from pear_ray.memory.items import GIB, Moment
from pear_ray.memory.trainer_plan import TrainerPlan
from pear_ray.memory.training import trainer_moments, trainer_state

# Shares by which measured peaks on CPU were above the plan (benchmarks/results/plan.json), rounded
# up: of an engine without its KV cache; of a trainer's tensors of less than 32 MiB, which glibc's
# heap holds, with gaps; of its larger ones. Parameters and moments stay where they are.
ENGINE_SLACK = 0.2
HEAP_SLACK = 0.85
LARGE_BLOCK_SLACK = 0.1


def engine_slack(engine: EnginePlan, moments: Sequence[Moment]) -> int:
    """Bytes by which an engine with such moments may be above its plan, on CPU."""
    if engine.device != "cpu":
        return 0
    most = max(each.num_bytes for each in moments)
    return int(ENGINE_SLACK * (most - engine.kv_cache_gib * GIB))


def trainer_slack(trainer: TrainerPlan) -> int:
    """Bytes by which a trainer may be above its plan, on CPU."""
    if trainer.device != "cpu":
        return 0
    shape, batch = trainer.shape, trainer.batch
    most = max(each.num_bytes for each in trainer_moments(trainer))
    stays = sum(item.num_bytes for item in trainer_state(trainer, gradients=False))
    changing = max(0, most - stays)
    small = small_block_bytes(shape, batch, bytes_each=trainer.bytes_each)
    # Gradients come in one block per layer.
    in_layer = FLOAT32_BYTES * trainer.layer_trained
    if in_layer < LARGE_BLOCK_BYTES:
        small += in_layer * shape.num_layers // trainer.num_trainers
    small = min(small, changing)
    return int(HEAP_SLACK * small + LARGE_BLOCK_SLACK * (changing - small))
