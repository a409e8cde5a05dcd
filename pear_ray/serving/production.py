"""`serve.yaml`: the same deployment for `serve deploy`, or in a KubeRay RayService."""

from pathlib import Path

import yaml

from pear_ray.errors import InputError
from pear_ray.serving.settings import APP_NAME, BUILDER, KEY_VARIABLE, ServeSettings

FILE = Path("serve.yaml")
FIRST_LINE = "# Written by `pear serve --dry-run`."
HEAD = f"""{FIRST_LINE}
# `serve deploy serve.yaml` on a node of the cluster, or as serveConfigV2 of a RayService.
# {KEY_VARIABLE} must be in the environment of the cluster's nodes (Kubernetes: env from a secret of
# head and workers); it does not belong in here. Every node must see the models' folders.
"""


def serve_yaml(settings: ServeSettings, *, host: str, port: int) -> str:
    """The file's text; ends with a newline."""
    tree = {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        "logging_config": {"enable_access_log": False},
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": BUILDER,
                "args": settings.model_dump(mode="json"),
            }
        ],
    }
    return HEAD + yaml.safe_dump(tree, sort_keys=False)


def write_serve_yaml(settings: ServeSettings, *, host: str, port: int, file: Path = FILE) -> Path:
    """Write `file`, unless something else than an earlier one of ours is there.

    Raises:
        InputError: It is somebody else's.
    """
    if file.exists() and not file.read_text(encoding="utf-8").startswith(FIRST_LINE):
        raise InputError(f"{file} is there and was not written by `pear serve`; move it away")
    file.write_text(serve_yaml(settings, host=host, port=port), encoding="utf-8")
    return file
