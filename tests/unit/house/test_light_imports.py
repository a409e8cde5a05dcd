"""`--help`, config errors and the docs build must not pay for torch."""

import subprocess
import sys

import pytest

ENGINES = ("torch", "ray", "vllm", "deepspeed", "peft", "transformers")
HEAVY = (*ENGINES, "datasets", "matplotlib", "pyarrow")


def loaded_by(module: str) -> list[str]:
    probe = f"import sys, {module}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    "module", ["pear_ray.config.run", "pear_ray.cli", "pear_ray.records", "pear_ray.machine"]
)
def test_module_loads_without_heavy_libraries(module: str) -> None:
    assert loaded_by(module) == []


def test_the_probe_sees_a_heavy_library() -> None:
    assert loaded_by("pyarrow") == ["pyarrow"]
