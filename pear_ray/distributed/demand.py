"""Places that a stage asks of a cluster at once: whether they fit, and in words if not.

Starts nothing, imports no Ray.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pear_ray.config.corpus import SampledCorpus
from pear_ray.config.run import RunConfig
from pear_ray.config.sections import ClusterConfig
from pear_ray.config.spans import SPAN_SETTINGS
from pear_ray.distributed.capacity import CPU_SHARE_LEFT, engine_resources, worker_resources
from pear_ray.records import HALF_STAGES

SLACK = 1e-6  # of sums of fractions of a CPU
TRAINING_STAGES = ("sft", "ready", "rl", *HALF_STAGES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Equal places, each on one node.

    Attributes:
        place: What one asks of its node.
        count: How many there are to be at the same time.
        settings: The settings that decide it, as `cluster.num_trainers=2`.
    """

    place: Mapping[str, float]
    count: int
    settings: str

    @property
    def device(self) -> str:
        """What it is counted in: GPUs where it asks for any, else CPUs."""
        return "GPU" if "GPU" in self.place else "CPU"

    @property
    def total(self) -> float:
        """How much of `device` all places take."""
        return self.place[self.device] * self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeType:
    """What an autoscaler can start."""

    name: str
    resources: Mapping[str, float]
    max_nodes: int


def stage_demand(config: RunConfig, stage: str) -> Demand | None:
    """What `stage` asks for before it gets on; None where it needs no worker or engine."""
    cluster = config.cluster
    if stage in TRAINING_STAGES:
        count, setting = cluster.num_trainers, f"cluster.num_trainers={cluster.num_trainers}"
    elif stage in ("score", "diagnose"):
        if stage == "score" and not config.models.behavior:
            return None
        whole = engine_resources(config, stage)
        return _of_engines(cluster, whole | {"CPU": whole["CPU"] * CPU_SHARE_LEFT})
    elif stage == "evaluate" or (stage == "collect" and isinstance(config.corpus, SampledCorpus)):
        return _of_engines(cluster, engine_resources(config, stage))
    else:
        return None
    return Demand(place=worker_resources(cluster), count=count, settings=setting)


def _of_engines(cluster: ClusterConfig, place: Mapping[str, float]) -> Demand:
    """The engines that a stage begins with; it takes more as they come."""
    name = "num_samplers" if cluster.min_samplers is None else "min_samplers"
    count = cluster.min_samplers or cluster.num_samplers
    return Demand(place=place, count=count, settings=f"cluster.{name}={count}")


def places_on(node: Mapping[str, float], place: Mapping[str, float]) -> int:
    """How many of `place` a node with these resources has room for."""
    rooms = [node.get(name, 0.0) / amount for name, amount in place.items() if amount > 0]
    return math.floor(min(rooms, default=0.0) + SLACK)


def fits(demand: Demand, nodes: Iterable[Mapping[str, float]]) -> bool:
    """Whether nodes with these resources have room for all of it."""
    return sum(places_on(node, demand.place) for node in nodes) >= demand.count


def most_places(
    demand: Demand,
    nodes: Iterable[Mapping[str, float]],
    types: Sequence[NodeType],
    *,
    max_nodes: int,
) -> int:
    """How many places there are on `nodes` and on all that an autoscaler may start beside them."""
    found = sum(places_on(node, demand.place) for node in nodes)
    left = max_nodes
    per_node = [(places_on(each.resources, demand.place), each.max_nodes) for each in types]
    for places, most in sorted(per_node, reverse=True):
        found += places * min(most, left)
        left -= min(most, left)
    return found


def amounts(resources: Mapping[str, float]) -> str:
    """`1 GPU, 8 CPU`: what people count, in that order."""
    return ", ".join(f"{resources[name]:g} {name}" for name in ("GPU", "CPU") if name in resources)


def infeasible_words(
    demand: Demand,
    stage: str,
    types: Sequence[NodeType],
    *,
    found: int,
) -> str:
    """Why a cluster can never offer it, and what would be feasible: `found` places."""
    offered = "; ".join(
        f"{each.name} has {amounts(each.resources) or 'neither CPU nor GPU'}, "
        f"at most {each.max_nodes} node{'s' if each.max_nodes != 1 else ''}"
        for each in types
    )
    said = (
        f"{stage} asks for {demand.count} x ({amounts(demand.place)}), and the cluster cannot grow "
        f"to that (node types: {offered or 'none'})"
    )
    if found:
        return (
            f"{said}: at most {found} of {demand.count} would fit; lower {demand.settings} to "
            f"{found}, or raise max_workers of the cluster"
        )
    return (
        f"{said}: no node of it has room for one; lower cluster.cpus_per_worker or "
        f"{SPAN_SETTINGS.get(stage, SPAN_SETTINGS['score'])}, set cluster.device, or give the "
        "cluster a larger node type"
    )


def waiting_words(
    demand: Demand,
    nodes: Sequence[Mapping[str, float]],
    *,
    free: float,
    starting: str = "",
    failed: str = "",
) -> str:
    """`waiting for 2 GPU: cluster has 1, 1 starting`.

    Args:
        demand: What is waited for.
        nodes: The resources of each node that is there.
        free: How much of the demand's device nobody uses.
        starting: What is on its way, as `1` or `1 node of gpu`.
        failed: Why nodes could not be started, where the autoscaler says so.
    """
    have = sum(node.get(demand.device, 0.0) for node in nodes)
    said = f"waiting for {demand.total:g} {demand.device}: cluster has {have:g}"
    room = sum(places_on(node, demand.place) for node in nodes)
    if have + SLACK >= demand.total:
        if room >= demand.count:
            said += f", {free:g} free"
        else:
            said += f", with room for {room} of {demand.count} x ({amounts(demand.place)})"
    if starting:
        said += f", {starting} starting"
    return f"{said}; could not start {failed}" if failed else said
