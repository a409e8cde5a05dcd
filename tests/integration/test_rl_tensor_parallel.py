"""Two ranks that share one engine learn, and evaluate, what those with an engine each do."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import tensor_parallel_ranks
import torch
from free_ports import free_ports
from training_runs import run_config

from pear_ray.config.run import validate_run
from pear_ray.distributed.capacity import sampler_spec
from pear_ray.distributed.samplers import SamplerPool
from pear_ray.errors import ConfigError, EngineError
from pear_ray.preflight import check_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the model is, and what the ranks write."""
    folder = tmp_path_factory.mktemp("shared")
    tensor_parallel_ranks.make_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """By the number of ranks per engine, what each rank found."""
    results = {}
    for size in (1, 2):
        [port] = free_ports(1)
        torch.multiprocessing.spawn(
            tensor_parallel_ranks.run_rank, args=(folder, port, size), nprocs=2
        )
        files = [folder / f"size-{size}" / f"rank-{rank}.json" for rank in range(2)]
        results[size] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return results


def test_a_shared_engine_samples_what_engines_of_their_own_sample(
    found: dict[int, list[dict[str, Any]]],
) -> None:
    apart, shared = found[1][0]["metrics"], found[2][0]["metrics"]
    assert 0 < apart[1]["rl/reward/mean"] < 1
    for one, other in zip(apart, shared, strict=True):
        for name in ("rl/reward/mean", "rl/completion_length/mean", "rl/loss", "rl/grad_norm"):
            if name in one:
                assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name
        evaluated = [name for name in one if "eval/" in name]
        assert evaluated
        for name in evaluated:
            assert other[name] == pytest.approx(one[name], rel=1e-5), name


def test_it_takes_the_weights_of_every_step(found: dict[int, list[dict[str, Any]]]) -> None:
    start, *steps = found[2][0]["metrics"]
    assert start["rl/self_test/mean_gap"] < 1e-5
    for step in steps:
        assert step["rl/sync_gap"] < 1e-5
        assert step["rl/mismatch/max_gap"] < 1e-4
        assert step["rl/grad_norm"] > 0


def test_its_ranks_agree(found: dict[int, list[dict[str, Any]]]) -> None:
    first, second = found[2]
    assert first["norm"] == second["norm"]
    names = [name for name in first["metrics"][1] if not name.startswith(("time/", "rl/tokens"))]
    for name in names:
        if not name.startswith("memory/"):
            assert first["metrics"][1][name] == second["metrics"][1][name], name


def test_an_evaluating_engine_of_two_ranks_answers_as_one_of_one(
    local_ray: None, folder: Path, found: dict[int, list[dict[str, Any]]]
) -> None:
    """Started on other weights, it takes those that the one was started on."""
    with wide_pool(folder) as pool:
        assert len(pool._all[0].actors) == 2
        check_answers(pool, found[1][0]["completions"])


@pytest.mark.slow  # two engines of two processes, one after the other: a minute
def test_an_engine_that_loses_a_rank_is_replaced(
    local_ray: None, folder: Path, found: dict[int, list[dict[str, Any]]]
) -> None:
    with wide_pool(folder) as pool:
        ray.kill(pool._all[0].actors[1])
        check_answers(pool, found[1][0]["completions"])
        ray.kill(pool._all[0].actors[1])
        with pytest.raises(EngineError, match="its process died"):
            check_answers(pool, [])


@contextlib.contextmanager
def wide_pool(folder: Path) -> Iterator[SamplerPool]:
    """A pool of one engine of two ranks, with the weights of `model`."""
    tree = run_config(folder).model_dump(mode="json")
    tree["cluster"] |= {"num_samplers": 1, "max_failures": 1}
    tree["evaluate"]["tensor_parallel_size"] = 2
    config = validate_run(tree, origin="test")
    tensor_parallel_ranks.make_model(folder / "other", seed=1)
    spec = sampler_spec(config, folder / "other", stage="evaluate")
    with SamplerPool(config, spec, stage="test") as pool:
        assert pool.load(folder / "model", max_gap=1e-4) < 1e-5
        yield pool


def check_answers(pool: SamplerPool, expected: list[dict[str, Any]]) -> None:
    """See that `pool` samples these completions."""
    groups = pool.generate(
        tensor_parallel_ranks.PROMPTS,
        tensor_parallel_ranks.SAMPLING,
        progress=lambda *_: None,
    )
    for one, other in zip([one for group in groups for one in group], expected, strict=True):
        assert one.token_ids == other["token_ids"]
        assert one.behavior_logprobs == pytest.approx(other["logprobs"], abs=1e-4)


def test_what_cannot_be_shared(tmp_path: Path) -> None:
    tree = run_config(tmp_path).model_dump(mode="json")
    tree["rl"]["tensor_parallel_size"] = 2
    with pytest.raises(ConfigError, match=r"rl.tensor_parallel_size=2 does not divide cluster"):
        validate_run(tree, origin="test")
    tree["cluster"]["num_trainers"] = 2
    with pytest.raises(ConfigError, match=r"rl.tensor_parallel_size=2 does not divide the 3 atten"):
        check_models(validate_run(tree, origin="test"))
    tree["rl"]["tensor_parallel_size"], tree["evaluate"]["tensor_parallel_size"] = 1, 2
    message = r"evaluate.tensor_parallel_size=2 does not divide the 3 atten"
    with pytest.raises(ConfigError, match=message):
        check_models(validate_run(tree, origin="test"))
    tree["evaluate"]["tensor_parallel_size"] = 4
    tree["sft"]["pass_at_k"] = {"every": 1}
    with pytest.raises(ConfigError, match=r"evaluate.tensor_parallel_size=4 does not divide clust"):
        validate_run(tree, origin="test")
