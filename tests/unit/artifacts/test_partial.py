"""Two hosts that write the same file at once do not write into each other's."""

import os
import platform
from pathlib import Path

import pytest

from pear_ray.artifacts.partial import partial_of


def test_hosts_with_the_same_process_id_write_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("/run/score/blocks/part/one.parquet")
    monkeypatch.setattr(os, "getpid", lambda: 17)
    names = set()
    for host in ("pod-a", "pod-b"):
        monkeypatch.setattr(platform, "node", lambda host=host: host)
        partial = partial_of(path)
        assert partial.parent == path.parent
        assert partial.name.startswith(".one.parquet.")
        names.add(partial)
    assert len(names) == 2
