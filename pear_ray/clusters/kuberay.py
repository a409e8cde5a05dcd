"""KubeRay's RayCluster, RayJob and RayService, and Kueue's queues: the fields that we use.

Names and choices are those of the `ray.io/v1` types of KubeRay 1.6.2 (github.com/ray-project/
kuberay, ray-operator/apis/ray/v1); ours is the smaller set, so that a typo is an error.
"""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pear_ray.clusters.pods import (
    Container,
    ContainerSecurity,
    Count,
    EnvVar,
    NetworkPolicy,
    ObjectMeta,
    PersistentVolumeClaim,
    PodMeta,
    PodTemplate,
    Quantity,
    Resources,
)
from pear_ray.config.base import Section

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
ELASTIC_ANNOTATION = "kueue.x-k8s.io/elastic-job"
SHARED_STORAGE_ANNOTATION = "pear-ray/shared-storage"  # of the resource
PRICE_ANNOTATION = "pear-ray/dollars-per-hour"  # of a pod's template: what its node costs


class AutoscalerOptions(Section):
    """The autoscaler beside the head."""

    version: Literal["v1", "v2"]
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] = "Default"
    idleTimeoutSeconds: Count = 60
    imagePullPolicy: Literal["Always", "IfNotPresent", "Never"] | None = None
    securityContext: ContainerSecurity | None = None
    resources: Resources | None = None
    env: list[EnvVar] = Field(default=[])


class AuthOptions(Section):
    """Who may use the cluster."""

    mode: Literal["token", "disabled"]
    secretName: str | None = None


class HeadGroup(Section):
    """The head."""

    rayStartParams: dict[str, str]
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    enableIngress: bool = False
    labels: dict[str, str] = Field(default={})
    resources: dict[str, str] = Field(default={})
    template: PodTemplate


class WorkerGroup(Section):
    """Workers that are alike."""

    groupName: Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]*[a-z0-9])?$")]
    replicas: Count = 0
    minReplicas: Count
    maxReplicas: Count
    numOfHosts: Annotated[int, Field(gt=0)] = 1
    idleTimeoutSeconds: Count | None = None
    rayStartParams: dict[str, str]
    labels: dict[str, str] = Field(default={})
    resources: dict[str, str] = Field(default={})
    template: PodTemplate

    @model_validator(mode="after")
    def _price_is_a_number(self) -> "WorkerGroup":
        text = (self.template.metadata or PodMeta()).annotations.get(PRICE_ANNOTATION)
        if text is not None and not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
            raise ValueError(
                f'annotation {PRICE_ANNOTATION} is {text!r}; write a number, as "55.04"'
            )
        return self

    @property
    def dollars_per_hour(self) -> float | None:
        """What a pod's node costs; None where nobody said."""
        text = (self.template.metadata or PodMeta()).annotations.get(PRICE_ANNOTATION)
        return None if text is None else float(text)

    @property
    def container(self) -> Container:
        """The one that Ray runs in: the first."""
        return self.template.spec.containers[0]


class ClusterSpec(Section):
    """A Ray cluster."""

    rayVersion: str
    enableInTreeAutoscaling: bool = False
    autoscalerOptions: AutoscalerOptions | None = None
    authOptions: AuthOptions | None = None
    suspend: bool | None = None
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayCluster(Section):
    """A cluster that stays."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: ObjectMeta
    spec: ClusterSpec


class RayJobSpec(Section):
    """A job with a cluster of its own."""

    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = (
        "K8sJobMode"
    )
    runtimeEnvYAML: str | None = None
    metadata: dict[str, str] = Field(default={})
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: Count = 0
    activeDeadlineSeconds: Annotated[int, Field(gt=0)] | None = None
    backoffLimit: Count = 0
    suspend: bool | None = None
    submitterPodTemplate: PodTemplate | None = None
    rayClusterSpec: ClusterSpec


class RayJob(Section):
    """A job with a cluster of its own."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: ObjectMeta
    spec: RayJobSpec


class RayServiceSpec(Section):
    """A served application and its cluster."""

    serveConfigV2: str
    serviceUnhealthySecondThreshold: Count | None = None
    deploymentUnhealthySecondThreshold: Count | None = None
    excludeHeadPodFromServeSvc: bool = False
    rayClusterConfig: ClusterSpec


class RayService(Section):
    """A served application and its cluster."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: ObjectMeta
    spec: RayServiceSpec


class FlavorSpec(Section):
    """A kind of node."""

    nodeLabels: dict[str, str] = Field(default={})


class ResourceFlavor(Section):
    """A kind of node that Kueue gives out."""

    apiVersion: Literal["kueue.x-k8s.io/v1beta1", "kueue.x-k8s.io/v1beta2"]
    kind: Literal["ResourceFlavor"]
    metadata: ObjectMeta
    spec: FlavorSpec = FlavorSpec()


class Quota(Section):
    """How much there is of a resource."""

    name: str
    nominalQuota: Quantity


class FlavorQuota(Section):
    """How much there is on a kind of node."""

    name: str
    resources: list[Quota]


class ResourceGroup(Section):
    """Resources that are given out together."""

    coveredResources: list[str]
    flavors: list[FlavorQuota]


class ClusterQueueSpec(Section):
    """What a queue may give out."""

    namespaceSelector: dict[str, dict[str, str]]
    resourceGroups: list[ResourceGroup]


class ClusterQueue(Section):
    """What a queue may give out."""

    apiVersion: Literal["kueue.x-k8s.io/v1beta1", "kueue.x-k8s.io/v1beta2"]
    kind: Literal["ClusterQueue"]
    metadata: ObjectMeta
    spec: ClusterQueueSpec


class LocalQueueSpec(Section):
    """Whose share a namespace's queue takes from."""

    clusterQueue: str


class LocalQueue(Section):
    """The queue of a namespace."""

    apiVersion: Literal["kueue.x-k8s.io/v1beta1", "kueue.x-k8s.io/v1beta2"]
    kind: Literal["LocalQueue"]
    metadata: ObjectMeta
    spec: LocalQueueSpec


WithCluster = RayCluster | RayJob | RayService
Resource = (
    WithCluster | PersistentVolumeClaim | NetworkPolicy | ResourceFlavor | ClusterQueue | LocalQueue
)
KINDS: dict[str, type[Resource]] = {
    "RayCluster": RayCluster,
    "RayJob": RayJob,
    "RayService": RayService,
    "PersistentVolumeClaim": PersistentVolumeClaim,
    "NetworkPolicy": NetworkPolicy,
    "ResourceFlavor": ResourceFlavor,
    "ClusterQueue": ClusterQueue,
    "LocalQueue": LocalQueue,
}


def cluster_of(resource: WithCluster) -> tuple[str, ClusterSpec]:
    """The path to the Ray cluster inside it, and the cluster."""
    match resource:
        case RayCluster():
            return "spec", resource.spec
        case RayJob():
            return "spec.rayClusterSpec", resource.spec.rayClusterSpec
        case RayService():
            return "spec.rayClusterConfig", resource.spec.rayClusterConfig
