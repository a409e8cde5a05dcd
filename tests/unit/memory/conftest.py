"""The toy model, read from its config."""

import json
from pathlib import Path

import pytest
from toy_model import TOY

from pear_ray.memory.model_shape import ModelShape, read_shape


@pytest.fixture
def toy(tmp_path: Path) -> ModelShape:
    (tmp_path / "config.json").write_text(json.dumps(TOY), encoding="utf-8")
    return read_shape(tmp_path)
