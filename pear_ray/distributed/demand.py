"""Places that a stage asks of a cluster at once: whether they fit, and in words if not.

Starts nothing, imports no Ray.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pear_ray.clusters.market import ON_DEMAND, SPOT, satisfies, training_selector
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
        selector: What the nodes' labels must be, as Ray takes it; empty where any node will do.
    """

    place: Mapping[str, float]
    count: int
    settings: str
    selector: Mapping[str, str] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """What it is counted in: GPUs where it asks for any, else CPUs."""
        return "GPU" if "GPU" in self.place else "CPU"

    @property
    def total(self) -> float:
        """How much of `device` all places take."""
        return self.place[self.device] * self.count

    def takes(self, node: "Node | NodeType") -> bool:
        """Whether a place may be on such a node: not on one that may be taken back, say."""
        return satisfies(node.labels, self.selector)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node that is there.

    Attributes:
        resources: All that it has.
        free: What of it nobody uses.
        labels: Ray's.
    """

    resources: Mapping[str, float]
    free: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeType:
    """What an autoscaler can start."""

    name: str
    resources: Mapping[str, float]
    max_nodes: int
    labels: Mapping[str, str] = field(default_factory=dict)


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
    return Demand(
        place=worker_resources(cluster),
        count=count,
        settings=setting,
        selector=training_selector(cluster),
    )


def _of_engines(cluster: ClusterConfig, place: Mapping[str, float]) -> Demand:
    """The engines that a stage begins with; it takes more as they come."""
    name = "num_samplers" if cluster.min_samplers is None else "min_samplers"
    count = cluster.min_samplers or cluster.num_samplers
    return Demand(place=place, count=count, settings=f"cluster.{name}={count}")


def places_on(node: Node | NodeType, demand: Demand) -> int:
    """How many of a demand's places a node may have, whoever uses it now."""
    return _room(node.resources, demand.place) if demand.takes(node) else 0


def _room(has: Mapping[str, float], place: Mapping[str, float]) -> int:
    rooms = [has.get(name, 0.0) / amount for name, amount in place.items() if amount > 0]
    return math.floor(min(rooms, default=0.0) + SLACK)


def fits(demand: Demand, nodes: Iterable[Node]) -> bool:
    """Whether the nodes have room for all of it."""
    return sum(places_on(node, demand) for node in nodes) >= demand.count


def most_places(
    demand: Demand,
    nodes: Iterable[Node],
    types: Sequence[NodeType],
    *,
    max_nodes: int,
) -> int:
    """How many places there are on `nodes` and on all that an autoscaler may start beside them."""
    found = sum(places_on(node, demand) for node in nodes)
    left = max_nodes
    per_node = [(places_on(each, demand), each.max_nodes) for each in types]
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
        f"{'' if demand.takes(each) else f', {SPOT}'}"
        for each in types
    )
    said = (
        f"{stage} asks for {demand.count} x ({amounts(demand.place)}){where_words(demand, types)}, "
        f"and the cluster cannot grow to that (node types: {offered or 'none'})"
    )
    any_node = any_node_words(demand, types)
    if found:
        return (
            f"{said}: at most {found} of {demand.count} would fit; lower {demand.settings} to "
            f"{found}, or raise max_workers of the cluster{any_node}"
        )
    return (
        f"{said}: no node of it has room for one; lower cluster.cpus_per_worker or "
        f"{SPAN_SETTINGS.get(stage, SPAN_SETTINGS['score'])}, set cluster.device, or give the "
        f"cluster a larger node type{any_node}"
    )


def where_words(demand: Demand, nodes: Iterable[Node | NodeType]) -> str:
    """` on on-demand nodes`, where some of `nodes` have room and are not taken; else nothing."""
    return f" on {ON_DEMAND} nodes" if _refuses(demand, nodes) else ""


def any_node_words(demand: Demand, nodes: Iterable[Node | NodeType]) -> str:
    """What would let those be taken, to go on a sentence of what to do."""
    words = f", or let it train on {SPOT} nodes with cluster.training_nodes=any"
    return words if _refuses(demand, nodes) else ""


def _refuses(demand: Demand, nodes: Iterable[Node | NodeType]) -> bool:
    return any(not demand.takes(each) and _room(each.resources, demand.place) > 0 for each in nodes)


def waiting_words(
    demand: Demand,
    nodes: Sequence[Node],
    types: Sequence[NodeType] = (),
    *,
    starting: str = "",
    failed: str = "",
) -> str:
    """`waiting for 2 GPU: cluster has 1, 1 starting`, or `... 2 GPU on on-demand nodes: ...`.

    Args:
        demand: What is waited for.
        nodes: Those that are there.
        types: Those that an autoscaler can start, as far as that is known.
        starting: What is on its way, as `1` or `1 node of gpu`.
        failed: Why nodes could not be started, where the autoscaler says so.
    """
    device = demand.device
    suited = [node for node in nodes if demand.takes(node)]
    have = sum(node.resources.get(device, 0.0) for node in suited)
    where = where_words(demand, [*nodes, *types])
    said = f"waiting for {demand.total:g} {device}{where}: cluster has {have:g}"
    room = sum(places_on(node, demand) for node in suited)
    if have + SLACK >= demand.total:
        if room >= demand.count:
            said += f", {sum(node.free.get(device, 0.0) for node in suited):g} free"
        else:
            said += f", with room for {room} of {demand.count} x ({amounts(demand.place)})"
    if starting:
        said += f", {starting} starting"
    return f"{said}; could not start {failed}" if failed else said
