"""Calls in a pool of actors: what dies is made again, what raises is told, none is taken early."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pear_ray.distributed.call_pool import Call, CallPool, Outcome
from pear_ray.errors import TrainingError


@pytest.fixture
def pool(local_ray: None) -> Iterator[CallPool]:
    with CallPool(1, num_cpus=1.0, environment={}, host_of=None, selector={}) as made:
        yield made


def make(pool: CallPool, *functions: Any, folder: Path) -> dict[str, Outcome]:
    calls = [
        Call(name=function.__name__, function=function, arguments=(str(folder),))
        for function in functions
    ]
    return {each.name: each for each in pool.run(calls, max_retries=1)}


def test_a_call_whose_process_died_is_made_again_and_one_that_raised_is_not(
    pool: CallPool, tmp_path: Path
) -> None:
    def count(folder: str, name: str) -> int:  # closures: a worker cannot import this file
        path = Path(folder) / name
        with path.open("a", encoding="utf-8") as file:
            file.write("x")
        return len(path.read_text(encoding="utf-8"))

    def dies_once(folder: str) -> int:
        if count(folder, "once") == 1:
            os._exit(1)
        return 7

    def dies(folder: str) -> None:
        count(folder, "always")
        os._exit(1)

    def raises(folder: str) -> None:
        count(folder, "raised")
        raise TrainingError("the loss is not finite")

    def fine(folder: str) -> str:
        return folder

    found = make(pool, dies_once, dies, raises, fine, folder=tmp_path)
    assert (found["dies_once"].value, found["dies_once"].attempts) == (7, 2)
    assert (found["dies"].value, found["dies"].attempts) == (None, 2)
    assert found["dies"].error.startswith("its process died")
    assert found["raises"].error == "TrainingError: the loss is not finite"
    assert found["raises"].attempts == 1
    assert (tmp_path / "raised").read_text(encoding="utf-8") == "x"
    assert (tmp_path / "always").read_text(encoding="utf-8") == "xx"
    assert (found["fine"].value, found["fine"].error) == (str(tmp_path), "")


def test_a_call_is_taken_when_there_is_a_worker_for_it(pool: CallPool, tmp_path: Path) -> None:
    taken: list[int] = []

    def calls() -> Iterator[Call]:
        for number in range(3):
            taken.append(number)
            yield Call(name=str(number), function=lambda: None, arguments=())

    for number, outcome in enumerate(pool.run(calls(), max_retries=0)):
        assert outcome.name == str(number)
        assert taken == list(range(number + 1))
    assert taken == [0, 1, 2]
