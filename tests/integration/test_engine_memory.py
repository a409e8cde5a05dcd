"""The engine out of memory, at each place of a pass where it can be: fewer at once, same answer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from pear_ray.engines.backing_off import BackingOff
from pear_ray.engines.top_logprobs import MaskedIds
from pear_ray.errors import EngineError, OutOfMemoryError

LENGTHS = [20, 3, 150, 60, 1, 90, 35, 7, 120, 44, 15]
AT_ONCE = 4  # sequences that memory does for
MESSAGE = "DefaultCPUAllocator: can't allocate memory"
# What fails: the model's forward pass, the logits of the tokens to sample, or those of a prompt.
PLACES = ["forward", "sampled logits", "prompt logits"]
Fault = Callable[..., None]


@pytest.fixture
def sequences() -> list[list[int]]:
    generator = np.random.default_rng(5)
    return [generator.integers(5, 250, size=length).tolist() for length in LENGTHS]


def runner_of(engine: Any) -> Any:
    """What runs the engine's model, and knows which sequences are in a pass."""
    core = engine.llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


@pytest.fixture
def memory_for(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Fault:
    """Let the real model run out of memory when a pass has more than so many sequences."""
    runner = runner_of(engine)
    model_class = type(runner.model)  # patched on the instance, it would outlive the process group
    calls = {"logits": 0}

    def install(most: int, place: str) -> None:
        forward, compute_logits = model_class.forward, model_class.compute_logits

        def fail_at(here: str) -> None:
            if here == place and runner.input_batch.num_reqs > most:
                raise RuntimeError(MESSAGE)

        def failing_forward(*args: Any, **kwargs: Any) -> Any:
            calls["logits"] = 0
            fail_at("forward")
            return forward(*args, **kwargs)

        def failing_logits(*args: Any, **kwargs: Any) -> Any:
            calls["logits"] += 1  # first of all sampled tokens together, then of one prompt a call
            fail_at("sampled logits" if calls["logits"] == 1 else "prompt logits")
            return compute_logits(*args, **kwargs)

        monkeypatch.setattr(model_class, "forward", failing_forward)
        monkeypatch.setattr(model_class, "compute_logits", failing_logits)

    return install


def num_left(engine: Any) -> int:
    """Requests that the engine still has, wherever it keeps them."""
    core = engine.llm.llm_engine.engine_core.engine_core
    return (
        engine.llm.llm_engine.get_num_unfinished_requests()
        + core.scheduler.get_num_unfinished_requests()
        + len(core.batch_queue or ())
    )


@pytest.mark.parametrize("place", PLACES)
def test_backing_off_gives_what_an_undisturbed_engine_gives(
    engine: Any, sequences: list[list[int]], memory_for: Fault, place: str
) -> None:
    undisturbed = engine.score(sequences)
    memory_for(AT_ONCE, place)
    with pytest.raises(OutOfMemoryError, match="can't allocate memory"):
        engine.score(sequences)
    assert num_left(engine) == 0
    score = BackingOff(engine.score, at_most=len(sequences))
    found = score(sequences)
    assert score.rows_at_once == 2  # 11, 5, 2
    for one, other in zip(undisturbed, found, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-6)
    assert num_left(engine) == 0


@pytest.mark.parametrize("place", PLACES)
def test_afterwards_the_engine_answers_as_before(
    engine: Any,
    sequences: list[list[int]],
    memory_for: Fault,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    undisturbed = engine.score(sequences)
    memory_for(AT_ONCE, place)
    for _ in range(3):
        with pytest.raises(OutOfMemoryError):
            engine.score(sequences)
    monkeypatch.undo()
    for one, other in zip(undisturbed, engine.score(sequences), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(undisturbed[::-1], engine.score(sequences[::-1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-6)


def test_candidates_survive_backing_off(
    engine: Any, sequences: list[list[int]], memory_for: Fault
) -> None:
    rows = [MaskedIds(ids, [False] + [True] * (len(ids) - 1)) for ids in sequences]
    undisturbed = engine.score_top(rows, top_k=6)
    memory_for(AT_ONCE, "prompt logits")
    score = BackingOff(partial(engine.score_top, top_k=6), at_most=len(rows))
    for one, other in zip(undisturbed, score(rows), strict=True):
        np.testing.assert_array_equal(one.top_ids, other.top_ids)
        np.testing.assert_allclose(one.top_logprobs, other.top_logprobs, rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=2e-6, atol=1e-6)


def test_one_row_too_many_says_which_settings_to_lower(
    engine: Any, sequences: list[list[int]], memory_for: Fault
) -> None:
    memory_for(0, "forward")
    with pytest.raises(EngineError, match=r"one row of 20 tokens; lower score\.chunk_tokens"):
        BackingOff(engine.score, at_most=4)(sequences)
    assert num_left(engine) == 0


def test_another_error_is_not_taken_for_it(
    engine: Any, sequences: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("shapes do not match")

    undisturbed = engine.score(sequences)
    with monkeypatch.context() as planted:
        planted.setattr(type(runner_of(engine).model), "forward", fail)
        with pytest.raises(RuntimeError, match="shapes do not match"):
            BackingOff(engine.score, at_most=4)(sequences)
    for one, other in zip(undisturbed, engine.score(sequences), strict=True):
        np.testing.assert_array_equal(one, other)
