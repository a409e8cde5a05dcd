"""`pear doctor`: what this machine offers, what is wrong with it, and the mend for each."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from pear_ray.machine import (
    Finding,
    Status,
    install_findings,
    machine_findings,
    ray_findings,
)

RAY_DEADLINE_S = 120.0
ENGINE_DEADLINE_S = 240.0
RESULT_PREFIX = "pear-doctor: "
STYLES = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}


def run_doctor(*, quick: bool = False) -> int:
    """Check everything, print it, and say whether a run can work: 0, or 1 when a check failed.

    Args:
        quick: Leave out the two checks that start something (Ray, and an engine).
    """
    console = Console()
    findings = [*machine_findings(), *install_findings(), *ray_findings()]
    if not quick:
        for check, deadline_s in (
            ("Ray start", RAY_DEADLINE_S),
            ("engine start", ENGINE_DEADLINE_S),
        ):
            with console.status(f"{check} ..."):
                findings.append(probe_finding(check, deadline_s=deadline_s))
    console.print(_table(findings))
    failed = sum(finding.status is Status.FAIL for finding in findings)
    warned = sum(finding.status is Status.WARN for finding in findings)
    console.print(f"{failed} failed, {warned} warnings, {len(findings) - failed - warned} ok")
    return 1 if failed else 0


def probe_finding(check: str, *, deadline_s: float) -> Finding:
    """Run the probe named `check` in its own process, ended with its children at the deadline."""
    started = time.monotonic()
    with tempfile.TemporaryFile(mode="w+", encoding="utf-8") as output:
        # A file, not a pipe: Ray's daemons inherit it, and a pipe would stay open until they end.
        process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "pear_ray.doctor", check],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            mend = "see the last Ray session's logs, and whether other programs hold the CPUs"
            found = f"no answer in {deadline_s:.0f} s"
            return Finding(check, Status.FAIL, found, mend)
        output.seek(0)
        lines = output.read().splitlines()
    seconds = time.monotonic() - started
    for line in reversed(lines):
        if line.startswith(RESULT_PREFIX):
            return Finding(
                check, Status.OK, f"{json.loads(line[len(RESULT_PREFIX) :])}, {seconds:.0f} s"
            )
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    mend = f"run `python -m pear_ray.doctor '{check}'` to see all of it"
    return Finding(check, Status.FAIL, f"exit code {code}: {last.strip()}", mend)


def probe_ray() -> str:
    """Start a local Ray as a run does, and say what it found."""
    from pear_ray.config.sections import ClusterConfig
    from pear_ray.distributed.session import ray_session

    with ray_session(ClusterConfig()) as session:
        dashboard = session.dashboard_url or "none"
        return f"{session.resources.get('CPU', 0):g} CPUs, dashboard {dashboard}"


def probe_engine() -> str:
    """Start a vLLM engine on the embedded student as a run does, and sample from it."""
    from pear_ray.engines.environment import engine_environment

    device = _device()
    os.environ.update(engine_environment(device=device, num_threads=1, kv_cache_gib=1))

    from pear_ray.engines.model_files import resolve_model
    from pear_ray.engines.vllm.engine import EngineSpec, Sampling, VllmEngine

    folder = resolve_model("embedded:student")
    spec = EngineSpec(model=str(folder), dtype="float32", max_model_len=128, device=device)
    engine = VllmEngine(spec)
    sampling = Sampling(num_samples=1, temperature=1.0, max_tokens=8, seed=0)
    [[completion]] = engine.generate([[1, 2, 3]], [sampling])
    return f"sampled {len(completion.token_ids)} tokens on {device}"


PROBES: dict[str, Callable[[], str]] = {"Ray start": probe_ray, "engine start": probe_engine}


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _table(findings: list[Finding]) -> Table:
    table = Table(title="pear doctor", title_justify="left", show_lines=False)
    for column in ("check", "", "found", "mend"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        style = STYLES[finding.status]
        table.add_row(finding.check, f"[{style}]{finding.status}[/]", finding.found, finding.mend)
    return table


if __name__ == "__main__":
    print(RESULT_PREFIX + json.dumps(PROBES[sys.argv[1]]()))  # noqa: T201 - read by the parent
