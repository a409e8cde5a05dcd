"""Code of completions, run with tests in real subprocesses: what passes, and what ends how."""

import json
import os
import time
from pathlib import Path

import pytest

from pear_ray.config.rewards import UnitTestsVerifier
from pear_ray.records import Problem
from pear_ray.tasks.unit_tests import check_tests, extract_code, verify_unit_tests

TESTS = ["assert double(2) == 4", "assert double(-1) == -2"]
GOOD = "def double(x):\n    return 2 * x\n"


def verdict(code: str, tests: object = TESTS, **limits: float) -> tuple[str, str]:
    problem = Problem(
        *("p/1", "p", "?"), json.dumps({"answer": None, "metadata": {"tests": tests}})
    )
    config = UnitTestsVerifier.model_validate({"kind": "unit_tests", **limits})
    reward = verify_unit_tests(config, problem, f"So:\n```python\n{code}\n```\n")
    assert reward.value == (reward.status == "ok")
    return str(reward.status), reward.detail


def test_which_code_is_taken() -> None:
    text = "```python\na\n```\nbetter:\n```\nb\n```\n```bash\nls\n```\n```py\nunfinished"
    assert extract_code(text) == "b\n"
    assert extract_code("x = 1") is None
    assert extract_code("") is None


def test_code_that_passes_and_code_that_does_not() -> None:
    assert verdict(GOOD) == ("ok", "")
    assert verdict(GOOD, "assert double(3) == 6\nassert double('a') == 'aa'") == ("ok", "")
    assert verdict("def double(x):\n    return x + 2\n") == ("failed", "AssertionError")
    assert verdict("def triple(x): ...") == (
        "failed",
        "NameError: name 'double' is not defined",
    )
    status, detail = verdict("def double(x)")
    assert (status, detail.split(":")[0]) == ("failed", "SyntaxError")


@pytest.mark.parametrize("code", ["import sys; sys.exit(0)", "import os; os._exit(0)"])
def test_leaving_before_the_tests_is_not_passing_them(code: str) -> None:
    assert verdict(code) == ("failed", "the code ended the process before its tests")


def test_printing_what_was_not_asked_for_is_not_passing_them() -> None:
    assert verdict("print('ok' * 100)\n" + GOOD) == ("ok", "")
    assert verdict("print('ok')\nraise SystemExit(0)")[0] == "failed"


def test_limits() -> None:
    assert verdict("bytearray(2 << 30)") == ("failed", "MemoryError")
    status, detail = verdict("open('f', 'wb').write(b'x' * 100_000)", file_bytes=1000)
    assert (status, detail) == ("failed", "OSError: [Errno 27] File too large")
    begun = time.monotonic()
    assert verdict("import time; time.sleep(60)", deadline_s=0.5) == (
        "failed",
        "killed after 0.5 s",
    )
    assert time.monotonic() - begun < 20


def test_what_the_code_started_is_killed_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(mark)!r}, 'w').write(str(child.pid))\n" + GOOD
    )
    assert verdict(code)[0] == "ok"
    pid = int(mark.read_text(encoding="utf-8"))
    deadline = time.monotonic() + 5
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    """Whether the process is there and no zombie, which only its new parent could take away."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split(") ")[1][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_it_sees_no_environment_and_an_empty_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", "1")
    assert os.environ["PLANTED"]
    tests = "import os\nassert 'PLANTED' not in os.environ and os.listdir() == [], os.listdir()"
    assert verdict("pass", tests) == ("ok", "")


@pytest.mark.parametrize(
    ("tests", "why"),
    [
        (None, "expected Python text or a list of such texts, got None"),
        ([], "expected Python text"),
        ("  ", "expected Python text"),
        ([1], "expected Python text"),
        ("assert (", "the tests are no Python"),
    ],
)
def test_tests_that_cannot_be_used_are_no_verdict(tests: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_tests(tests)
    with pytest.raises(ValueError, match=why):
        verdict(GOOD, tests)
