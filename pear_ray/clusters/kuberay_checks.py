"""What KubeRay would take and a careful person would not."""

from collections.abc import Iterator

from pear_ray.clusters.kuberay import (
    ELASTIC_ANNOTATION,
    QUEUE_LABEL,
    ClusterSpec,
    RayCluster,
    RayJob,
    RayService,
    Resource,
    WorkerGroup,
    cluster_of,
)
from pear_ray.clusters.launcher_checks import SECRET, Problem, strings
from pear_ray.clusters.market import MARKET_LABEL, SPOT
from pear_ray.clusters.pods import GPU_RESOURCE, PersistentVolumeClaim, PodTemplate


def resource_problems(resource: Resource) -> Iterator[Problem]:
    """What is wrong with a resource whose fields are all right."""
    for field, text in strings(resource.model_dump(mode="json")):
        found = SECRET.search(text)
        if found and not found[1].endswith("_PATH"):
            yield field, f"{found[1]} is set to a value in the file; keep it in a Secret"
    yield from _variables(resource.model_dump(mode="json"))
    if isinstance(resource, PersistentVolumeClaim):
        if "ReadWriteMany" not in resource.spec.accessModes:
            yield (
                "spec.accessModes",
                (
                    f"{resource.spec.accessModes} lets one node write; every node reads and writes "
                    "the run folder: write [ReadWriteMany]"
                ),
            )
        return
    if not isinstance(resource, RayCluster | RayJob | RayService):
        return
    path, cluster = cluster_of(resource)
    yield from _cluster(path, cluster)
    yield from _queued(resource, path, cluster)


def _variables(tree: object, path: str = "") -> Iterator[Problem]:
    """Variables whose name says that they are secret, with a value."""
    if isinstance(tree, list):
        for index, each in enumerate(tree):
            yield from _variables(each, f"{path}.{index}")
    if not isinstance(tree, dict):
        return
    name, value = tree.get("name"), tree.get("value")
    if isinstance(name, str) and isinstance(value, str) and SECRET.search(f"{name}={value}"):
        yield f"{path}.value", f"{name} stands in the file; write valueFrom: {{secretKeyRef: ...}}"
    for key, each in tree.items():
        yield from _variables(each, f"{path}.{key}" if path else str(key))


def _cluster(path: str, cluster: ClusterSpec) -> Iterator[Problem]:
    auth = cluster.authOptions
    if auth is None or auth.mode != "token" or not auth.secretName:
        yield (
            f"{path}.authOptions",
            "whoever reaches a port may run code; write {mode: token, secretName: NAME}",
        )
    head = cluster.headGroupSpec
    if head.rayStartParams.get("num-cpus") != "0":
        yield (
            f"{path}.headGroupSpec.rayStartParams.num-cpus",
            (
                f"{head.rayStartParams.get('num-cpus')} lets work run on the head, whose loss ends "
                'the cluster; write "0"'
            ),
        )
    if head.serviceType != "ClusterIP" or head.enableIngress:
        yield (
            f"{path}.headGroupSpec.serviceType",
            "the head would be reached from outside; keep ClusterIP and use `kubectl port-forward`",
        )
    yield from _pods(f"{path}.headGroupSpec.template.spec", head.template)
    if any(each.gpus for each in head.template.spec.containers):
        yield f"{path}.headGroupSpec.template.spec", "the head has a GPU and does not use it"
    yield from _groups(path, cluster)
    if not cluster.enableInTreeAutoscaling:
        return
    options = cluster.autoscalerOptions
    if options is None or options.version != "v2":
        yield f"{path}.autoscalerOptions.version", "not said; write v2, which is tested here"
    if head.template.spec.restartPolicy not in {None, "Never"}:
        yield f"{path}.headGroupSpec.template.spec.restartPolicy", "autoscaler v2 wants Never"


def _groups(path: str, cluster: ClusterSpec) -> Iterator[Problem]:
    names = [each.groupName for each in cluster.workerGroupSpecs]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{path}.workerGroupSpecs", f"groupName {name!r} is there twice"
    for index, group in enumerate(cluster.workerGroupSpecs):
        yield from _group(f"{path}.workerGroupSpecs.{index}", group)
    with_gpus = [each for each in cluster.workerGroupSpecs if each.container.gpus]
    if with_gpus and all(is_spot(each) for each in with_gpus):
        yield (
            f"{path}.workerGroupSpecs",
            (
                "every group with GPUs may be taken back, and training has nowhere to stay; add "
                "one that is not spot"
            ),
        )


def _group(path: str, group: WorkerGroup) -> Iterator[Problem]:
    if not group.minReplicas <= group.replicas <= group.maxReplicas:
        yield (
            f"{path}.replicas",
            (
                f"{group.replicas} is not within minReplicas={group.minReplicas} and "
                f"maxReplicas={group.maxReplicas}"
            ),
        )
    spec = group.template.spec
    yield from _pods(f"{path}.template.spec", group.template)
    tolerated = any(each.key == GPU_RESOURCE for each in spec.tolerations)
    if group.container.gpus and not tolerated:
        yield (
            f"{path}.template.spec.tolerations",
            (
                f"nodes with GPUs are tainted {GPU_RESOURCE}; add {{key: {GPU_RESOURCE}, operator: "
                "Exists, effect: NoSchedule}"
            ),
        )
    for name in ("num-gpus", "num-cpus"):
        said = group.rayStartParams.get(name)
        resource = GPU_RESOURCE if name == "num-gpus" else "cpu"
        has = str(group.container.resources.limits.get(resource, 0))
        if said is not None and said != has:
            yield (
                f"{path}.rayStartParams.{name}",
                f"{said}, and the container's limit of {resource} is {has}; leave it out",
            )


def _pods(path: str, template: PodTemplate) -> Iterator[Problem]:
    security = template.spec.securityContext
    if security is None or not security.runAsNonRoot:
        yield f"{path}.securityContext.runAsNonRoot", "the pod may be root; write true"
    volumes = {each.name for each in template.spec.volumes}
    for index, each in enumerate(template.spec.containers):
        if "cpu" not in each.resources.limits or "memory" not in each.resources.limits:
            yield (
                f"{path}.containers.{index}.resources.limits",
                "Ray takes a pod's limits for what it has; say cpu and memory",
            )
        for mount in each.volumeMounts:
            if mount.name not in volumes:
                yield (
                    f"{path}.containers.{index}.volumeMounts",
                    f"{mount.name!r} is no volume of the pod; there are {sorted(volumes)}",
                )


def _queued(
    resource: RayCluster | RayJob | RayService, path: str, cluster: ClusterSpec
) -> Iterator[Problem]:
    """Kueue counts a fixed number of workers, unless a job says that it grows."""
    if QUEUE_LABEL not in resource.metadata.labels:
        return
    elastic = resource.metadata.annotations.get(ELASTIC_ANNOTATION) == "true"
    if cluster.enableInTreeAutoscaling and not elastic:
        yield (
            f"{path}.enableInTreeAutoscaling",
            (
                f"Kueue refuses a cluster that grows without annotation {ELASTIC_ANNOTATION}=true "
                "(feature gate ElasticJobsViaWorkloadSlices); add it, or write false"
            ),
        )
    if isinstance(resource, RayJob) and not resource.spec.shutdownAfterJobFinishes:
        yield "spec.shutdownAfterJobFinishes", "Kueue wants true, or the share is never given back"


def is_spot(group: WorkerGroup) -> bool:
    """Whether the group's nodes may be taken back, as Ray's label says."""
    return group.labels.get(MARKET_LABEL) == SPOT
