"""Write requirements/cpu.txt and requirements/gpu.txt from pyproject.toml: pins and markers only.

Needs uv, and the index that carries the CPU builds of torch: PyTorch's own, or a folder of wheels
named in UV_FIND_LINKS.
"""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from packaging.markers import Marker, default_environment

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "requirements"
COMMON_EXTRAS = ("deepspeed", "gguf", "lora", "math", "dev")
EXTRAS = {"cpu": ("lint",), "gpu": ()}  # besides
PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = {"cpu": ("x86_64", "aarch64"), "gpu": ("x86_64",)}


def main() -> int:
    """Resolve both lists and write them; the exit code."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        print("lock: uv is not installed; mend: pip install uv", file=sys.stderr)
        return 1
    overrides = ["--override", str(REQUIREMENTS / "overrides.txt")]
    cpu_overrides = ["--override", str(REQUIREMENTS / "cpu-overrides.txt")]
    wheels = os.environ.pop("UV_FIND_LINKS", None)  # left there, it would put CPU torch in gpu.txt
    torch_index = ["--find-links", wheels] if wheels else ["--torch-backend", "cpu"]
    for name, options in {
        "cpu": [*overrides, *cpu_overrides, *torch_index],
        "gpu": overrides,
    }.items():
        pins = narrowed(resolved(uv, name, options), MACHINES[name])
        header = f"# Written by `make lock` from pyproject.toml (extras {name}, "
        header += ", ".join((*COMMON_EXTRAS, *EXTRAS[name])) + "); do not edit.\n"
        path = REQUIREMENTS / f"{name}.txt"
        path.write_text(header + "\n".join(pins) + "\n", encoding="utf-8")
        print(f"lock: {path.relative_to(ROOT)}: {len(pins)} pins")
    return 0


def resolved(uv: str, extra: str, options: list[str]) -> list[str]:
    """What uv pins for `extra` and the common extras, on every platform at once."""
    names = (extra, *COMMON_EXTRAS, *EXTRAS[extra])
    extras = [part for name in names for part in ("--extra", name)]
    command = [uv, "pip", "compile", "pyproject.toml", *extras, *options, "--universal"]
    command += ["--python-version", PYTHONS[0], "--quiet", "--no-header", "--no-annotate"]
    # --upgrade: without it uv would keep whatever an earlier output file holds.
    command += ["--upgrade", "--no-emit-index-url", "--no-emit-find-links"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)  # noqa: S603
    return [line for line in done.stdout.splitlines() if line and not line.startswith("#")]


def narrowed(pins: list[str], machines: Sequence[str]) -> list[str]:
    """The pins that CPython on Linux installs, with a marker only where it still says something.

    uv's own `environments` setting is no help: it wants a torch wheel of every Python at hand.
    """
    kept = []
    for pin in pins:
        requirement, _, text = pin.partition(" ; ")
        if not text:
            kept.append(pin)
            continue
        marker = Marker(text)
        where = {
            (python, machine): marker.evaluate(environment(python, machine))
            for python, machine in itertools.product(PYTHONS, machines)
        }
        if all(where.values()):
            kept.append(requirement)
        elif any(where.values()):
            kept.append(f"{requirement} ; {shortest(where)}")
    return kept


def environment(python: str, machine: str) -> dict[str, str]:
    """The marker variables there."""
    return {
        **{key: str(value) for key, value in default_environment().items()},
        "python_version": python,
        "python_full_version": f"{python}.9",
        "implementation_version": f"{python}.9",
        "platform_machine": machine,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }


def shortest(where: dict[tuple[str, str], bool]) -> str:
    """A marker that is true exactly where `where` (keyed by Python and machine) is."""
    pythons = sorted({python for (python, _), holds in where.items() if holds})
    machines = sorted({machine for (_, machine), holds in where.items() if holds})
    if any(holds != (p in pythons and m in machines) for (p, m), holds in where.items()):
        raise SystemExit(f"lock: no short marker for {where}; extend scripts/lock.py")
    parts = []
    if len(pythons) < len(PYTHONS):
        parts.append(" or ".join(f"python_version == '{p}'" for p in pythons))
    if len(machines) < len({machine for _, machine in where}):
        parts.append(" or ".join(f"platform_machine == '{m}'" for m in machines))
    if len(parts) > 1:
        parts = [f"({part})" if " or " in part else part for part in parts]
    return " and ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
