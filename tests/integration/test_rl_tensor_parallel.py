"""Two trainers that share one engine learn what two with an engine each do."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import tensor_parallel_ranks
import torch


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """By the number of ranks per engine, what each rank found."""
    folder = tmp_path_factory.mktemp("shared")
    tensor_parallel_ranks.make_model(folder / "model")
    results = {}
    for size in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
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


def test_what_cannot_be_shared(tmp_path: Path) -> None:
    from training_runs import run_config

    from pear_ray.config.run import validate_run
    from pear_ray.errors import ConfigError
    from pear_ray.preflight import check_models

    tree = run_config(tmp_path).model_dump(mode="json")
    tree["rl"]["tensor_parallel_size"] = 2
    with pytest.raises(ConfigError, match=r"rl.tensor_parallel_size=2 does not divide cluster"):
        validate_run(tree, origin="test")
    tree["cluster"]["num_trainers"] = 2
    with pytest.raises(ConfigError, match=r"rl.tensor_parallel_size=2 does not divide the 3 atten"):
        check_models(validate_run(tree, origin="test"))
