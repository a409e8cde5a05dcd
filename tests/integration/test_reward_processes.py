"""Verifiers that take seconds to be ended: endless sympy, code that burns its processor time."""

import json

import pytest

from pear_ray.config.rewards import RewardConfig
from pear_ray.records import Problem, RewardStatus
from pear_ray.tasks.reward_pool import RewardPool


def problem(answer: str | None, **metadata: str) -> Problem:
    return Problem("p/1", "p", "?", json.dumps({"answer": answer, "metadata": metadata}))


def test_an_endless_comparison_is_killed_by_the_pool_without_signals_of_its_own() -> None:
    pytest.importorskip("math_verify", reason="extra `math`")
    config = RewardConfig.model_validate({"components": [{"kind": "math"}], "deadline_s": 1.0})
    endless = r"\boxed{9^{9^{9^{9}}}}"
    with RewardPool(config) as pool:
        hung, right = pool.verify_all([(problem("5"), endless), (problem("5"), r"\boxed{5}")])
    assert hung.status is RewardStatus.ERRORED
    assert "was killed after 1." in hung.detail
    assert right.status is RewardStatus.OK


def test_bad_code_is_wrong_and_the_pool_goes_on() -> None:
    """Each ends its own subprocess, and none the verifier: wrong, and not errored."""
    component = {"kind": "unit_tests", "cpu_s": 1, "deadline_s": 30.0}  # a busy machine is slow
    codes = {
        "while True: pass": "died of SIG",
        "import ctypes; ctypes.string_at(0)": "died of SIGSEGV",
        "import re; re.match('(a+)+b', 'a' * 40)": "died of SIG",
        "import os; os.kill(os.getpid(), 9)": "died of SIGKILL",
    }
    asleep = {"import time; time.sleep(60)": "killed after 3 s"}
    tests = problem(None, tests="assert x == 1")
    for settings, wrong in ((component, codes), (component | {"deadline_s": 3.0}, asleep)):
        config = RewardConfig.model_validate({"components": [settings], "deadline_s": 60.0})
        with RewardPool(config) as pool:
            rewards = pool.verify_all([(tests, f"```\n{code}\n```") for code in wrong])
            good = pool.verify_all([(tests, "```\nx = 1\n```")])
        for reward, said in zip(rewards, wrong.values(), strict=True):
            assert reward.status is RewardStatus.FAILED
            assert reward.detail.startswith(said)
        assert good[0].status is RewardStatus.OK
