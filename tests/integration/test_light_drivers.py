"""A driver waits for workers: it must not pay for the engine that they run."""

import subprocess
import sys
from pathlib import Path

import pear_ray.stages

STAGES = sorted(
    f"pear_ray.stages.{file.stem}" for file in Path(pear_ray.stages.__path__[0]).glob("[a-z]*.py")
)
PROBE = "import sys, {}; print(*[m for m in ('vllm', 'deepspeed', 'torch') if m in sys.modules])"


def test_no_stage_loads_an_engine_into_its_driver() -> None:
    assert "pear_ray.stages.rl" in STAGES
    code = PROBE.format(", ".join(STAGES))
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["torch"]  # transformers brings it, with the tokenizers
