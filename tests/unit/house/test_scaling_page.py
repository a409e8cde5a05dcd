"""docs/scaling.md holds what benchmarks/scaling.py prints, and the script adds up."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scaling"]


def test_the_page_is_what_the_script_prints(
    scaling: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scaling.main() == 0
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    shown = page.split("<!-- python benchmarks/scaling.py -->\n")[1].split("<!-- end -->")[0]
    assert shown == capsys.readouterr().out


def test_computing_is_halved_by_twice_the_gpus_and_the_rest_is_not(scaling: ModuleType) -> None:
    shape = scaling.read_shape(scaling.SHAPES / "Qwen3-32B")
    few, many = scaling.scoring(shape, 64), scaling.scoring(shape, 128)
    assert few.parts["computing"] == pytest.approx(2 * many.parts["computing"])
    assert many.parts["engines start"] > few.parts["engines start"]
    rl = {num: scaling.rl_step(shape, num) for num in (64, 128)}
    assert rl[64].parts["training"] == pytest.approx(2 * rl[128].parts["training"])
    assert rl[128].parts["sampling"] > rl[64].parts["sampling"] / 2
    assert rl[128].parts["checkpoints"] == rl[64].parts["checkpoints"]


def test_the_last_sequences_read_all_weights_for_one_token(scaling: ModuleType) -> None:
    shape = scaling.read_shape(scaling.SHAPES / "Qwen3-32B")
    alone = scaling.decode_step_seconds(shape, batch=0, length=0, span=4)
    assert alone == pytest.approx(2 * 32_762_123_264 / (4 * 3.35e12 * 0.6), rel=1e-3)
