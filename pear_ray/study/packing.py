"""How many runs of a study go at once, and what each takes."""

from collections.abc import Mapping
from dataclasses import dataclass

from pear_ray.config.spans import engine_span
from pear_ray.config.study_plan import StudyPlan
from pear_ray.distributed.capacity import worker_resources
from pear_ray.errors import ConfigError

DRIVER_CPUS = 0.0  # of a worker that only drives: its run's own groups ask for what they need


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How the runs share the cluster.

    Attributes:
        packed: Whether a run is one process.
        at_once: Runs at a time.
        cpus: What a worker of the pool asks Ray for.
        gpus: The same.
    """

    packed: bool
    at_once: int
    cpus: float
    gpus: float


def packing_of(plan: StudyPlan, resources: Mapping[str, float]) -> Packing:
    """The packing of the study on a cluster of `resources`.

    Raises:
        ConfigError: Runs of several trainers, or with engines over several devices, are to be
            packed.
    """
    study, cluster = plan.study, plan.shared_run().cluster
    span = engine_span(plan.shared_run(), "evaluate")
    packed = cluster.num_trainers == span == 1 if study.packed is None else study.packed
    if packed and span > 1:
        raise ConfigError(
            f"packed=true wants runs on one device, and evaluate.tensor_parallel_size={span}; set "
            "it to 1 in `overrides`, or leave `packed` out"
        )
    if packed and cluster.num_trainers > 1:
        raise ConfigError(
            f"packed=true wants runs of one trainer, and cluster.num_trainers="
            f"{cluster.num_trainers}; set it to 1 in `overrides`, or leave `packed` out"
        )
    wanted = worker_resources(cluster)
    if packed and "GPU" in wanted:
        wanted["GPU"] = study.gpus_per_run
    whole = {name: amount * cluster.num_trainers for name, amount in wanted.items()}
    fitting = min(int(resources.get(name, 0.0) / amount + 1e-9) for name, amount in whole.items())
    at_once = study.runs_at_once or max(1, fitting)
    if packed:
        return Packing(
            packed=True, at_once=at_once, cpus=wanted["CPU"], gpus=wanted.get("GPU", 0.0)
        )
    return Packing(packed=False, at_once=at_once, cpus=DRIVER_CPUS, gpus=0.0)
