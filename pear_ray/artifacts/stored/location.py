"""Where a run on an object store is, and where this machine keeps its copies."""

import hashlib
import os
from pathlib import Path

from pear_ray.errors import ConfigError
from pear_ray.stores import GCS, S3, refuse_secrets

CACHE_VARIABLE = "PEAR_RAY_CACHE"
KEY = "output_dir"
SCHEMES = (S3, *GCS)


def is_uri(location: str) -> bool:
    """Whether it is a URI, and not a path."""
    return "://" in location


def check_location(output_dir: str) -> None:
    """See that runs can be kept at the URI `output_dir`.

    Raises:
        ConfigError: Its scheme is none of an object store, or it names no bucket.
        InputError: It carries credentials.
    """
    scheme, _, rest = output_dir.partition("://")
    if scheme not in SCHEMES:
        raise ConfigError(
            f"output_dir={scheme}://...: runs are kept in a folder or on an object store "
            f"({', '.join(f'{each}://' for each in SCHEMES)}); a disk is given as a path"
        )
    refuse_secrets(output_dir, key=KEY)
    if not rest.partition("?")[0].strip("/"):
        raise ConfigError(
            f"output_dir={output_dir}: names no bucket; write {scheme}://BUCKET/FOLDER"
        )


def inside(uri: str, name: str) -> str:
    """The URI of `name` in the folder `uri`, whose query stays."""
    base, mark, query = uri.partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def parent(uri: str) -> tuple[str, str]:
    """The URI of the folder that `uri` is in, and the name of `uri` there."""
    base, mark, query = uri.partition("?")
    folder, _, name = base.rstrip("/").rpartition("/")
    return f"{folder}{mark}{query}", name


def without_query(uri: str) -> str:
    """The URI as people read it."""
    return uri.partition("?")[0]


def cache_folder() -> Path:
    """Where copies of runs are kept: $PEAR_RAY_CACHE, or the user's cache folder."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser().absolute()
    users = os.environ.get("XDG_CACHE_HOME")
    return (Path(users) if users else Path.home() / ".cache") / "pear_ray"


def copy_path(run_uri: str, *, kind: str) -> Path:
    """The folder of this machine's copy of a run; its last part is the run's name.

    Args:
        run_uri: The run's folder on the store.
        kind: `runs`, what a driver works in, or `read`, what others look at.
    """
    digest = hashlib.sha256(run_uri.encode()).hexdigest()[:12]
    return cache_folder() / kind / digest / parent(run_uri)[1]
