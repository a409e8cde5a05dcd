"""Which stages of a run fit on which nodes of a cluster, how long they take, and what they cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pear_ray.clusters.instances import DEVICE_OF
from pear_ray.clusters.shape import ClusterShape, NodeKind
from pear_ray.config.run import RunConfig
from pear_ray.config.spans import engine_span
from pear_ray.memory.durations import Workload, plan_durations
from pear_ray.memory.items import Phase, Verdict, size
from pear_ray.memory.mend import find_mends
from pear_ray.memory.pace import DEVICES, pace_of_gpu
from pear_ray.memory.phases import Memory, ModelShapes, plan_phases

HOUR_S = 3600
TRAINING = ("sft", "rl")  # what loses work when a node is taken back


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A stage on one type of node.

    Attributes:
        kind: The type.
        num_nodes: How many it takes.
        seconds: How long; None where the pace of the type is not known.
        dollars: For the nodes; None where time or price is not known.
        why_not: Why it does not fit, and what would; None where it does.
        notes: What is good to know besides.
    """

    kind: NodeKind
    num_nodes: int = 0
    seconds: float | None = None
    dollars: float | None = None
    why_not: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFits:
    """A stage on every type of node, the chosen one first.

    Attributes:
        stage: Its name.
        num_workers: Workers that it has at once.
        fits: For each type.
    """

    stage: str
    num_workers: int
    fits: tuple[Fit, ...]

    @property
    def chosen(self) -> Fit | None:
        """The cheapest type that fits, or the fastest where no price is known; None: none fits."""
        return self.fits[0] if self.fits and self.fits[0].why_not is None else None


def fit_stages(
    config: RunConfig, models: ModelShapes, shape: ClusterShape, workload: Workload
) -> list[StageFits]:
    """Every stage that computes with a model, in the run's order, on every type of node."""
    planned = {kind.name: _planned(config, models, kind, workload) for kind in shape.workers}
    phases = plan_phases(config, models, Memory(device_bytes=None, host_bytes=0))
    stages = []
    for phase in phases:
        fits = []
        for kind in shape.workers:
            on_kind, seconds = planned[kind.name]
            fits.append(
                _fit(config, models, shape, kind, on_kind[phase.name], seconds.get(phase.name))
            )
        stages.append(
            StageFits(
                stage=phase.name,
                num_workers=phase.num_workers,
                fits=tuple(sorted(fits, key=_preference)),
            )
        )
    return stages


def _planned(
    config: RunConfig, models: ModelShapes, kind: NodeKind, workload: Workload
) -> tuple[dict[str, Phase], dict[str, float]]:
    """The stages' memory and seconds on a type of node."""
    memory = _memory(config, kind)
    phases = {phase.name: phase for phase in plan_phases(config, models, memory)}
    device = DEVICE_OF.get(kind.gpu or "")
    if config.cluster.device == "cpu" or device is None:
        return phases, {}
    pace = pace_of_gpu(DEVICES[device], config.models.dtype)
    return phases, {
        each.phase: each.seconds for each in plan_durations(config, models, pace, workload)
    }


def _memory(config: RunConfig, kind: NodeKind) -> Memory:
    if config.cluster.device == "cuda":
        return Memory(device_bytes=kind.gpu_bytes, host_bytes=kind.memory_bytes)
    per_node = max(1, int(kind.cpus / config.cluster.cpus_per_worker))
    return Memory(device_bytes=kind.memory_bytes // per_node, host_bytes=kind.memory_bytes)


def _preference(fit: Fit) -> tuple[bool, float, float]:
    """What fits first, then what is cheaper, then what is faster."""
    unknown = math.inf
    return (
        fit.why_not is not None,
        unknown if fit.dollars is None else fit.dollars,
        unknown if fit.seconds is None else fit.seconds,
    )


def _fit(
    config: RunConfig,
    models: ModelShapes,
    shape: ClusterShape,
    kind: NodeKind,
    phase: Phase,
    seconds: float | None,
) -> Fit:
    most = kind.max_nodes if shape.max_workers is None else min(kind.max_nodes, shape.max_workers)
    together = engine_span(config, phase.name)
    per_node = _per_node(config, kind, together)
    why_not = _why_not(config, models, kind, phase, per_node=per_node, most=most)
    if why_not is not None:
        return Fit(kind=kind, why_not=why_not)
    num_nodes = math.ceil(phase.num_workers / per_node)
    notes = []
    if num_nodes > most:  # scoring begins with fewer, and takes longer
        seconds = seconds and seconds * phase.num_workers / (most * per_node)
        notes.append(f"with {most * per_node} of {phase.num_workers} workers")
        num_nodes = most
    if phase.name in TRAINING and kind.is_spot:
        notes.append("may be taken back: costs the steps since the last checkpoint")
    if phase.verdict is Verdict.TIGHT:
        notes.append("tight")
    if phase.verdict is Verdict.UNKNOWN:
        notes.append("memory not judged: which GPU is not said")
    dollars = None
    if seconds is not None and kind.dollars_per_hour is not None:
        dollars = num_nodes * kind.dollars_per_hour * seconds / HOUR_S
    return Fit(kind=kind, num_nodes=num_nodes, seconds=seconds, dollars=dollars, notes=tuple(notes))


def _per_node(config: RunConfig, kind: NodeKind, together: int) -> int:
    """Workers that one node holds."""
    by_cpus = int(kind.cpus / config.cluster.cpus_per_worker)
    most = by_cpus if config.cluster.device == "cpu" else min(by_cpus, kind.gpus)
    return most // together * together


def _why_not(
    config: RunConfig,
    models: ModelShapes,
    kind: NodeKind,
    phase: Phase,
    *,
    per_node: int,
    most: int,
) -> str | None:
    """Why a stage does not fit on a type of node, and what would; None where it does."""
    keeps_off = config.cluster.training_nodes == "on_demand"
    if phase.name in TRAINING and kind.is_spot and keeps_off:
        return "may be taken back; training stays off it (cluster.training_nodes=any lets it on)"
    if config.cluster.device == "cuda" and not kind.gpus:
        return "has no GPU"
    if not per_node:
        together = engine_span(config, phase.name)
        gpus = f"{together} GPU and " if config.cluster.device == "cuda" else ""
        return (
            f"a node has {kind.gpus} GPU and {kind.cpus} CPUs, and one engine or worker wants "
            f"{gpus}{together * config.cluster.cpus_per_worker:g} CPUs; lower "
            "cluster.cpus_per_worker"
        )
    if phase.verdict is Verdict.TOO_LARGE:
        return _too_large(config, models, kind, phase)
    too_little = _too_little_host(kind, phase, per_node=per_node)
    return too_little or _too_few(config, phase, per_node=per_node, most=most)


def _too_little_host(kind: NodeKind, phase: Phase, *, per_node: int) -> str | None:
    """Why a node's own memory does not do for the workers on it; None where it may."""
    if not phase.on_host:
        return None
    # The largest alone: what is loaded has gone before the rest is there.
    largest = max(phase.on_host, key=lambda item: item.num_bytes)
    workers = min(per_node, phase.num_workers)
    if workers * largest.num_bytes <= kind.memory_bytes:
        return None
    return (
        f"a node has {size(kind.memory_bytes)} beside its GPUs, and its {workers} workers hold "
        f"{size(workers * largest.num_bytes)} there ({largest.name}); take nodes with more memory, "
        "or a smaller model"
    )


def _too_few(config: RunConfig, phase: Phase, *, per_node: int, most: int) -> str | None:
    """Why there are not enough nodes; None where there are."""
    if not most:
        return "turned off: its maximum is 0"
    wanted = math.ceil(phase.num_workers / per_node)
    if wanted > most and not _may_begin_with(config, phase, most * per_node):
        field = "num_trainers" if phase.name in TRAINING else "num_samplers"
        workers = "worker wants" if phase.num_workers == 1 else "workers want"
        return (
            f"{phase.num_workers} {workers} {wanted} nodes ({per_node} on each), and there are at "
            f"most {most}; raise the maximum to {wanted}, or set cluster.{field}={most * per_node}"
        )
    return None


def _may_begin_with(config: RunConfig, phase: Phase, num_workers: int) -> bool:
    """Whether scoring goes with so few: it grows as nodes appear."""
    least = config.cluster.min_samplers
    return phase.name == "score" and least is not None and least <= num_workers


def _too_large(config: RunConfig, models: ModelShapes, kind: NodeKind, phase: Phase) -> str:
    mends = find_mends(config, phase.name, lambda run: plan_phases(run, models, _memory(run, kind)))
    if phase.shortage:
        words = f"an engine cannot start: {phase.shortage.words}"
    else:
        had = "" if phase.available_bytes is None else f" of {size(phase.available_bytes)}"
        words = f"a worker takes {size(phase.peak.num_bytes)}{had}"
    if not mends:
        return f"{words}, and no setting mends it"
    return f"{words}; {' or '.join(mend.words for mend in mends[:2])} mends it"


def total_dollars(stages: Sequence[StageFits], shape: ClusterShape) -> float | None:
    """Nodes of the chosen types, and the head all the time; None where anything is not known."""
    seconds = total_seconds(stages)
    costs = [each.chosen.dollars if each.chosen else None for each in stages]
    known = [cost for cost in costs if cost is not None]
    head = shape.head[1]
    if seconds is None or head is None or len(known) < len(stages):
        return None
    return sum(known) + head * seconds / HOUR_S


def total_seconds(stages: Sequence[StageFits]) -> float | None:
    """All stages on their chosen types, one after the other; None where one is not known."""
    times = [each.chosen.seconds if each.chosen else None for each in stages]
    known = [each for each in times if each is not None]
    return sum(known) if len(known) == len(stages) else None
