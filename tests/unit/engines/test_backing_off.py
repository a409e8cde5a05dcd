"""Fewer rows when memory runs out, more when it lasts, and every row once and in order."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pear_ray.engines.backing_off import CALM_CALLS, BackingOff
from pear_ray.errors import EngineError, OutOfMemoryError


class Device:
    """Memory for so many rows, or so many tokens, at once."""

    def __init__(self, *, rows: int = 1000, tokens: int = 1000) -> None:
        self.rows, self.tokens = rows, tokens
        self.calls: list[int] = []

    def total(self, rows: Sequence[list[int]]) -> list[int]:
        """The sum of each row, so that order shows."""
        self.calls.append(len(rows))
        if len(rows) > self.rows or sum(map(len, rows)) > self.tokens:
            raise OutOfMemoryError("planted")
        return [sum(row) for row in rows]


def numbered(count: int) -> list[list[int]]:
    return [[number] for number in range(count)]


def test_all_at_once_where_memory_does() -> None:
    device = Device()
    act = BackingOff(device.total, at_most=4)
    assert act(numbered(9)) == list(range(9))
    assert device.calls == [4, 4, 1]
    assert act([]) == []


def test_halves_until_it_goes_and_stays_there() -> None:
    device = Device(rows=2)
    act = BackingOff(device.total, at_most=8)
    assert act(numbered(6)) == list(range(6))
    assert device.calls == [6, 3, 1, 1, 1, 1, 1, 1]  # half of what was tried, rounded down
    assert act.rows_at_once == 1


def test_as_many_rows_as_memory_takes_are_not_halved() -> None:
    device = Device(rows=4)
    act = BackingOff(device.total, at_most=4)
    assert act(numbered(8)) == list(range(8))
    assert device.calls == [4, 4]


def test_a_call_of_few_rows_halves_those() -> None:
    """Not the 64 that were allowed: that would fail on the same rows again and again."""
    device = Device(tokens=10)
    act = BackingOff(device.total, at_most=64)
    assert act([[1] * 6, [2] * 6]) == [6, 12]
    assert device.calls == [2, 1, 1]


def test_tries_twice_as_many_after_calm_calls_and_never_above_the_most() -> None:
    device = Device(rows=4)
    act = BackingOff(device.total, at_most=5)
    act(numbered(5))
    assert (device.calls, act.rows_at_once) == ([5, 2, 2, 1], 2)
    for _ in range(CALM_CALLS - 4):
        act(numbered(2))
    assert act.rows_at_once == 2
    act(numbered(2))
    assert act.rows_at_once == 4
    for _ in range(CALM_CALLS):
        act(numbered(4))
    assert act.rows_at_once == 5
    device.rows, device.calls = 1000, []
    assert act(numbered(12)) == list(range(12))
    assert device.calls == [5, 5, 2]


def test_a_failure_ends_the_calm() -> None:
    device = Device()
    act = BackingOff(device.total, at_most=4)
    for _ in range(3 * CALM_CALLS):
        act(numbered(4))
    device.rows, device.calls = 2, []
    act(numbered(4))
    assert (device.calls, act.rows_at_once) == ([4, 2, 2], 2)


def test_one_row_out_of_memory_names_its_length_and_what_to_lower() -> None:
    act = BackingOff(Device(tokens=10).total, at_most=8)
    with pytest.raises(EngineError, match=r"one row of 11 tokens; lower score\.chunk_tokens") as e:
        act([[1], [1] * 11, [1]])
    assert not isinstance(e.value, OutOfMemoryError)
    assert act([[1] * 10]) == [10]


def test_another_error_is_not_retried() -> None:
    calls = []

    def fail(rows: Sequence[list[int]]) -> list[int]:
        calls.append(len(rows))
        raise EngineError("planted")

    with pytest.raises(EngineError, match="planted"):
        BackingOff(fail, at_most=4)(numbered(4))
    assert calls == [4]


@given(
    lengths=st.lists(st.integers(1, 9), max_size=60),
    tokens=st.integers(9, 40),
    at_most=st.integers(1, 20),
)
def test_every_row_comes_back_once_in_order(lengths: list[int], tokens: int, at_most: int) -> None:
    rows = [[place] * length for place, length in enumerate(lengths)]
    device = Device(tokens=tokens)
    assert BackingOff(device.total, at_most=at_most)(rows) == [sum(row) for row in rows]
    assert max(device.calls, default=0) <= at_most
