"""Read a cluster file: every problem in it at once, by field, or what it says."""

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pear_ray.clusters.kuberay import KINDS, Resource
from pear_ray.clusters.kuberay_checks import resource_problems
from pear_ray.clusters.launcher import LAUNCHERS, AnyLauncher
from pear_ray.clusters.launcher_checks import Problem, launcher_problems
from pear_ray.clusters.shape import ClusterShape, launcher_shape, resources_shape
from pear_ray.config.explain import explain
from pear_ray.config.yaml12 import YamlError, parse_all
from pear_ray.errors import ConfigError

SHIPPED = "cluster/ and cluster/kuberay/"


def load_shape(path: Path) -> ClusterShape:
    """What the cluster file at `path` offers.

    Raises:
        ConfigError: As `load_launcher` and `load_resources`; or no Ray cluster is in it.
    """
    documents = _documents(path)
    if _is_kubernetes(documents):
        shape = resources_shape(_resources(path, documents))
        if shape is None:
            kinds = ", ".join(str(each.get("kind")) for each in documents)
            raise ConfigError(
                f"{path}: holds {kinds}, and no RayCluster, RayJob or RayService; name the file "
                "that has the Ray cluster"
            )
        return shape
    return launcher_shape(_launcher(path, documents))


def load_launcher(path: Path) -> AnyLauncher:
    """The launcher file at `path`.

    Raises:
        ConfigError: It cannot be read, or a field of it is wrong; all problems are listed.
    """
    return _launcher(path, _documents(path))


def load_resources(path: Path) -> list[Resource]:
    """The Kubernetes resources in the file at `path`.

    Raises:
        ConfigError: It cannot be read, or a field of it is wrong; all problems are listed.
    """
    return _resources(path, _documents(path))


def _documents(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(
            f"{path}: cannot read the cluster file ({reason}); shipped ones are in {SHIPPED}"
        ) from error
    try:
        documents = parse_all(text)
    except YamlError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    for each in documents or [None]:
        if not isinstance(each, dict):
            found = type(each).__name__ if each is not None else "nothing"
            raise ConfigError(f"{path}: expected a mapping at the top, got {found}")
    return documents


def _is_kubernetes(documents: Sequence[dict[str, Any]]) -> bool:
    return "apiVersion" in documents[0] or "kind" in documents[0]


def _launcher(path: Path, documents: Sequence[dict[str, Any]]) -> AnyLauncher:
    if len(documents) > 1:
        raise ConfigError(f"{path}: {len(documents)} documents; a launcher file is one")
    provider = documents[0].get("provider")
    kind = provider.get("type") if isinstance(provider, dict) else None
    if kind not in LAUNCHERS:
        raise ConfigError(
            f"{path}: provider.type is {kind!r}{_meant(str(kind), LAUNCHERS)}; for Kubernetes name "
            "a file with apiVersion and kind"
        )
    launcher = _validated(path, documents[0], LAUNCHERS[kind])
    _refuse(path, launcher_problems(launcher))
    return launcher


def _resources(path: Path, documents: Sequence[dict[str, Any]]) -> list[Resource]:
    resources: list[Resource] = []
    for index, document in enumerate(documents):
        kind = document.get("kind")
        if kind not in KINDS:
            where = f"document {index + 1}: " if len(documents) > 1 else ""
            raise ConfigError(f"{path}: {where}kind is {kind!r}{_meant(str(kind), KINDS)}")
        resources.append(_validated(path, document, KINDS[kind]))
    _refuse(path, (problem for each in resources for problem in resource_problems(each)))
    return resources


def _meant(found: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(found, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def _validated(path: Path, document: dict[str, Any], model: type[BaseModel]) -> Any:
    try:
        return model.model_validate_json(json.dumps(document))
    except ValidationError as error:
        _refuse_lines(path, [*explain(error, model)])


def _refuse(path: Path, problems: Iterator[Problem]) -> None:
    lines = [f"  {field}: {problem}" for field, problem in problems]
    if lines:
        _refuse_lines(path, lines)


def _refuse_lines(path: Path, lines: Sequence[str]) -> None:
    noun = "problem" if len(lines) == 1 else "problems"
    raise ConfigError(f"{path}: {len(lines)} {noun}\n" + "\n".join(lines))
