"""A cluster file as `pear plan` sees it: types of nodes, how many, and what they cost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pear_ray.clusters.instances import GPU_MEMORY_GB, PRODUCTS, Instance
from pear_ray.clusters.kuberay import (
    SHARED_STORAGE_ANNOTATION,
    RayCluster,
    RayJob,
    RayService,
    Resource,
    WorkerGroup,
    cluster_of,
)
from pear_ray.clusters.kuberay_checks import is_spot
from pear_ray.clusters.launcher import AnyLauncher, OnPremLauncher
from pear_ray.clusters.launcher_checks import instance_of, strings
from pear_ray.clusters.prices import LIST_PRICES, Price

FILL_IN = "FILL-IN"
GIB = 2**30
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeKind:
    """One type of worker.

    Attributes:
        name: Of the type, as in the file.
        machine: What the provider calls it.
        cpus: Of one node, as Ray counts them.
        gpus: Of one node.
        gpu: Which, where that is known.
        memory_bytes: Of one node.
        max_nodes: How many there may be.
        is_spot: Whether they may be taken back.
        dollars_per_hour: For one; None where nobody said.
    """

    name: str
    machine: str
    cpus: int
    gpus: int
    gpu: str | None
    memory_bytes: int
    max_nodes: int
    is_spot: bool
    dollars_per_hour: float | None

    @property
    def gpu_bytes(self) -> int | None:
        """Memory of one GPU, in the data sheet's decimal GB; None where it is not known which."""
        return GPU_MEMORY_GB[self.gpu] * 10**9 if self.gpu else None

    @property
    def words(self) -> str:
        """`h100: up to 4 of p5.48xlarge (8 H100, 192 CPUs), 55.04 $/h`."""
        gpus = f"{self.gpus} {self.gpu or 'GPU'}, " if self.gpus else ""
        price = (
            "price not said" if self.dollars_per_hour is None else f"{self.dollars_per_hour:g} $/h"
        )
        spot = ", spot" if self.is_spot else ""
        return (
            f"{self.name}: up to {self.max_nodes} of {self.machine} ({gpus}{self.cpus} CPUs"
            f"{spot}), {price} each"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterShape:
    """What a cluster file offers.

    Attributes:
        name: The cluster's.
        workers: Types of workers.
        max_workers: Over all types; None without such a limit.
        head: The head's machine and its price an hour, where that is known.
        shared_storage: Where every node reaches the same files; None where the file does not say.
        to_fill_in: Fields that still hold a place-holder.
    """

    name: str
    workers: tuple[NodeKind, ...]
    max_workers: int | None
    head: tuple[str, float | None]
    shared_storage: str | None
    to_fill_in: tuple[str, ...]


def launcher_shape(launcher: AnyLauncher) -> ClusterShape:
    """What a launcher file offers."""
    fill_in = tuple(_to_fill_in([launcher.model_dump(mode="json")]))
    if isinstance(launcher, OnPremLauncher):
        return _on_prem_shape(launcher, fill_in)
    kinds = {
        name: kind
        for name, kind in launcher.available_node_types.items()
        if name != launcher.head_node_type
    }
    head = launcher.available_node_types[launcher.head_node_type].node_config
    return ClusterShape(
        name=launcher.cluster_name,
        workers=tuple(
            _node_kind(
                name,
                kind.node_config.machine[1],
                instance_of(launcher, name),
                cpus=kind.resources["CPU"],
                max_nodes=min(kind.max_workers, launcher.max_workers),
                is_spot=kind.node_config.is_spot,
                prices=launcher.metadata.prices,
            )
            for name, kind in kinds.items()
        ),
        max_workers=launcher.max_workers,
        head=(head.machine[1], _dollars(launcher.metadata.prices, head.machine[1], is_spot=False)),
        shared_storage=launcher.metadata.shared_storage,
        to_fill_in=fill_in,
    )


def _on_prem_shape(launcher: OnPremLauncher, fill_in: tuple[str, ...]) -> ClusterShape:
    worker = launcher.metadata.worker
    if worker is None:
        raise ValueError("a checked file says metadata.worker")
    num = min(len(launcher.provider.worker_ips), launcher.max_workers)
    prices = launcher.metadata.prices
    kind = _node_kind(
        "worker", "worker", worker, cpus=worker.cpus, max_nodes=num, is_spot=False, prices=prices
    )
    return ClusterShape(
        name=launcher.cluster_name,
        workers=(kind,),
        max_workers=launcher.max_workers,
        head=("head", _dollars(prices, "head", is_spot=False)),
        shared_storage=launcher.metadata.shared_storage,
        to_fill_in=fill_in,
    )


def _node_kind(
    name: str,
    machine: str,
    instance: Instance | None,
    *,
    cpus: int,
    max_nodes: int,
    is_spot: bool,
    prices: dict[str, Price],
) -> NodeKind:
    if instance is None:
        raise ValueError(f"a checked file names known machines, and {machine} is not")
    return NodeKind(
        name=name,
        machine=machine,
        cpus=cpus,
        gpus=instance.gpus,
        gpu=instance.gpu,
        memory_bytes=int(instance.memory_gib * GIB),
        max_nodes=max_nodes,
        is_spot=is_spot,
        dollars_per_hour=_dollars(prices, machine, is_spot=is_spot),
    )


def _dollars(prices: dict[str, Price], machine: str, *, is_spot: bool) -> float | None:
    price = prices.get(machine) or LIST_PRICES.get(machine)
    if price is None:
        return None
    return price.spot if is_spot else price.on_demand


def resources_shape(resources: Sequence[Resource]) -> ClusterShape | None:
    """What the Ray cluster among KubeRay's resources offers; None where there is none."""
    for resource in resources:
        if not isinstance(resource, RayCluster | RayJob | RayService):
            continue
        groups = cluster_of(resource)[1].workerGroupSpecs
        storage = resource.metadata.annotations.get(SHARED_STORAGE_ANNOTATION)
        return ClusterShape(
            name=resource.metadata.name,
            workers=tuple(_group_kind(each) for each in groups),
            max_workers=None,
            head=("the head's pod", None),
            shared_storage=storage,
            to_fill_in=tuple(_to_fill_in([each.model_dump(mode="json") for each in resources])),
        )
    return None


def _group_kind(group: WorkerGroup) -> NodeKind:
    container, selector = group.container, group.template.spec.nodeSelector
    limits = container.resources.limits
    return NodeKind(
        name=group.groupName,
        machine="pods",
        cpus=int(limits["cpu"]),
        gpus=container.gpus,
        gpu=PRODUCTS.get(selector.get("nvidia.com/gpu.product", "")),
        memory_bytes=num_bytes(limits["memory"]),
        max_nodes=group.maxReplicas * group.numOfHosts,
        is_spot=is_spot(group),
        dollars_per_hour=group.dollars_per_hour,
    )


def num_bytes(quantity: str | int) -> int:
    """Bytes of a quantity of Kubernetes, such as `64Gi`."""
    text = str(quantity)
    for unit, factor in UNITS.items():
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    return int(float(text))


def _to_fill_in(trees: Sequence[object]) -> Iterator[str]:
    for tree in trees:
        for field, text in strings(tree):
            if FILL_IN in text or FILL_IN in field:
                yield field
