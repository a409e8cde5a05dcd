"""A Ray head with token authentication, as a cluster has it, and the `pear` command against it."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from free_ports import free_ports

ROOT = Path(__file__).parents[2]
START_S = 120
GRACE_S = 2
# What the test process says of Ray, and a client would take for its own.
HIDDEN = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
# Runs several commands in one process: importing Ray takes longer than all of them.
MANY = """
import contextlib, io, json, sys
from pear_ray.cli import main
done = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    done.append([code, out.getvalue(), err.getvalue()])
print("DONE" + json.dumps(done))
"""


class Head:
    """A head that runs, and how to reach it."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.token_file = folder / "token"
        self.token_file.write_text(secrets.token_hex(32), encoding="utf-8")
        self.gcs, self.dashboard, *others = free_ports(5)
        self.url = f"http://127.0.0.1:{self.dashboard}"
        self.environment = {k: v for k, v in os.environ.items() if k not in HIDDEN} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "PYTHONPATH": str(ROOT),
            # The jobs' `python` is this one.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        options = {
            "port": self.gcs,
            "dashboard-port": self.dashboard,
            "ray-client-server-port": others[0],
            "dashboard-agent-listen-port": others[1],
            "dashboard-agent-grpc-port": others[2],
            "num-cpus": 2,
            "node-ip-address": "127.0.0.1",
            "dashboard-host": "127.0.0.1",
            "temp-dir": folder / "r",
        }
        program = Path(sys.executable).with_name("ray")
        flags = [f"--{name}={value}" for name, value in options.items()]
        self.started: list[subprocess.Popen[str]] = []
        self.log = (folder / "head.log").open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            [program, "start", "--head", "--block", "--disable-usage-stats", *flags],
            # A job's own PYTHONPATH is the tree that was sent.
            env={k: v for k, v in self.environment.items() if k != "PYTHONPATH"} | environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def wait(self) -> None:
        """Until jobs are taken."""
        request = urllib.request.Request(
            f"{self.url}/api/jobs/",
            headers={"Authorization": f"Bearer {self.token_file.read_text(encoding='utf-8')}"},
        )
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5):
                return
            assert time.monotonic() < deadline, (self.folder / "head.log").read_text()
            assert self.process.poll() is None, (self.folder / "head.log").read_text()
            time.sleep(0.3)

    def close(self) -> None:
        for each in self.started:
            each.kill()
            each.wait()
            if each.stdout:
                each.stdout.close()
        end_tree(self.process)
        self.log.close()

    def command(self, *arguments: str, address: str | None = None) -> list[str]:
        return [
            *(sys.executable, "-m", "pear_ray", *arguments),
            *("--address", address or self.url),
        ]

    def start(self, *arguments: str, address: str | None = None) -> "subprocess.Popen[str]":
        """A command in the background; both of its outputs are one."""
        process = subprocess.Popen(
            self.command(*arguments, address=address),
            env=self.environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def run_all(self, *commands: Sequence[str], **environment: str) -> list[tuple[int, str, str]]:
        """Commands one after another; exit code, output and errors of each."""
        asked = [
            [*each, "--address", self.url] if "--address" not in each else [*each]
            for each in commands
        ]
        done = subprocess.run(
            [sys.executable, "-c", MANY, json.dumps(asked)],
            env=self.environment | environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert "DONE" in done.stdout, done.stdout + done.stderr
        return [tuple(each) for each in json.loads(done.stdout.rpartition("DONE")[2])]


@contextlib.contextmanager
def ray_head(**environment: str) -> Iterator[Head]:
    """A head with these variables besides, in a folder of its own.

    Whose name is short: sockets' paths have 107 characters.
    """
    folder = Path(tempfile.mkdtemp(prefix="ph", dir="/tmp"))
    head = Head(folder, environment)
    try:
        head.wait()
        yield head
    finally:
        head.close()
        shutil.rmtree(folder, ignore_errors=True)


def end_tree(process: "subprocess.Popen[Any]", others: Iterable[psutil.Process] = ()) -> None:
    """End a head with all that it started, and `others`; Ray itself would take half a minute."""
    started = list(others)
    with contextlib.suppress(psutil.NoSuchProcess):
        started += psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    process.kill()
    for each in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait(20)
    psutil.wait_procs(started, timeout=20)


class Relay:
    """A line to a port of this machine that can be cut."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._open: list[socket.socket] = []
        self._is_cut = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, *, for_s: float) -> None:
        """End every connection, and take no other for so long."""
        self._is_cut = True
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._open.clear()
        time.sleep(for_s)
        self._is_cut = False

    def close(self) -> None:
        self._is_cut = True
        with contextlib.suppress(OSError):  # which wakes the thread that waits for another line
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                here, _ = self._listener.accept()
                if self._is_cut:
                    here.close()
                    continue
                there = socket.create_connection(("127.0.0.1", self._to))
                self._open += [here, there]
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=_pump, args=pair, daemon=True).start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for each in (source, target):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
    source.close()  # the other direction's thread closes the other
