"""Norms and cosine of two updates, against numbers worked out by hand."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pear_ray.study.geometry import update_geometry


def folder(path: Path, **tensors: list[float]) -> Path:
    path.mkdir()
    save_file({name: torch.tensor(each) for name, each in tensors.items()}, path / "m.safetensors")
    return path


def test_norms_and_cosine(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", a=[3.0, 4.0], b=[0.0])
    sft = folder(tmp_path / "sft", a=[3.0, 7.0], b=[0.0])  # moved by (0, 3, 0)
    rl = folder(tmp_path / "rl", a=[3.0, 8.0], b=[1.0])  # then by (0, 1, 1)
    found = update_geometry(base, sft, rl)
    assert found["update/sft_norm"] == 3.0
    assert found["update/rl_norm"] == pytest.approx(math.sqrt(2))
    assert found["update/relative_sft_norm"] == pytest.approx(0.6)
    assert found["update/cosine"] == pytest.approx(1 / math.sqrt(2))


def test_no_update_has_no_direction(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", a=[1.0])
    assert "update/cosine" not in update_geometry(base, base, folder(tmp_path / "rl", a=[2.0]))


def test_a_head_that_is_tied_in_one_folder_is_left_out(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", a=[1.0], head=[9.0])
    sft = folder(tmp_path / "sft", a=[2.0])
    rl = folder(tmp_path / "rl", a=[2.0], head=[1.0])
    assert update_geometry(base, sft, rl)["update/sft_norm"] == 1.0
