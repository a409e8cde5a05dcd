"""Actors that run calls one after another, such as whole small runs; one that dies is replaced."""

import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ray

from pear_ray.distributed.failures import causes, one_line
from pear_ray.distributed.in_process import become_host
from pear_ray.errors import PearRayError, StopRequested
from pear_ray.stopping import gracefully, stop_asked

POLL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call to make: `function(*arguments)`, both picklable, called `name` in the dashboard."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a call ended.

    Attributes:
        name: The call's.
        value: What it returned; None where it failed.
        error: What it raised, in one line; empty where it did not fail.
        attempts: How often it was begun.
    """

    name: str
    value: Any
    error: str
    attempts: int


class CallWorker:
    """One process.

    Args:
        host_of: The device, if the process is to be its stages' own worker group.
        folder: Where the driver works, for paths that are seen from there.
    """

    def __init__(self, host_of: str | None, folder: str) -> None:
        self._name = "idle"
        with contextlib.suppress(OSError):  # another machine need not have it
            os.chdir(folder)
        logging.basicConfig(level=logging.WARNING)
        if host_of is not None:
            become_host(host_of)

    def __repr__(self) -> str:
        """What the Ray dashboard calls this actor."""
        return f"pear_ray {self._name}"

    def call(self, call: Call) -> Any:
        """Make the call; what it returns."""
        self._name = call.name
        return call.function(*call.arguments)


class CallPool:
    """Workers that take calls as they get free."""

    def __init__(
        self,
        num_workers: int,
        *,
        num_cpus: float,
        num_gpus: float = 0.0,
        environment: Mapping[str, str],
        host_of: str | None,
        selector: Mapping[str, str],
    ) -> None:
        self._num_workers = num_workers
        self._options = {
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "runtime_env": {"env_vars": dict(environment)},
            "label_selector": dict(selector),
        }
        self._host_of = host_of
        self._idle: list[Any] = []
        self._all: list[Any] = []

    def __enter__(self) -> "CallPool":
        """The pool; its workers end with the `with` block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the workers."""
        for worker in self._all:
            ray.kill(worker)
        self._all, self._idle = [], []

    def run(self, calls: Iterable[Call], *, max_retries: int) -> Iterator[Outcome]:
        """Make `calls` in order, as many at once as there are workers; outcomes as they end.

        A call is taken from `calls` only when a worker is free for it.

        A call that raises is not made again. One whose worker died is, at most `max_retries` times,
        in a new one.

        Raises:
            StopRequested: SIGTERM came while calls were running; they end with the pool.
        """
        fresh = ((call, 1) for call in calls)
        again: deque[tuple[Call, int]] = deque()
        running: dict[Any, tuple[Any, Call, int]] = {}
        while True:
            while len(running) < self._num_workers:
                call, attempt = again.popleft() if again else next(fresh, (None, 0))
                if call is None:
                    break
                worker = self._idle.pop() if self._idle else self._start()
                running[worker.call.remote(call)] = (worker, call, attempt)
            if not running:
                return
            done = _first(list(running))
            worker, call, attempt = running.pop(done)
            try:
                value, error = ray.get(done), ""
            except ray.exceptions.RayActorError as death:
                self._all.remove(worker)
                if attempt <= max_retries:
                    again.append((call, attempt + 1))
                    continue
                value, error = None, f"its process died: {one_line(death)}"
            except ray.exceptions.RayTaskError as raised:
                self._idle.append(worker)
                value, error = None, _said(raised)
            else:
                self._idle.append(worker)
            yield Outcome(name=call.name, value=value, error=error, attempts=attempt)

    def _start(self) -> Any:
        make = ray.remote(CallWorker).options(**self._options)  # type: ignore[attr-defined] - built by ray.remote
        worker = make.remote(self._host_of, str(Path.cwd()))
        self._all.append(worker)
        return worker


def _first(running: list[Any]) -> Any:
    """The first of the calls to end.

    Raises:
        StopRequested: SIGTERM came. Ray waits in C, where an exception of a handler would be lost
            or, with a timeout, become a SystemError.
    """
    with gracefully(lambda: None):
        while not stop_asked():
            ended, _ = ray.wait(running, num_returns=1, timeout=POLL_S)
            if ended:
                return ended[0]
    raise StopRequested("stopped by SIGTERM; run the same command again to go on")


def _said(raised: Exception) -> str:
    chain = list(causes([raised]))
    ours = [link for link in chain if isinstance(link, PearRayError)]
    return one_line((ours or chain)[0])
