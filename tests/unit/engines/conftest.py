"""The embedded student, as it ships and as folders that a test may spoil."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pear_ray.embedded.paths import embedded_path
from pear_ray.engines.chat import ChatTokenizer


@pytest.fixture(scope="session")
def student() -> Path:
    return embedded_path("student")


@pytest.fixture(scope="session")
def chat(student: Path) -> ChatTokenizer:
    return ChatTokenizer(student)


@pytest.fixture
def folder(student: Path, tmp_path: Path) -> Path:
    """A copy of the student."""
    return Path(shutil.copytree(student, tmp_path / "model"))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()
