"""The collector rests during an import, and is as it was afterwards."""

import gc

import pytest

from pear_ray.engines.importing import collector_paused


@pytest.mark.parametrize("running", [True, False])
def test_the_collector_is_left_as_it_was(*, running: bool) -> None:
    try:
        (gc.enable if running else gc.disable)()
        with pytest.raises(ImportError, match="no such"), collector_paused():
            assert not gc.isenabled()
            raise ImportError("no such library")
        assert gc.isenabled() is running
    finally:
        gc.enable()
