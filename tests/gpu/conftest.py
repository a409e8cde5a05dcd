"""What needs a GPU (`make test-gpu`): an engine and a process group of this process."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pear_ray.engines.environment import engine_environment

# tests/integration says the opposite when it is collected: the two run in processes of their own.
os.environ.update(engine_environment(device="cuda", num_threads=1, kv_cache_gib=1))


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.fail("no CUDA device; leave these tests out with -m 'not gpu'")


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """A process group of this process alone, for parameters and for counts."""
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl", init_method="tcp://127.0.0.1:0", rank=0, world_size=1
    )
    yield
    if torch.distributed.is_initialized():  # an engine that ends first takes the group with it
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def start_engine(process_group: None, student: Path) -> Any:
    """What starts an engine that sleeps and takes weights, in a tenth of the GPU."""
    from pear_ray.engines.vllm.engine import VllmEngine
    from pear_ray.engines.vllm.spec import EngineSpec

    def start(dtype: str) -> Any:
        spec = EngineSpec(
            model=str(student),
            dtype=dtype,
            max_model_len=160,
            device="cuda",
            gpu_memory_fraction=0.1,
            eager=True,
            sleeps=True,
        )
        return VllmEngine(spec, takes_weights=True)

    return start


@pytest.fixture(scope="session")
def engine(start_engine: Any) -> Any:
    """One in bfloat16."""
    return start_engine("bfloat16")
