"""The pool: order, three states, and faults that cost only the item that caused them."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pear_ray.config.problems import GameConfig, ProblemSetConfig, RewardConfig
from pear_ray.errors import ConfigError, RewardError
from pear_ray.records import Problem, RewardStatus
from pear_ray.tasks.games import make_problems
from pear_ray.tasks.reward_pool import RewardPool

PROBLEM = Problem("planted/0/0", "planted", "?", "{}")


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[RewardPool]:
    # The processes see this process's sys.path: that is how a user's function reaches them.
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    config = RewardConfig(num_processes=2, deadline_s=1.0)
    with RewardPool(config, verifier="planted:obey") as opened:
        yield opened


def ask(pool: RewardPool, *texts: str) -> list[tuple[str, float, str]]:
    rewards = pool.verify_all([(PROBLEM, text) for text in texts])
    return [(str(r.status), r.value, r.detail) for r in rewards]


def values(pool: RewardPool, count: int) -> list[float]:
    return [value for _, value, _ in ask(pool, *map(str, range(count)))]


def test_order_is_kept_over_many_items_and_calls(pool: RewardPool) -> None:
    assert values(pool, 1000) == list(range(1000))
    assert values(pool, 3) == [0, 1, 2]
    assert pool.verify_all([]) == []


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("segfault", "the verifier's process died of SIGSEGV"),
        ("exit", "the verifier's process exited with code 3"),
        ("raise", "ValueError: no reading of planted/0/0"),
        ("memory", "MemoryError: "),
    ],
)
def test_a_fault_costs_only_its_own_item(pool: RewardPool, text: str, detail: str) -> None:
    texts = [str(i) for i in range(100)]
    texts[41] = text
    rewards = ask(pool, *texts)
    assert rewards[41] == ("errored", 0.0, detail)
    assert [r for i, r in enumerate(rewards) if i != 41] == [
        ("ok", float(i), "") for i in range(100) if i != 41
    ]
    assert values(pool, 5) == [0, 1, 2, 3, 4]


def test_a_hanging_verifier_is_killed_at_its_deadline(pool: RewardPool) -> None:
    values(pool, 2)  # both processes are up
    start = time.monotonic()
    rewards = ask(pool, "1", "hang", "2", "hang", "3")
    assert time.monotonic() - start < 20
    assert [status for status, _, _ in rewards] == ["ok", "errored", "ok", "errored", "ok"]
    assert rewards[1][2].startswith("the verifier's process was killed after 1.")


def test_a_verifier_may_print_and_must_return_a_reward(pool: RewardPool) -> None:
    printed, returned = ask(pool, "print", "none")
    assert printed == ("ok", 5.0, "")
    assert returned[0] == "errored"
    assert "must return a Reward" in returned[2]


def test_a_process_killed_while_idle_blames_no_item(pool: RewardPool) -> None:
    pids = {int(value) for _, value, _ in ask(pool, *["pid"] * 40)}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert values(pool, 20) == list(range(20))


def test_a_process_killed_before_it_begins_blames_no_item(pool: RewardPool) -> None:
    """It has been sent its items, and dies without having looked at them."""
    pids = {int(value) for _, value, _ in ask(pool, *["pid"] * 40)}
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    kill = threading.Timer(0.3, lambda: [os.kill(pid, signal.SIGKILL) for pid in pids])
    kill.start()
    assert {status for status, _, _ in ask(pool, *["pid"] * 20)} == {RewardStatus.OK}
    kill.join()


def test_closing_ends_the_processes(pool: RewardPool) -> None:
    pids = {int(value) for _, value, _ in ask(pool, *["pid"] * 40)}
    pool.close()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    with pytest.raises(RewardError, match="closed"):
        values(pool, 1)


def test_a_verifier_that_cannot_be_loaded_is_a_config_error() -> None:
    with (
        RewardPool(RewardConfig(), verifier="no_such_module:verify") as pool,
        pytest.raises(ConfigError, match="no_such_module"),
    ):
        values(pool, 1)


def test_games_verify_in_the_pool() -> None:
    problem = make_problems(ProblemSetConfig(games=[GameConfig(name="spell_backward")], size=1))[0]
    word = problem.question.rsplit(" ", 1)[1]
    with RewardPool(RewardConfig(deadline_s=1.0)) as pool:
        right, wrong, silent = pool.verify_all(
            [
                (problem, f"<answer>{word[::-1]}</answer>"),
                (problem, "<answer>z</answer>"),
                (problem, ""),
            ]
        )
    assert (right.status, right.value) == (RewardStatus.OK, 1.0)
    assert (wrong.status, wrong.value) == (RewardStatus.FAILED, 0.0)
    assert silent.detail == "no answer"
