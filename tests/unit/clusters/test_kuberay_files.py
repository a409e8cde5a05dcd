"""The shipped KubeRay files hold; a mistake in one is one error that names its field."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pear_ray.clusters.load import load_resources, load_shape
from pear_ray.clusters.shape import num_bytes
from pear_ray.config.yaml12 import parse_all
from pear_ray.errors import ConfigError

KUBERAY = Path(__file__).parents[3] / "cluster" / "kuberay"
WITH_CLUSTER = ("raycluster", "rayjob", "rayjob-s3", "rayservice")
Change = Callable[[dict[str, Any]], object]


@functools.cache
def shipped(name: str) -> list[dict[str, Any]]:
    return parse_all((KUBERAY / f"{name}.yaml").read_text(encoding="utf-8"))


def refusal(tmp_path: Path, name: str, change: Change) -> str:
    documents = copy.deepcopy(shipped(name))
    change(documents[0])
    file = tmp_path / "resources.yaml"
    file.write_text("\n---\n".join(map(json.dumps, documents)), encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        load_resources(file)
    return str(refused.value).removeprefix(f"{file}: ")


@pytest.mark.parametrize("name", sorted(path.stem for path in KUBERAY.glob("*.yaml")))
def test_a_shipped_file_holds(name: str) -> None:
    assert load_resources(KUBERAY / f"{name}.yaml")


@pytest.mark.parametrize("name", WITH_CLUSTER)
def test_its_workers_are_seen(name: str) -> None:
    shape = load_shape(KUBERAY / f"{name}.yaml")
    assert shape.shared_storage
    assert any(kind.gpus and not kind.is_spot for kind in shape.workers)
    assert {kind.gpu for kind in shape.workers} <= {"H100", "L4"}
    assert all(kind.max_nodes and kind.memory_bytes >= 150 * 2**30 for kind in shape.workers)


def spec(tree: dict[str, Any]) -> dict[str, Any]:
    return tree["spec"]


def group(tree: dict[str, Any]) -> dict[str, Any]:
    return spec(tree)["workerGroupSpecs"][0]


def pod(tree: dict[str, Any]) -> dict[str, Any]:
    return group(tree)["template"]["spec"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "raycluster",
            lambda t: group(t).update(maxReplica=3),
            "spec.workerGroupSpecs.0.maxReplica: unknown key; did you mean 'maxReplicas'? (got 3)",
        ),
        (
            "raycluster",
            lambda t: pod(t)["containers"][0].update(imagePullPolic="Always"),
            (
                "spec.workerGroupSpecs.0.template.spec.containers.0.imagePullPolic: unknown key; "
                "did you mean 'imagePullPolicy'? (got 'Always')"
            ),
        ),
        (
            "raycluster",
            lambda t: spec(t)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
            "spec.headGroupSpec.rayStartParams.num-cpus: Input should be a valid string (got 0)",
        ),
        (
            "raycluster",
            lambda t: spec(t)["headGroupSpec"]["rayStartParams"].pop("num-cpus"),
            (
                "spec.headGroupSpec.rayStartParams.num-cpus: None lets work run on the head, whose "
                'loss ends the cluster; write "0"'
            ),
        ),
        (
            "raycluster",
            lambda t: spec(t)["headGroupSpec"].update(serviceType="LoadBalancer"),
            (
                "spec.headGroupSpec.serviceType: the head would be reached from outside; keep "
                "ClusterIP and use `kubectl port-forward`"
            ),
        ),
        (
            "raycluster",
            lambda t: spec(t).pop("authOptions"),
            (
                "spec.authOptions: whoever reaches a port may run code; write {mode: token, "
                "secretName: NAME}"
            ),
        ),
        (
            "raycluster",
            lambda t: spec(t)["autoscalerOptions"].update(upscalingMode="Fast"),
            (
                "spec.autoscalerOptions.upscalingMode: Input should be 'Default', 'Aggressive' or "
                "'Conservative' (got 'Fast')"
            ),
        ),
        (
            "raycluster",
            lambda t: spec(t)["autoscalerOptions"].update(version="v1"),
            "spec.autoscalerOptions.version: not said; write v2, which is tested here",
        ),
        (
            "raycluster",
            lambda t: pod(t).pop("tolerations"),
            (
                "spec.workerGroupSpecs.0.template.spec.tolerations: nodes with GPUs are tainted "
                "nvidia.com/gpu; add {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}"
            ),
        ),
        (
            "raycluster",
            lambda t: pod(t)["securityContext"].pop("runAsNonRoot"),
            (
                "spec.workerGroupSpecs.0.template.spec.securityContext.runAsNonRoot: the pod may "
                "be root; write true"
            ),
        ),
        (
            "raycluster",
            lambda t: group(t)["rayStartParams"].update({"num-gpus": "16"}),
            (
                "spec.workerGroupSpecs.0.rayStartParams.num-gpus: 16, and the container's limit of "
                "nvidia.com/gpu is 8; leave it out"
            ),
        ),
        (
            "raycluster",
            lambda t: pod(t)["volumes"].pop(),
            (
                "spec.workerGroupSpecs.0.template.spec.containers.0.volumeMounts: 'shared' is no "
                "volume of the pod; there are ['shm']"
            ),
        ),
        (
            "raycluster",
            lambda t: spec(t)["workerGroupSpecs"].pop(0),
            (
                "spec.workerGroupSpecs: every group with GPUs may be taken back, and training has "
                "nowhere to stay; add one that is not spot"
            ),
        ),
        (
            "raycluster",
            lambda t: group(t).update(replicas=9),
            "spec.workerGroupSpecs.0.replicas: 9 is not within minReplicas=0 and maxReplicas=8",
        ),
        (
            "raycluster",
            lambda t: group(t).update(groupName="l4-spot"),
            "spec.workerGroupSpecs: groupName 'l4-spot' is there twice",
        ),
        (
            "raycluster",
            lambda t: pod(t)["containers"][0]["env"].append({"name": "HF_TOKEN", "value": "hf_1"}),
            "HF_TOKEN stands in the file; write valueFrom: {secretKeyRef: ...}",
        ),
        (
            "rayjob",
            lambda t: t["metadata"].pop("annotations"),
            "Kueue refuses a cluster that grows without annotation kueue.x-k8s.io/elastic-job=true",
        ),
        (
            "rayjob",
            lambda t: spec(t).update(shutdownAfterJobFinishes=False),
            "spec.shutdownAfterJobFinishes: Kueue wants true, or the share is never given back",
        ),
        (
            "rayjob",
            lambda t: spec(t).update(submissionMode="X"),
            "spec.submissionMode: Input should be 'K8sJobMode', 'HTTPMode',",
        ),
        (
            "storage-pvc",
            lambda t: spec(t).update(accessModes=["ReadWriteOnce"]),
            (
                "spec.accessModes: ['ReadWriteOnce'] lets one node write; every node reads and "
                "writes the run folder: write [ReadWriteMany]"
            ),
        ),
        (
            "kueue",
            lambda t: t.update(kind="ResourceFlavour"),
            "document 1: kind is 'ResourceFlavour'; did you mean 'ResourceFlavor'?",
        ),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, name: str, change: Change, message: str) -> None:
    assert message in refusal(tmp_path, name, change)


def test_a_price_stands_on_the_pods_of_a_group(tmp_path: Path) -> None:
    def priced(text: str) -> Change:
        note = {"pear-ray/dollars-per-hour": text}
        return lambda t: group(t)["template"]["metadata"].update(annotations=note)

    documents = copy.deepcopy(shipped("raycluster"))
    priced("55.04")(documents[0])
    file = tmp_path / "resources.yaml"
    file.write_text("\n---\n".join(map(json.dumps, documents)), encoding="utf-8")
    prices = {kind.name: kind.dollars_per_hour for kind in load_shape(file).workers}
    assert prices == {"h100": 55.04, "h100-spot": None, "l4-spot": None}
    said = refusal(tmp_path, "raycluster", priced("cheap"))
    assert "annotation pear-ray/dollars-per-hour is 'cheap'; write a number" in said


def test_a_file_without_a_cluster_is_no_cluster_file() -> None:
    with pytest.raises(ConfigError, match="holds PersistentVolumeClaim, and no RayCluster"):
        load_shape(KUBERAY / "storage-pvc.yaml")


def test_quantities_of_kubernetes() -> None:
    assert num_bytes("64Gi") == 64 * 2**30
    assert num_bytes("1.5Ti") == 1536 * 2**30
    assert num_bytes("2G") == 2 * 10**9
    assert num_bytes(512) == 512
