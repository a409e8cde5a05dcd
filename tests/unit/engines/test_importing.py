"""The collector rests during an import, and is as it was afterwards."""

import gc
import importlib

import pytest

from pear_ray.engines.importing import collector_paused


@pytest.mark.parametrize("running", [True, False])
def test_the_collector_is_left_as_it_was(*, running: bool) -> None:
    try:
        (gc.enable if running else gc.disable)()
        with pytest.raises(ModuleNotFoundError), collector_paused():
            importlib.import_module("no_such_library")
        assert gc.isenabled() is running
        with collector_paused():
            assert not gc.isenabled()
    finally:
        gc.enable()
