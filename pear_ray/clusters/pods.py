"""Kubernetes' pods, claims and network rules: the fields that our files use, and no others."""

from typing import Annotated, Any, Literal

from pydantic import Field

from pear_ray.config.base import Section

Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")] | int
Count = Annotated[int, Field(ge=0)]
GPU_RESOURCE = "nvidia.com/gpu"


class ObjectMeta(Section):
    """What a resource is called."""

    name: str
    namespace: str | None = None
    labels: dict[str, str] = Field(default={})
    annotations: dict[str, str] = Field(default={})


class SecretKey(Section):
    """A value inside a secret."""

    name: str
    key: str
    optional: bool | None = None


class ValueFrom(Section):
    """Where a variable's value comes from."""

    secretKeyRef: SecretKey


class EnvVar(Section):
    """A variable of the environment."""

    name: str
    value: str | None = None
    valueFrom: ValueFrom | None = None


class SecretName(Section):
    """A secret, by name."""

    name: str
    optional: bool | None = None


class EnvFrom(Section):
    """A secret all of whose values become variables."""

    secretRef: SecretName


class Port(Section):
    """A port of a container."""

    containerPort: Annotated[int, Field(gt=0, lt=65536)]
    name: str
    protocol: Literal["TCP", "UDP"] = "TCP"


class Resources(Section):
    """What a container asks for, and the most it gets."""

    limits: dict[str, Quantity]
    requests: dict[str, Quantity] = Field(default={})


class VolumeMount(Section):
    """Where a volume appears."""

    name: str
    mountPath: str
    subPath: str | None = None
    readOnly: bool | None = None


class Capabilities(Section):
    """Rights of root that a container may keep."""

    drop: list[str] = Field(default=[])
    add: list[str] = Field(default=[])


class ContainerSecurity(Section):
    """What a container may do."""

    allowPrivilegeEscalation: bool | None = None
    capabilities: Capabilities | None = None
    readOnlyRootFilesystem: bool | None = None
    runAsNonRoot: bool | None = None
    runAsUser: int | None = None


class SeccompProfile(Section):
    """Which system calls are let through."""

    type: Literal["RuntimeDefault", "Localhost", "Unconfined"]


class PodSecurity(Section):
    """Who a pod's processes are."""

    runAsNonRoot: bool | None = None
    runAsUser: int | None = None
    runAsGroup: int | None = None
    fsGroup: int | None = None
    seccompProfile: SeccompProfile | None = None


class Container(Section):
    """A container."""

    name: str
    image: str
    imagePullPolicy: Literal["Always", "IfNotPresent", "Never"] | None = None
    command: list[str] | None = None
    args: list[str] | None = None
    env: list[EnvVar] = Field(default=[])
    envFrom: list[EnvFrom] = Field(default=[])
    ports: list[Port] = Field(default=[])
    resources: Resources
    securityContext: ContainerSecurity | None = None
    volumeMounts: list[VolumeMount] = Field(default=[])
    workingDir: str | None = None

    @property
    def gpus(self) -> int:
        """How many GPUs it has."""
        return int(self.resources.limits.get(GPU_RESOURCE, 0))


class Toleration(Section):
    """A taint that a pod does not mind."""

    key: str
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "NoExecute", "PreferNoSchedule"] | None = None


class EmptyDir(Section):
    """A folder that goes with the pod."""

    medium: Literal["", "Memory"] = ""
    sizeLimit: Quantity | None = None


class ClaimName(Section):
    """A claim, by name."""

    claimName: str
    readOnly: bool | None = None


class Volume(Section):
    """A volume of a pod."""

    name: str
    emptyDir: EmptyDir | None = None
    persistentVolumeClaim: ClaimName | None = None


class PodSpec(Section):
    """A pod."""

    containers: Annotated[list[Container], Field(min_length=1)]
    initContainers: list[Container] = Field(default=[])
    volumes: list[Volume] = Field(default=[])
    nodeSelector: dict[str, str] = Field(default={})
    tolerations: list[Toleration] = Field(default=[])
    securityContext: PodSecurity | None = None
    serviceAccountName: str | None = None
    automountServiceAccountToken: bool | None = None
    terminationGracePeriodSeconds: Count | None = None
    priorityClassName: str | None = None
    restartPolicy: Literal["Always", "Never", "OnFailure"] | None = None


class PodMeta(Section):
    """Labels and annotations of pods that a controller names."""

    labels: dict[str, str] = Field(default={})
    annotations: dict[str, str] = Field(default={})


class PodTemplate(Section):
    """What a group's pods are made from."""

    metadata: PodMeta | None = None
    spec: PodSpec


class ClaimResources(Section):
    """How much a claim wants."""

    requests: dict[Literal["storage"], Quantity]


class ClaimSpec(Section):
    """A claim on storage."""

    accessModes: Annotated[list[Literal["ReadWriteMany", "ReadWriteOnce"]], Field(min_length=1)]
    resources: ClaimResources
    storageClassName: str | None = None


class PersistentVolumeClaim(Section):
    """Storage that pods share."""

    apiVersion: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: ObjectMeta
    spec: ClaimSpec


class NetworkPolicySpec(Section):
    """Who may talk to which pods."""

    podSelector: dict[str, Any]
    policyTypes: list[Literal["Ingress", "Egress"]]
    ingress: list[dict[str, Any]] = Field(default=[])
    egress: list[dict[str, Any]] = Field(default=[])


class NetworkPolicy(Section):
    """Rules for the network of pods."""

    apiVersion: Literal["networking.k8s.io/v1"]
    kind: Literal["NetworkPolicy"]
    metadata: ObjectMeta
    spec: NetworkPolicySpec
