"""Every stage has its entry script for `ray job submit`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pear_ray.records import ON_DEMAND_STAGES, STAGES

ROOT = Path(__file__).parents[3]
COMMANDS = ["run", "study", *STAGES, *ON_DEMAND_STAGES]


def test_there_is_one_for_each_command() -> None:
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == {*COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_it_is_that_command(name: str) -> None:
    done = subprocess.run(
        [sys.executable, f"jobs/{name}.py", "missing.yaml"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    noun = "study" if name == "study" else "run"
    assert f"missing.yaml: cannot read the {noun} file" in done.stderr
    shown = subprocess.run(
        [sys.executable, f"jobs/{name}.py", "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"pear {name} " in shown.stdout
