"""A completion's code, run with the problem's tests in a subprocess of its own.

The limits keep a run alive under bad code; they are no sandbox. Code that is after it can read what
the user can read, reach the network, and leave processes behind.
"""

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from typing import IO, Any

from pear_ray.config.rewards import UnitTestsVerifier
from pear_ray.records import Problem, Reward, RewardStatus
from pear_ray.tasks.entries import metadata_of
from pear_ray.tasks.verifiers import failed

# A block of any language, so that the end of one is not taken for the beginning of the next.
_BLOCK = re.compile(r"^```([^\n`]*)\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
_LANGUAGES = ("", "python", "python3", "py")
_ERROR_CHARS = 2000

# The tests' subprocess. Limits are hard, and set before any code runs, so that it cannot lift them.
# Passing is said with a word that the code was not told: its own exit code 0 proves nothing.
_RUNNER = """\
import ctypes, json, os, resource, sys
job = json.loads(sys.stdin.buffer.read())
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: not to outlive the verifier
if os.getppid() != job["parent"]:
    os._exit(1)
for name, amount in job["limits"].items():
    resource.setrlimit(getattr(resource, name), (amount, amount))
word, out = job.pop("word"), os.dup(1)
os.dup2(2, 1)
names = {"__name__": "__main__"}
exec(compile(job["code"], "completion.py", "exec"), names)
for number, test in enumerate(job["tests"]):
    exec(compile(test, f"test_{number}.py", "exec"), names)
os.write(out, word.encode())
os._exit(0)
"""


def extract_code(completion_text: str) -> str | None:
    """The last complete fenced block, without a language or in Python; None without one."""
    blocks = [
        code
        for language, code in _BLOCK.findall(completion_text)
        if language.strip().lower() in _LANGUAGES
    ]
    return blocks[-1] if blocks else None


def check_tests(tests: Any) -> list[str]:
    """The tests as a list of Python texts.

    Raises:
        ValueError: They are missing, are something else, or are no Python.
    """
    texts = [tests] if isinstance(tests, str) else tests
    is_list = isinstance(texts, list) and all(isinstance(one, str) for one in texts)
    if not is_list or not any(one.strip() for one in texts):
        raise ValueError(f"expected Python text or a list of such texts, got {tests!r:.60}")
    for text in texts:
        try:
            compile(text, "tests", "exec")
        except SyntaxError as error:
            raise ValueError(f"the tests are no Python: {error}") from error
    return texts


def verify_unit_tests(config: UnitTestsVerifier, problem: Problem, completion_text: str) -> Reward:
    """OK where the code runs and every test passes; whatever ends it early is the code's fault.

    Raises:
        ValueError: The problem's tests cannot be used.
        OSError: No subprocess could be started.
    """
    tests = check_tests(metadata_of(problem).get(config.tests))
    code = extract_code(completion_text)
    if code is None:
        return failed("no code block")
    word = secrets.token_hex(16)
    job = {
        "code": code,
        "tests": tests,
        "word": word,
        "parent": os.getpid(),
        "limits": {
            "RLIMIT_CPU": config.cpu_s,
            "RLIMIT_AS": config.memory_bytes,
            "RLIMIT_FSIZE": config.file_bytes,
            "RLIMIT_CORE": 0,
        },
    }
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as said,
        tempfile.TemporaryFile() as errors,
    ):
        ended = _run(job, folder, said, errors, deadline_s=config.deadline_s)
        if _tail(said) == word:
            return Reward(RewardStatus.OK, 1.0)
        why = _tail(errors).strip().splitlines()
    return failed(ended or (why[-1] if why else "the code ended the process before its tests"))


def _run(
    job: dict[str, Any], folder: str, said: IO[bytes], errors: IO[bytes], *, deadline_s: float
) -> str:
    """How the subprocess was ended, in words; nothing where it ended by itself."""
    process = subprocess.Popen(  # noqa: S603 - our interpreter; the code in it is what is limited
        [sys.executable, "-I", "-B", "-c", _RUNNER],
        stdin=subprocess.PIPE,
        stdout=said,
        stderr=errors,
        cwd=folder,
        env={},
        start_new_session=True,
    )
    try:
        process.communicate(json.dumps(job).encode(), timeout=deadline_s)
    except subprocess.TimeoutExpired:
        return f"killed after {deadline_s:g} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it started may live on, or not
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    code = process.returncode
    return f"died of {signal.Signals(-code).name}" if code < 0 else ""


def _tail(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - _ERROR_CHARS))
    return file.read().decode(errors="replace")
