"""One Ray and one engine for the whole folder: each takes many seconds to start."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import job, run_config

from pear_ray.artifacts.tables import SCORED, write_rows
from pear_ray.config.run import validate_run
from pear_ray.embedded.paths import embedded_path
from pear_ray.engines.environment import engine_environment

os.environ.update(engine_environment(device="cpu", num_threads=1, kv_cache_gib=1))


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """A process group of this process alone; engines are started after it, as in a worker."""
    torch.distributed.init_process_group(
        "gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1
    )
    yield
    if torch.distributed.is_initialized():  # an engine that ends first takes the group with it
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def engine(process_group: None) -> Any:
    """A real engine on the embedded student, in this process, that takes weights."""
    from pear_ray.engines.vllm.engine import VllmEngine
    from pear_ray.engines.vllm.spec import EngineSpec

    spec = EngineSpec(model=str(embedded_path("student")), dtype="float32", max_model_len=200)
    return VllmEngine(spec, takes_weights=True)


@pytest.fixture(scope="session")
def chunked_engine(process_group: None) -> Any:
    """A scoring engine whose passes hold 64 tokens, so that prompts share and straddle them.

    Of the session like the other: the first engine to end takes vLLM's groups from both.
    """
    from pear_ray.engines.vllm.engine import VllmEngine
    from pear_ray.engines.vllm.spec import EngineSpec

    spec = EngineSpec(
        model=str(embedded_path("student")),
        dtype="float32",
        max_model_len=200,
        chunk_tokens=64,
        max_top_k=272,
    )
    return VllmEngine(spec)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A local Ray with two CPUs, no dashboard."""
    import ray

    ray.init(
        "local",  # else it joins whatever Ray runs on this machine, such as another process's
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        # How often gauges are exported: else every 10 s, and kept twice as long.
        _system_config={"metrics_report_interval_ms": 2500},
    )
    yield
    ray.shutdown()


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """Sixteen rows of digits with made-up behavior log-probs, in the run folder `tmp_path`."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(16):
        length = 12 + 2 * (number % 5)
        ids = torch.randint(5, 60, (length,), generator=generator).tolist()
        rows.append(
            {
                "example_id": f"row-{number:02d}",
                "source": "test",
                "is_negative": False,
                "token_ids": ids,
                "loss_mask": [False] * 4 + [True] * (length - 4),
                "behavior_logprobs": (-torch.rand(length, generator=generator) * 5).tolist(),
            }
        )
    folder = tmp_path / "score" / "scored"
    folder.mkdir(parents=True)
    write_rows(folder / "rows.parquet", rows, SCORED)
    return tmp_path


@pytest.fixture
def start_grpo(
    process_group: None, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """What starts real GRPO workers that borrow the shared engine rather than start their own."""
    from pear_ray.distributed import rl_loop

    monkeypatch.setattr(rl_loop, "open_engine", lambda spec: engine)
    workers = []

    def start(**rl: Any) -> Any:
        tree = run_config(tmp_path).model_dump(mode="json")
        tree["rl"] |= rl
        worker = rl_loop.GrpoWorker(job(validate_run(tree, origin="test"), tmp_path, "rl"))
        workers.append(worker)
        worker.publish_weights()
        return worker

    yield start
    for worker in workers:
        worker.batches.close()
        worker.pool.close()


@pytest.fixture
def grpo(start_grpo: Any) -> Any:
    """One with the test's defaults."""
    return start_grpo()
