"""The pool: order, three states, and faults that cost only the item that caused them."""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pear_ray.config.problems import GameConfig, GameProblems
from pear_ray.config.rewards import FunctionVerifier, RegexVerifier, RewardConfig
from pear_ray.errors import ConfigError, RewardError
from pear_ray.records import Problem, RewardStatus
from pear_ray.tasks.games import make_game_problems
from pear_ray.tasks.reward_pool import RewardPool

PROBLEM = Problem("planted/0/0", "planted", "?", "{}")


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[RewardPool]:
    # The processes see this process's sys.path: that is how a user's function reaches them.
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    with RewardPool(calling("planted:obey", num_processes=2, deadline_s=1.0)) as opened:
        yield opened


def calling(function: str, **settings: object) -> RewardConfig:
    component = FunctionVerifier(kind="function", function=function)
    return RewardConfig(components=[component], **settings)


def ask(pool: RewardPool, *texts: str) -> list[tuple[str, float, str]]:
    rewards = pool.verify_all([(PROBLEM, text) for text in texts])
    return [(str(r.status), r.value, r.detail) for r in rewards]


def values(pool: RewardPool, count: int) -> list[float]:
    return [value for _, value, _ in ask(pool, *map(str, range(count)))]


def test_order_is_kept_over_many_items_and_calls(pool: RewardPool) -> None:
    assert values(pool, 1000) == list(range(1000))
    assert values(pool, 3) == [0, 1, 2]
    assert pool.verify_all([]) == []


RAISED = (
    "component `function`: ValueError: no reading of planted/0/0\n"
    r"  components.py:\d+ in _summed: reward = .*\n"
    r"  function_verifier.py:\d+ in verify_function: said = function\(.*\)\n"
    r"  planted.py:\d+ in obey: raise ValueError\(.*\)"
)
NO_MEMORY = r"component `function`: MemoryError:\n(.*\n)+  planted.py:\d+ in obey: bytearray.*"


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("segfault", "the verifier's process died of SIGSEGV"),
        ("exit", "the verifier's process exited with code 3"),
        ("raise", RAISED),
        ("memory", NO_MEMORY),
    ],
)
def test_a_fault_costs_only_its_own_item(pool: RewardPool, text: str, detail: str) -> None:
    texts = [str(i) for i in range(100)]
    texts[41] = text
    rewards = ask(pool, *texts)
    assert rewards[41][:2] == ("errored", 0.0)
    assert re.fullmatch(f"problem planted/0/0: {detail}", rewards[41][2])
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
    assert rewards[1][2].startswith(
        "problem planted/0/0: the verifier's process was killed after 1."
    )


def test_a_verifier_may_print_and_must_return_a_reward(pool: RewardPool) -> None:
    printed, returned = ask(pool, "print", "none")
    assert printed == ("ok", 5.0, "")
    assert returned[0] == "errored"
    assert "planted:obey returned None; it must return a float, a bool or a dict" in returned[2]


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
    for ask_it in (lambda pool: values(pool, 1), RewardPool.wait_until_ready):
        with (
            RewardPool(calling("no_such_module:verify")) as pool,
            pytest.raises(ConfigError, match="`no_such_module:verify` cannot be loaded: Mod"),
        ):
            ask_it(pool)


def test_a_verifier_that_dies_in_loading_ends_the_pool_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dying.py").write_text("import os\nos._exit(7)\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with RewardPool(calling("dying:verify")) as pool, pytest.raises(RewardError) as caught:
        values(pool, 1)
    assert (
        "3 verifier processes in a row were lost with nothing verified; the last one exited "
        in (str(caught.value))
    )
    assert "\n" not in str(caught.value)


def test_less_memory_for_a_process_is_less_for_its_verifier(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    component = FunctionVerifier(kind="function", function="planted:take", params={"mib": 600})
    with RewardPool(RewardConfig(components=[component])) as roomy:
        assert roomy.verify_all([(PROBLEM, "")])[0].value == 1.0
    with RewardPool(RewardConfig(components=[component], memory_bytes=512 << 20)) as tight:
        [reward] = tight.verify_all([(PROBLEM, "")])
    assert reward.status is RewardStatus.ERRORED
    assert "MemoryError" in reward.detail


def test_code_stuck_in_c_with_the_interpreter_locked_is_killed() -> None:
    """A pattern that backtracks for ever: no signal handler and no thread would run meanwhile."""
    stuck = RegexVerifier(kind="regex", pattern=r"(a+)+b", compare="match", name="stuck")
    with RewardPool(RewardConfig(components=[stuck], deadline_s=0.5)) as pool:
        hung, after = pool.verify_all([(PROBLEM, "a" * 40), (PROBLEM, "ab")])
    assert (hung.status, after.status) == (RewardStatus.ERRORED, RewardStatus.OK)
    assert "was killed after 0." in hung.detail


def test_games_verify_in_the_pool() -> None:
    problem = make_game_problems(GameProblems(games=[GameConfig(name="spell_backward")], size=1))[0]
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
