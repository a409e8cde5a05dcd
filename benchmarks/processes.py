"""Measuring in a fresh process: nothing that was imported, allocated or warmed up before counts."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
FOUND = "FOUND "  # libraries print as well
# Hugging Face is not asked, and maths runs on one thread.
ENVIRON = {
    "PYTHONPATH": os.pathsep.join(
        each for each in (str(HERE), str(ROOT), os.environ.get("PYTHONPATH")) if each
    ),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
SHOWN = 3000  # characters of what a process said before it failed


def in_process(
    function: str,
    *arguments: Any,
    environ: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> Any:
    """What a function of a module here returns (anything JSON has), called in a fresh process.

    Args:
        function: Its module and name, such as `sft.pace_of_ours`.
        arguments: Given to it, written out as Python.
        environ: Variables besides `ENVIRON`.
        timeout_s: How long it may take.

    Raises:
        SystemExit: It failed; with the end of what it wrote to stderr.
    """
    module = function.partition(".")[0]
    code = f"import json, {module}; print({FOUND!r} + json.dumps({function}(*{arguments!r})))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=HERE,
        env=os.environ | ENVIRON | (environ or {}),
        capture_output=True,
        check=False,
        text=True,
        timeout=timeout_s,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith(FOUND)]
    if not found:
        raise SystemExit(f"{function}{arguments}: {done.stderr[-SHOWN:]}")
    return json.loads(found[-1].removeprefix(FOUND))


def memory_of(field: str) -> int:
    """A field of this process's status, in bytes: `VmRSS`, or `VmHWM` for its peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    [found] = [line for line in lines if line.startswith(f"{field}:")]
    return int(found.split()[1]) * 1024


def free_address() -> str:
    """Where a process group on this machine meets."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"
