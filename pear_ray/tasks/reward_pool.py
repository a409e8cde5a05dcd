"""Verifies many completions in killable processes; a bad item costs only its own reward."""

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from pear_ray.config.rewards import RewardConfig, describe
from pear_ray.errors import ConfigError, RewardError
from pear_ray.records import Problem, Reward, RewardStatus

MAX_CHUNK_ITEMS = 32
"""Items per message: amortises the pipe and still spreads a slow batch over processes."""
START_DEADLINE_S = 180.0
"""A process that is not ready by then is given up; importing the games takes seconds."""
MAX_LOST_IN_A_ROW = 3
"""Per slot: processes lost with nothing verified in between after which the pool gives up."""
EXIT_WAIT_S = 0.2
"""How long a closing process has to see end-of-file before it is killed."""

_COMMAND = (sys.executable, "-m", "pear_ray.tasks.reward_worker")
_READ_BYTES = 1 << 16
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_FOREVER_S = 1e6  # a selector cannot wait for infinity


class RewardPool:
    """Long-lived verifier processes. They start at once and load while the caller goes on.

    Plain subprocesses rather than multiprocessing: its spawn re-imports the caller's `__main__`,
    which inside a Ray worker is Ray's own, and its fork would copy a live CUDA context.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Starts the processes, each with the verifiers and limits of `config`."""
        self._config = config
        self._lost_in_a_row = 0
        self._processes = [_Process(config) for _ in range(config.num_processes)]

    def __enter__(self) -> "RewardPool":
        """The pool itself."""
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the pool."""
        self.close()

    @property
    def is_open(self) -> bool:
        """Whether it still verifies: not closed, and not given up."""
        return bool(self._processes)

    def close(self) -> None:
        """Ends every process; harmless when called twice."""
        for process in self._processes:
            process.close()
        self._processes = []

    def wait_until_ready(self) -> None:
        """Waits until a process has loaded its verifiers; on a new pool, a check that they load.

        Raises:
            ConfigError: A verifier cannot be loaded.
            RewardError: Processes die or hang in loading.
        """
        while not any(process.ready for process in self._processes):
            self._read_any()
            for slot in range(len(self._processes)):
                self._settle(slot, {}, deque())

    def verify_all(self, pairs: Sequence[tuple[Problem, str]]) -> list[Reward]:
        """One reward per (problem, completion text), in order.

        An item that raises, outlives the deadline or takes its process down is ERRORED with the
        reason in `detail`; the items around it are unaffected.

        Raises:
            ConfigError: When the verifier cannot be loaded.
            RewardError: When the pool is closed, or processes die before verifying anything.
        """
        if not self._processes:
            raise RewardError("the reward pool is closed; open a new one before verifying")
        rewards: dict[int, Reward] = {}
        waiting = deque(range(len(pairs)))
        chunk = math.ceil(len(pairs) / (4 * len(self._processes)))
        chunk = max(1, min(MAX_CHUNK_ITEMS, chunk))
        try:
            while len(rewards) < len(pairs):
                for process in self._processes:
                    if process.ready and not process.in_flight and waiting:
                        items = [waiting.popleft() for _ in range(min(chunk, len(waiting)))]
                        if not process.send(items, pairs):
                            waiting.extendleft(reversed(items))
                self._read_any()
                for slot in range(len(self._processes)):
                    self._settle(slot, rewards, waiting)
        except BaseException:
            # Answers left in the pipes would be taken for the next call's items.
            self.close()
            raise
        return [_named(problem, rewards[index]) for index, (problem, _) in enumerate(pairs)]

    def _read_any(self) -> None:
        """Waits until a process says something, dies, or reaches its deadline."""
        now = time.monotonic()
        limits = [self._limit_s(process) - (now - process.since) for process in self._processes]
        with selectors.DefaultSelector() as selector:
            for process in self._processes:
                selector.register(process.stdout, selectors.EVENT_READ, process)
            for key, _ in selector.select(max(0.0, min(limits))):
                key.data.read()

    def _settle(self, slot: int, rewards: dict[int, Reward], waiting: deque[int]) -> None:
        """Books what one process answered, and replaces it when it is dead or out of time."""
        process = self._processes[slot]
        if process.fatal:
            raise ConfigError(process.fatal)
        for index, reward in process.take_answers():
            rewards[index] = reward
            self._lost_in_a_row = 0
        elapsed_s = time.monotonic() - process.since
        if not process.dead and elapsed_s <= self._limit_s(process):
            return
        if process.dead:
            detail = process.how_it_ended()
        else:
            limit = f"rewards.deadline_s={self._config.deadline_s:g}"
            detail = f"was killed after {elapsed_s:.1f} s ({limit})"
        process.kill()
        if process.begun and process.in_flight:
            stuck = process.in_flight.popleft()
            rewards[stuck] = Reward(RewardStatus.ERRORED, 0.0, f"the verifier's process {detail}")
            waiting.extendleft(reversed(process.in_flight))
        else:
            waiting.extendleft(reversed(process.in_flight))  # it died before it had begun on them
            self._lost_in_a_row += 1
            if self._lost_in_a_row >= MAX_LOST_IN_A_ROW * len(self._processes):
                raise RewardError(
                    f"{self._lost_in_a_row} verifier processes in a row were lost with nothing "
                    f"verified; the last one {detail}; see its traceback on stderr, and check that "
                    f"the verifiers of rewards.components ({describe(self._config)}) load within "
                    f"{START_DEADLINE_S:.0f} s and rewards.memory_bytes={self._config.memory_bytes}"
                )
        self._processes[slot] = _Process(self._config)

    def _limit_s(self, process: "_Process") -> float:
        """How long the process may stay silent in its present state."""
        if not process.ready:
            return START_DEADLINE_S
        return self._config.deadline_s if process.in_flight else _FOREVER_S


def _named(problem: Problem, reward: Reward) -> Reward:
    """The reward; an errored one says whose it is, since the run may end with it as its message."""
    if reward.status is not RewardStatus.ERRORED:
        return reward
    return replace(reward, detail=f"problem {problem.problem_id}: {reward.detail}")


class _Process:
    """One verifier process, its pipes, and the items it was sent and has not answered."""

    def __init__(self, config: RewardConfig) -> None:
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        self._popen = subprocess.Popen(  # noqa: S603 - our own interpreter and module, no shell
            [*_COMMAND, config.model_dump_json(), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **_ONE_THREAD, "PYTHONPATH": path},
            start_new_session=True,  # a Ctrl-C at the terminal is the parent's to handle
        )
        if self._popen.stdin is None or self._popen.stdout is None:
            raise RuntimeError("Popen made no pipes, which it was asked for")
        self._stdin, self.stdout = self._popen.stdin, self._popen.stdout
        self.in_flight: deque[int] = deque()
        self.ready, self.begun, self.dead, self.fatal = False, False, False, ""
        self.since = time.monotonic()
        self._partial = b""
        self._answers: list[tuple[int, Reward]] = []

    def send(self, indices: list[int], pairs: Sequence[tuple[Problem, str]]) -> bool:
        """Hands over a chunk. False when the process died while idle: no item is to blame."""
        chunk = []
        for index in indices:
            problem, text = pairs[index]
            chunk.append((problem.problem_id, problem.task, problem.question, problem.entry, text))
        try:
            self._stdin.write(json.dumps(chunk).encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError:
            self.dead = True
            return False
        self.in_flight.extend(indices)
        self.begun = False
        self.since = time.monotonic()
        return True

    def read(self) -> None:
        """Takes in what the process wrote; an end-of-file means that it is gone."""
        data = os.read(self.stdout.fileno(), _READ_BYTES)
        self.dead = self.dead or not data
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            self.since = time.monotonic()
            if isinstance(message, dict):
                self.ready = message.get("ready", False)
                self.begun = message.get("begun", False)
                self.fatal = message.get("fatal", "")
            else:
                status, *rest = message
                reward = Reward(RewardStatus(status), *rest)
                self._answers.append((self.in_flight.popleft(), reward))

    def take_answers(self) -> list[tuple[int, Reward]]:
        """The answers since the last call."""
        answers, self._answers = self._answers, []
        return answers

    def how_it_ended(self) -> str:
        """In words, with the signal or exit code: an out-of-memory kill shows as SIGKILL."""
        code = self._popen.wait()
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    def kill(self) -> None:
        """Kills the process with whatever it started, and frees the pipes."""
        with contextlib.suppress(ProcessLookupError):  # already gone and waited for
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        self._close_pipes()

    def close(self) -> None:
        """Lets an idle process end by itself, and kills any other."""
        self._close_pipes()
        try:
            self._popen.wait(EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def _close_pipes(self) -> None:
        self.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # unsent bytes that nobody will read
            self._stdin.close()
