"""What the cluster is now, and what its autoscaler says that it can become."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray._private.state import available_resources_per_node
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import AutoscalingState, GetClusterStatusReply
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pear_ray.distributed.demand import Demand, Node, NodeType

LOOK_TIMEOUT_S = 30.0
HEAD = "node:__internal_head__"  # a resource that Ray gives the head
CONFIG_FLAG = "--autoscaling-config="


@dataclass(frozen=True, slots=True)
class Autoscaler:
    """An autoscaler's settings.

    Attributes:
        types: What it can start; None where that cannot be read (KubeRay's is a container apart).
        max_nodes: How many nodes of all types together.
    """

    types: Sequence[NodeType] | None
    max_nodes: int = 0


@dataclass(frozen=True, slots=True)
class Outlook:
    """What the autoscaler is about.

    Attributes:
        starting: Node types on their way, and how many of each.
        failed: The types that it could not start, with the reason; or nothing.
        infeasible: Ids of the placement groups that it can offer no nodes for.
    """

    starting: Mapping[str, int]
    failed: str
    infeasible: Sequence[str]


def alive_nodes() -> list[Node]:
    """The nodes that are there."""
    free = available_resources_per_node()
    return [
        Node(
            resources=node["Resources"],
            free=free.get(node["NodeID"], {}),
            labels=node.get("Labels") or {},
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def outlook() -> Outlook:
    """What the autoscaler last said; nothing starts where there is none."""
    return outlook_of(_status().autoscaling_state)


def outlook_of(state: AutoscalingState) -> Outlook:
    """`outlook`, of what the autoscaler reported."""
    starting = Counter[str]()
    for asked in state.pending_instance_requests:
        starting[asked.ray_node_type_name] += asked.count
    for instance in state.pending_instances:
        if "(HEAD)" in instance.details:  # which is there, and is never waited for
            continue
        starting[instance.ray_node_type_name] += 1
    failed = "; ".join(
        dict.fromkeys(
            f"{each.ray_node_type_name}: {' '.join(each.reason.split())}"
            for each in state.failed_instance_requests
        )
    )
    # `details` begins with the id of the placement group.
    infeasible = [
        each.details.partition(":")[0] for each in state.infeasible_gang_resource_requests
    ]
    return Outlook(starting, failed, infeasible)


def starting_words(demand: Demand, now: Outlook, types: Sequence[NodeType] | None) -> str:
    """How much of the demand's device is on its way: `1`, or where that is not known, the nodes."""
    if not now.starting:
        return ""
    known = {each.name: each for each in types or ()}
    if set(now.starting) <= set(known):
        coming = sum(
            known[name].resources.get(demand.device, 0.0) * n
            for name, n in now.starting.items()
            if demand.takes(known[name])
        )
        return f"{coming:g}" if coming else ""
    nodes = (f"{n} node{'s' if n != 1 else ''} of {name}" for name, n in now.starting.items())
    return ", ".join(nodes)


def find_autoscaler() -> Autoscaler | None:
    """The cluster's autoscaler; None where nothing will start a node.

    Ray keeps its settings nowhere but in the process that it is, on the head: a task looks there.
    """
    head = next((n["NodeID"] for n in ray.nodes() if n["Alive"] and HEAD in n["Resources"]), None)
    has_reported = _status().autoscaling_state.autoscaler_state_version > 0
    if head is None:
        return Autoscaler(None) if has_reported else None
    look = ray.remote(_monitors_settings).options(
        num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(head, soft=False)
    )
    found = ray.get(look.remote(_gcs_address()), timeout=LOOK_TIMEOUT_S)
    if found is None:  # no such process there: KubeRay's is in a container of its own
        return Autoscaler(None) if has_reported else None
    return autoscaler_of(found)


def autoscaler_of(settings: Mapping[str, Any]) -> Autoscaler | None:
    """What settings as of `ray up` say; None where they are of a cluster that does not grow."""
    head = settings.get("head_node_type")
    types = [
        NodeType(
            name=name,
            resources=each.get("resources") or {},
            max_nodes=each.get("max_workers", settings.get("max_workers", 0)),
            labels=each.get("labels") or {},
        )
        for name, each in (settings.get("available_node_types") or {}).items()
        if name != head
    ]
    growing = [each for each in types if each.max_nodes > 0]
    if not growing:
        return None
    # What a machine has can be left out of the settings where the provider knows it.
    known = all(each.resources for each in growing)
    return Autoscaler(growing if known else None, settings.get("max_workers", 0))


def _monitors_settings(gcs_address: str) -> dict[str, Any] | None:
    """The node types in the autoscaler's settings; empty where it has none, None without it.

    Nothing else of them leaves the head: they may name keys and accounts.
    """
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if not any(part.endswith("monitor.py") for part in line):
            continue
        if f"--gcs-address={gcs_address}" not in line:
            continue
        files = [part.removeprefix(CONFIG_FLAG) for part in line if part.startswith(CONFIG_FLAG)]
        if not files:
            return {}
        settings = yaml.safe_load(Path(files[0]).expanduser().read_text(encoding="utf-8"))
        wanted = ("head_node_type", "max_workers", "available_node_types")
        found = {key: settings[key] for key in wanted if key in settings}
        for each in found.get("available_node_types", {}).values():
            each.pop("node_config", None)
        return found
    return None


def _gcs_address() -> str:
    return ray.get_runtime_context().gcs_address


def _status() -> GetClusterStatusReply:
    reply = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(_gcs_address()).get_cluster_status(timeout_s=LOOK_TIMEOUT_S))
    return reply
