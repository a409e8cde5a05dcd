"""Manifests: an artifact is complete when, and only when, its manifest is there and current."""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pear_ray.artifacts.run_dir import versions, write_json
from pear_ray.errors import ArtifactError

MANIFEST_FILE = "manifest.json"
UNFINISHED_FILE = "unfinished.json"
HASHED_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a complete artifact says of itself.

    Attributes:
        stage: Which stage made it.
        fingerprint: Hash of the stage's config and of all its inputs: the artifact's identity.
        started: Unix seconds.
        finished: Unix seconds.
        counts: What is in it (rows, tokens, steps, ...).
        versions: Packages that made it.
        details: Anything else worth recording, such as an audit's result.
    """

    stage: str
    fingerprint: str
    started: float
    finished: float
    counts: dict[str, float]
    versions: dict[str, str]
    details: dict[str, Any]


def fingerprint(*, stage: str, config: object, inputs: Mapping[str, str]) -> str:
    """Identity of what `stage` makes of `config` (JSON-able) and `inputs` (name to fingerprint)."""
    text = json.dumps([stage, config, dict(inputs)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def folder_fingerprint(folder: Path) -> str:
    """Hash over the contents of a model folder: weights, config, tokenizer, template."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in HASHED_SUFFIXES:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:20]


def file_fingerprint(path: Path) -> str:
    """Hash of one file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:20]


def read_manifest(stage_dir: Path) -> Manifest | None:
    """The manifest of a complete artifact, or None."""
    path = stage_dir / MANIFEST_FILE
    return Manifest(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def require_manifest(stage_dir: Path) -> Manifest:
    """The manifest of an artifact that another stage needs.

    Raises:
        ArtifactError: The artifact is missing or incomplete.
    """
    manifest = read_manifest(stage_dir)
    if manifest is None:
        raise ArtifactError(
            f"{stage_dir}: no complete artifact of stage {stage_dir.name!r}; run `pear "
            f"{stage_dir.name} RUN.yaml` first, or `pear run` for all stages"
        )
    return manifest


def is_current(stage_dir: Path, expected: str) -> bool:
    """Whether the artifact is complete and was made from exactly this config and these inputs."""
    manifest = read_manifest(stage_dir)
    return manifest is not None and manifest.fingerprint == expected


def begin(stage_dir: Path, expected: str) -> bool:
    """Prepare `stage_dir` for making artifact `expected`; True when an earlier attempt goes on.

    Work that another config or other inputs left there is removed: nothing half-done of one
    identity can end up in an artifact of another.
    """
    if is_begun(stage_dir, expected):
        return True
    remove(stage_dir)
    stage_dir.mkdir(parents=True)
    write_json(stage_dir / UNFINISHED_FILE, {"fingerprint": expected, "started": time.time()})
    return False


def is_begun(stage_dir: Path, expected: str) -> bool:
    """Whether work on artifact `expected` is there, unfinished."""
    unfinished = stage_dir / UNFINISHED_FILE
    return (
        unfinished.exists()
        and not (stage_dir / MANIFEST_FILE).exists()
        and json.loads(unfinished.read_text(encoding="utf-8"))["fingerprint"] == expected
    )


def remove(stage_dir: Path) -> None:
    """Remove `stage_dir` and all that is in it, if it is there."""
    doomed = stage_dir.with_name(f".{stage_dir.name}.removing")
    shutil.rmtree(doomed, ignore_errors=True)  # of a removal that was killed
    if stage_dir.exists():
        # Renamed first: a kill during the removal must not leave a folder that looks begun.
        stage_dir.rename(doomed)
        shutil.rmtree(doomed)


def complete(
    stage_dir: Path,
    *,
    counts: Mapping[str, float],
    details: Mapping[str, Any] | None = None,
) -> Manifest:
    """Declare the artifact begun in `stage_dir` complete. Written last, atomically."""
    unfinished = stage_dir / UNFINISHED_FILE
    begun = json.loads(unfinished.read_text(encoding="utf-8"))
    manifest = Manifest(
        stage=stage_dir.name,
        fingerprint=begun["fingerprint"],
        started=begun["started"],
        finished=time.time(),
        counts=dict(counts),
        versions=versions(),
        details=dict(details or {}),
    )
    write_json(stage_dir / MANIFEST_FILE, asdict(manifest))
    unfinished.unlink()
    return manifest
