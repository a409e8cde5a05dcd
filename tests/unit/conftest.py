"""The embedded student as it ships, for every test that needs a tokenizer."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pear_ray.engines.chat import ChatTokenizer


@pytest.fixture(scope="session")
def chat(student: Path) -> "ChatTokenizer":
    from pear_ray.engines.chat import ChatTokenizer  # seconds, which light tests need not wait

    return ChatTokenizer(student)


@pytest.fixture
def folder(student: Path, tmp_path: Path) -> Path:
    """A copy of the student."""
    return Path(shutil.copytree(student, tmp_path / "model"))
