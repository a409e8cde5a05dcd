"""What every test needs: quiet, offline libraries, set before any of them is imported."""

import os
from pathlib import Path

import hypothesis  # before its plugin, whose import in the summary fails on Python 3.11
import pytest

from pear_ray.embedded.paths import embedded_path  # light: it imports none of them

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # the first ray.init would write a token file
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A busy machine makes any example slow: the limit of a whole test is enough.
hypothesis.settings.register_profile("pear", deadline=None)
hypothesis.settings.load_profile("pear")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compiling processes

TESTS = Path(__file__).parent


@pytest.fixture(scope="session")
def student() -> Path:
    """Folder of the embedded student, 0.3M parameters."""
    return embedded_path("student")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the folder they are in."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in {"integration", "e2e"}:
            item.add_marker(folder)
