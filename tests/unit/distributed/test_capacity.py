"""What a run asks of a cluster is compared with what is there, in words."""

from pathlib import Path

import pytest
from small_run import GAMES, small_run

from pear_ray.distributed.capacity import (
    check_capacity,
    demand,
    num_threads,
    rl_engine_spec,
    worker_environment,
)
from pear_ray.errors import CapacityError


def test_the_largest_stage_decides() -> None:
    config = small_run(num_trainers=2, num_samplers=5, cpus_per_worker=1.5)
    assert demand(config) == {"CPU": 7.5}
    config = small_run(num_trainers=4, num_samplers=1, cpus_per_worker=0.5, device="cuda")
    assert demand(config) == {"CPU": 2.0, "GPU": 4.0}
    split = config.score.model_copy(update={"tensor_parallel_size": 8})
    assert demand(config.model_copy(update={"score": split})) == {"CPU": 4.0, "GPU": 8.0}


@pytest.mark.parametrize("section", ["corpus", "evaluate"])
def test_engines_over_more_devices_than_there_are(section: str) -> None:
    sampled = {"kind": "sampled", "problems": GAMES} if section == "corpus" else {}
    sections = {section: {"problems": GAMES} | sampled | {"tensor_parallel_size": 4}}
    config = small_run(sections, num_samplers=2, device="cuda")
    assert demand(config)["GPU"] == 8
    check_capacity(config, {"CPU": 8.0, "GPU": 8.0})
    message = rf"asked for 8 GPU, the cluster has 4: .*{section}.tensor_parallel_size=4 or cluster."
    with pytest.raises(CapacityError, match=message):
        check_capacity(config, {"CPU": 8.0, "GPU": 4.0})


def test_exactly_enough_is_enough() -> None:
    check_capacity(small_run(num_samplers=2), {"CPU": 2.0})
    check_capacity(small_run(device="cuda"), {"CPU": 2.0, "GPU": 2.0, "memory": 1.0})


def test_short_of_cpus() -> None:
    with pytest.raises(CapacityError) as caught:
        check_capacity(small_run(num_samplers=5, cpus_per_worker=1.5), {"CPU": 2.0})
    message = str(caught.value)
    assert message.startswith("asked for 7.5 CPU, the cluster has 2: lower")
    assert "cluster.num_samplers=5" in message
    assert "cluster.cpus_per_worker=1.5" in message
    assert "GPU" not in message
    assert caught.value.exit_code == 2


def test_short_of_gpus_only() -> None:
    with pytest.raises(CapacityError, match=r"^asked for 2 GPU, the cluster has 0: lower"):
        check_capacity(small_run(device="cuda"), {"CPU": 64.0})


def test_short_of_both_names_both() -> None:
    with pytest.raises(
        CapacityError, match=r"asked for 2 CPU, .* has 1; asked for 2 GPU, .* has 1"
    ):
        check_capacity(small_run(device="cuda"), {"CPU": 1.0, "GPU": 1.0})


@pytest.mark.parametrize(("cpus", "threads"), [(0.25, 1), (1.0, 1), (1.9, 1), (4.0, 4)])
def test_threads_are_whole_and_at_least_one(cpus: float, threads: int) -> None:
    cluster = small_run(cpus_per_worker=cpus).cluster
    assert num_threads(cluster) == threads
    assert worker_environment(cluster)["OMP_NUM_THREADS"] == str(threads)


def test_workers_inherit_what_locates_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/models")
    monkeypatch.setenv("UNRELATED_SECRET", "x")
    environment = worker_environment(small_run(kv_cache_gib=3).cluster)
    assert environment["HF_HOME"] == "/models"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert "UNRELATED_SECRET" not in environment


def test_an_engine_on_a_shared_gpu_measures_nothing_and_does_not_sleep() -> None:
    spec = rl_engine_spec(small_run(device="cuda", kv_cache_gib=2, shares_gpu=True), Path("m"))
    assert (spec.cache_gib, spec.sleeps) == (2, False)
    alone = rl_engine_spec(small_run(device="cuda", kv_cache_gib=2), Path("m"))
    assert (alone.cache_gib, alone.sleeps) == (None, True)
    on_cpu = rl_engine_spec(small_run(shares_gpu=True), Path("m"))
    assert (on_cpu.cache_gib, on_cpu.sleeps) == (None, False)
