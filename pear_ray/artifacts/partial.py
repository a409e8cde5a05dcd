"""The name of a file while it is being written."""

import os
import platform
from pathlib import Path


def partial_of(path: Path) -> Path:
    """Where `path` is written before it is whole, apart from any other writer's.

    By host as well as by process: a host that was cut off writes on, and whoever does its work
    again may have the same process id there; in containers they are all small.
    """
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
