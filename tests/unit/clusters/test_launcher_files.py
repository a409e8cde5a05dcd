"""The shipped launcher files hold; a mistake in one is one error that names its field."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pear_ray.clusters.instances import INSTANCES, with_gpus
from pear_ray.clusters.launcher import OnPremLauncher
from pear_ray.clusters.load import load_launcher, load_shape
from pear_ray.config.yaml12 import parse
from pear_ray.errors import ConfigError

CLUSTER = Path(__file__).parents[3] / "cluster"
FILES = ("aws", "gcp", "azure", "on-prem")
Change = Callable[[dict[str, Any]], object]


@functools.cache
def shipped(name: str) -> dict[str, Any]:
    return parse((CLUSTER / f"{name}.yaml").read_text(encoding="utf-8"))


def tree(name: str) -> dict[str, Any]:
    return copy.deepcopy(shipped(name))


def refusal(tmp_path: Path, name: str, change: Change) -> str:
    """What is said of the shipped file with a change."""
    changed = tree(name)
    change(changed)
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        load_launcher(file)
    return str(refused.value).removeprefix(f"{file}: ")


def types(tree: dict[str, Any]) -> dict[str, Any]:
    return tree["available_node_types"]


@pytest.mark.parametrize("name", FILES)
def test_a_shipped_file_holds(name: str) -> None:
    launcher = load_launcher(CLUSTER / f"{name}.yaml")
    assert launcher.metadata.shared_storage == "/mnt/shared"
    assert launcher.idle_timeout_minutes == 10
    shape = load_shape(CLUSTER / f"{name}.yaml")
    assert shape.to_fill_in
    assert any(kind.gpus and kind.max_nodes and not kind.is_spot for kind in shape.workers)
    if not isinstance(launcher, OnPremLauncher):
        head = launcher.available_node_types[launcher.head_node_type]
        assert head.resources == {"CPU": 0, "GPU": 0}
        assert {kind.gpu for kind in shape.workers} >= {"H100", "A100-80GB"}
        assert any(kind.is_spot and kind.max_nodes for kind in shape.workers)
        for kind in shape.workers:
            assert (kind.cpus, kind.gpus) == (
                INSTANCES[name][kind.machine].cpus,
                INSTANCES[name][kind.machine].gpus,
            )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "aws",
            lambda t: types(t)["h100"]["node_config"].update(InstanceTyp="x"),
            (
                "available_node_types.h100.node_config.InstanceTyp: unknown key; did you mean "
                "'InstanceType'? (got 'x')"
            ),
        ),
        (
            "gcp",
            lambda t: types(t)["h100"]["node_config"].update(machinType="x"),
            (
                "available_node_types.h100.node_config.machinType: unknown key; did you mean "
                "'machineType'? (got 'x')"
            ),
        ),
        (
            "azure",
            lambda t: types(t)["h100"]["node_config"]["azure_arm_parameters"].update(vmSiz="x"),
            (
                "available_node_types.h100.node_config.azure_arm_parameters.vmSiz: unknown key; "
                "did you mean 'vmSize'? (got 'x')"
            ),
        ),
        (
            "aws",
            lambda t: types(t)["h100"].update(max_workerz=1),
            (
                "available_node_types.h100.max_workerz: unknown key; did you mean 'max_workers'? "
                "(got 1)"
            ),
        ),
        (
            "aws",
            lambda t: types(t)["h100"]["node_config"].update(InstanceType="p5.4xlarge"),
            (
                "available_node_types.h100.resources.GPU: 8, and p5.4xlarge has 1 H100, 16 CPUs; "
                "write 1, or take p5.48xlarge"
            ),
        ),
        (
            "gcp",
            lambda t: types(t)["l4-spot"]["resources"].update(GPU=8),
            (
                "available_node_types.l4-spot.resources.GPU: 8, and g2-standard-48 has 4 L4, 48 "
                "CPUs; write 4, or take g2-standard-96"
            ),
        ),
        (
            "azure",
            lambda t: types(t)["a10-spot"]["resources"].update(CPU=64),
            (
                "available_node_types.a10-spot.resources.CPU: 64, and Standard_NV36ads_A10_v5 has "
                "36; write 1 to 36"
            ),
        ),
        (
            "aws",
            lambda t: types(t)["h100"]["node_config"].update(InstanceType="p5.48xlarg"),
            (
                "available_node_types.h100.node_config.InstanceType: 'p5.48xlarg' is not known; "
                "did you mean 'p5.48xlarge'? If not, say what it has under metadata.instances"
            ),
        ),
        (
            "gcp",
            lambda t: types(t)["h100"]["node_config"].update(
                guestAccelerators=[{"acceleratorType": "nvidia-l4", "acceleratorCount": 8}]
            ),
            (
                "available_node_types.h100.node_config.guestAccelerators: 8 L4, and a3-highgpu-8g "
                "has 8 H100, 208 CPUs; leave it out, the type brings its GPUs"
            ),
        ),
        (
            "gcp",
            lambda t: types(t)["h100"]["node_config"].pop("scheduling"),
            (
                "available_node_types.h100.node_config.scheduling.onHostMaintenance: a machine "
                "with GPUs cannot be moved; write TERMINATE"
            ),
        ),
        (
            "aws",
            lambda t: [types(t).pop(name) for name in ("h100", "a100")],
            (
                "available_node_types: every type with GPUs (h100-spot, l4-spot) may be taken "
                "back, and training has nowhere to stay; add one that is not spot, with "
                "max_workers above 0"
            ),
        ),
        (
            "aws",
            lambda t: types(t)["h100-spot"]["labels"].update({"ray.io/market-type": "on-demand"}),
            (
                "available_node_types.h100-spot.labels.ray.io/market-type: 'on-demand', and "
                "node_config makes it spot; write spot"
            ),
        ),
        (
            "aws",
            lambda t: types(t)["h100-spot"].pop("labels"),
            (
                "available_node_types.h100-spot.labels.ray.io/market-type: missing, and "
                "node_config makes it spot; write spot"
            ),
        ),
        (
            "aws",
            lambda t: types(t)["l4-spot"]["node_config"].pop("SecurityGroupIds"),
            (
                "available_node_types.l4-spot.node_config.SecurityGroupIds: missing: Ray then "
                "makes a group that opens port 22 to 0.0.0.0/0; name one of yours that lets in its "
                "own members and your network"
            ),
        ),
        (
            "aws",
            lambda t: t["provider"].update(
                security_group={
                    "IpPermissions": [{"FromPort": 8265, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]
                }
            ),
            (
                "provider.security_group.IpPermissions: port 8265 is open to 0.0.0.0/0, which is "
                "everyone; name your network, or leave the rule out"
            ),
        ),
        (
            "azure",
            lambda t: t["provider"].update(use_internal_ips=False),
            (
                "provider.use_internal_ips: false gives every machine a public address, and Ray's "
                "template opens port 22 to everyone; write true, and log in from inside the network"
            ),
        ),
        (
            "gcp",
            lambda t: types(t)["h100"]["node_config"].pop("networkInterfaces"),
            (
                "available_node_types.h100.node_config.networkInterfaces: gives the machine a "
                "public address (Ray adds one where none are named); name a subnetwork, without "
                "accessConfigs"
            ),
        ),
        (
            "aws",
            lambda t: types(t)["head"]["resources"].update(CPU=32),
            (
                "available_node_types.head.resources.CPU: 32 lets work run on the head, whose loss "
                "ends the cluster; write 0"
            ),
        ),
        (
            "aws",
            lambda t: types(t)["head"]["node_config"].update(InstanceType="g6.xlarge"),
            (
                "available_node_types.head.node_config.InstanceType: g6.xlarge has 1 L4, 4 CPUs, "
                "and the head uses no GPU; take a type without"
            ),
        ),
        (
            "aws",
            lambda t: types(t)["h100"].update(min_workers=9),
            "available_node_types.h100.min_workers: 9 is above max_workers=8",
        ),
        (
            "aws",
            lambda t: t.update(head_node_type="hed"),
            "head_node_type: 'hed' is none of head, h100,",
        ),
        (
            "aws",
            lambda t: types(t)["h100"]["resources"].update(GPU="8"),
            "available_node_types.h100.resources.GPU: Input should be a valid integer (got '8')",
        ),
        (
            "on-prem",
            lambda t: t.update(head_start_ray_commands=["ray start --head --num-cpus=0"]),
            (
                "head_start_ray_commands: the dashboard would listen beyond the head; add "
                "--dashboard-host=127.0.0.1 and reach it with `ray dashboard FILE`"
            ),
        ),
        (
            "on-prem",
            lambda t: t["docker"].update(run_options=["-v /mnt/shared:/mnt/shared"]),
            "docker.run_options: whoever reaches a port may run code; add -e RAY_AUTH_MODE=token",
        ),
        (
            "on-prem",
            lambda t: t.update(file_mounts={}),
            "file_mounts: no node would have the token",
        ),
        (
            "on-prem",
            lambda t: t["docker"]["run_options"].append("-e RAY_AUTH_TOKEN=c0ffee"),
            (
                "docker.run_options.6: RAY_AUTH_TOKEN is set to a value in the file; bring it by "
                "file or environment"
            ),
        ),
        (
            "gcp",
            lambda t: t["initialization_commands"].append("export HF_TOKEN='hf_1'"),
            "initialization_commands.4: HF_TOKEN is set to a value in the file",
        ),
        (
            "on-prem",
            lambda t: t.update(initialization_commands=[]),
            (
                "initialization_commands: none mounts metadata.shared_storage=/mnt/shared, which "
                "all nodes are to share"
            ),
        ),
        ("on-prem", lambda t: t["metadata"].pop("worker"), "metadata.worker: missing; say what"),
        (
            "aws",
            lambda t: t["provider"].update(type="awz"),
            "provider.type is 'awz'; did you mean 'aws'?",
        ),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, name: str, change: Change, message: str) -> None:
    assert message in refusal(tmp_path, name, change)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    def two(tree: dict[str, Any]) -> None:
        types(tree)["h100"]["resources"]["GPU"] = 4
        types(tree)["head"]["max_workers"] = 1

    said = refusal(tmp_path, "aws", two)
    assert said.startswith("2 problems\n")
    assert "h100.resources.GPU: 4, and p5.48xlarge has 8 H100, 192 CPUs; write 8" in said
    assert "head.max_workers: 1 makes workers of the head's type; write 0" in said


@pytest.mark.parametrize(
    "harmless",
    [
        "-e RAY_AUTH_TOKEN_PATH=/home/pear/.ray/auth_token",
        "-e HF_TOKEN=$HF_TOKEN",
        '-e WANDB_API_KEY="$WANDB_API_KEY"',
        "-e HF_TOKEN",
    ],
)
def test_a_secret_by_reference_is_none(tmp_path: Path, harmless: str) -> None:
    changed = tree("on-prem")
    changed["docker"]["run_options"].append(harmless)
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps(changed), encoding="utf-8")
    load_launcher(file)


def test_a_machine_that_is_described_in_the_file(tmp_path: Path) -> None:
    changed = tree("aws")
    types(changed)["h100"]["node_config"]["InstanceType"] = "p9.huge"
    types(changed)["h100"]["resources"] = {"CPU": 100, "GPU": 16}
    changed["metadata"]["instances"] = {
        "p9.huge": {"cpus": 128, "memory_gib": 4096, "gpus": 16, "gpu": "H200"}
    }
    changed["metadata"]["prices"] = {"p9.huge": {"on_demand": 100}}
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps(changed), encoding="utf-8")
    [kind] = [each for each in load_shape(file).workers if each.name == "h100"]
    assert (kind.cpus, kind.gpus, kind.gpu, kind.dollars_per_hour) == (100, 16, "H200", 100)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the cluster file (No such file or directory); shipped ones are in"),
        ("", "expected a mapping at the top, got nothing"),
        ("- a", "expected a mapping at the top, got list"),
        ("a: [", "not valid YAML"),
        ("a: 1\na: 2", "'a' is set twice"),
        ("a: 1", "provider.type is None; known are aws, gcp, azure, local; for Kubernetes name"),
    ],
)
def test_what_is_no_cluster_file(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "cluster.yaml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        load_shape(file)
    assert message in str(refused.value)


def test_the_smallest_machine_with_so_many_gpus_comes_first() -> None:
    assert next(with_gpus("aws", "L4", 1)) == "g6.xlarge"
    assert [*with_gpus("gcp", "A100-80GB", 4)] == ["a2-ultragpu-4g", "a2-ultragpu-8g"]
