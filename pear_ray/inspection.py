"""`pear inspect`: what an artifact holds, and its first rows token by token."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console, RenderableType
from rich.text import Text

from pear_ray.artifacts.manifest import MANIFEST_FILE, UNFINISHED_FILE, Manifest, read_manifest
from pear_ray.artifacts.rollouts import FOLDER as ROLLOUTS
from pear_ray.artifacts.run_dir import IDENTITY_FILE
from pear_ray.config.run import RunConfig, load_run
from pear_ray.config.sft import PearWeights
from pear_ray.errors import ArtifactError, ConfigError, InputError
from pear_ray.reporting.artifact_view import (
    TableFacts,
    render_fields,
    render_manifest,
    render_table,
    write_view,
)
from pear_ray.reporting.rollouts.view import render_rollouts
from pear_ray.reporting.token_rows import (
    TableRow,
    both_logprobs,
    first_rows,
    opened,
    own_logprobs,
    plain_row,
    ratio_row,
)
from pear_ray.reporting.token_view import (
    log_ratio_scale,
    logprob_scale,
    render_legend,
    render_tokens,
    token_texts,
)

COUNTED_COLUMNS = ("source", "is_negative", "checkpoint", "task", "reward_status")
_ROWS_PER_READ = 4096  # of the counted columns, which are narrow


@dataclass(frozen=True, slots=True)
class _Artifact:
    """What was found at the path that was given.

    Attributes:
        path: As given.
        run_dir: The run that it belongs to, if any.
        manifest: That of a stage's folder.
        tables: Parquet files by the table that they are of.
    """

    path: Path
    run_dir: Path | None
    manifest: Manifest | None
    tables: dict[str, list[Path]]


def run_inspect(
    artifact: Path, *, num_rows: int, step: int | None = None, html: Path | None = None
) -> int:
    """Print what `artifact` holds, and write the same to `html`; 0.

    `step` is that of the rollouts to show, where there are any; the last if None.

    Raises:
        InputError: There is no such file or folder, or it is a whole run.
        ArtifactError: It is unfinished, or holds no table that can be read.
    """
    parts = list(inspect_artifact(artifact, num_rows=num_rows, step=step))
    console = Console()
    for part in parts:
        console.print(part)
        console.print()
    if html is not None:
        write_view(parts, html)
        console.print(Text(f"written to {html}"))
    return 0


def inspect_artifact(
    artifact: Path, *, num_rows: int, step: int | None = None
) -> Iterator[RenderableType]:
    """Facts, then for each table its schema, counts and first rows; of rollouts, its first groups.

    Errors as in `run_inspect`.
    """
    found = _locate(artifact)
    if found.manifest:
        yield render_manifest(found.manifest)
    rollouts = {name: _rollouts(files) for name, files in found.tables.items()}
    if step is not None and not any(rollouts.values()):
        raise InputError(
            f"--step {step}: {artifact} holds no rollouts; give a run's folder rl, rl_rollouts or "
            "rl_train, or leave --step out"
        )
    for name, files in found.tables.items():
        yield render_table(_table_facts(name, files))
        if rollouts[name]:
            config, notes = _config(found.run_dir)
            decode = _decoder(config, notes) if num_rows else None
            yield from render_rollouts(
                rollouts[name],
                step=step,
                num_groups=num_rows,
                texts_of=lambda ids, decode=decode: _texts(ids, decode),
                notes=notes,
            )
            continue
        rows = first_rows(files, num_rows)
        if rows and {"token_ids", "loss_mask"} <= set(rows[0].values):
            yield from _token_parts(found, rows)
        else:
            yield from (render_fields(row.values) for row in rows)


def _locate(artifact: Path) -> _Artifact:
    if not artifact.exists():
        raise InputError(
            f"{artifact}: no such file or folder; give a stage's folder of a run, such as "
            "outputs/demo/score, or a Parquet file"
        )
    inside = [artifact, *artifact.resolve().parents]
    run_dir = next((folder for folder in inside if (folder / IDENTITY_FILE).exists()), None)
    if artifact.is_file():
        return _Artifact(artifact, run_dir, None, {artifact.name: [artifact]})
    if run_dir == artifact:
        stages = sorted(path.parent.name for path in artifact.glob(f"*/{MANIFEST_FILE}"))
        raise InputError(
            f"{artifact}: a whole run, not an artifact; give one of its stages' folders: "
            f"{', '.join(stages) or 'none is finished yet'}"
        )
    manifest = read_manifest(artifact)
    # A step's rollouts are whole whatever becomes of their stage: they can be read while it runs.
    rollouts = artifact / ROLLOUTS
    if manifest is None and (artifact / UNFINISHED_FILE).exists() and not rollouts.exists():
        raise ArtifactError(
            f"{artifact}: unfinished, so what it holds may be half written; run `pear "
            f"{artifact.name} RUN.yaml` to go on, or give one of its Parquet files"
        )
    tables: dict[str, list[Path]] = {}
    for file in sorted(artifact.rglob("*.parquet")):
        first = file.relative_to(artifact).parts[0]
        name = artifact.name if first == file.name and manifest is None else first
        tables.setdefault(name, []).append(file)
    if not tables:
        raise ArtifactError(
            f"{artifact}: holds no Parquet table; stages with tables are collect, score, diagnose, "
            "sft, rl and evaluate"
        )
    return _Artifact(artifact, run_dir, manifest, tables)


def _rollouts(files: Sequence[Path]) -> dict[int, Path]:
    """The files by step, where they are of rollouts; nothing else has a group and a policy."""
    with opened(files[0]) as parquet:
        names = set(parquet.schema_arrow.names)
    if not {"group", "policy_version", "behavior_logprobs"} <= names:
        return {}
    steps = {int(pq.read_table(file, columns=["step"])["step"][0].as_py()): file for file in files}
    return dict(sorted(steps.items()))


def _table_facts(name: str, files: Sequence[Path]) -> TableFacts:
    """From the files' metadata; only the counted columns are read."""
    schema, num_rows, counts = pa.schema([]), 0, {}
    for file in files:
        with opened(file) as parquet:
            schema = parquet.schema_arrow
            num_rows += parquet.metadata.num_rows
            for column in COUNTED_COLUMNS:
                if column not in schema.names:
                    continue
                counter = counts.setdefault(column, Counter())
                for batch in parquet.iter_batches(_ROWS_PER_READ, columns=[column]):
                    counter.update(map(str, batch.column(0).to_pylist()))
    num_bytes = sum(file.stat().st_size for file in files)
    return TableFacts(name, schema, num_rows, len(files), num_bytes, counts)


def _token_parts(found: _Artifact, rows: Sequence[TableRow]) -> Iterator[RenderableType]:
    """The legend and the rows, coloured by the most telling numbers that there are."""
    config, notes = _config(found.run_dir)
    decode = _decoder(config, notes)
    settings = config.sft.weights if config else PearWeights()
    if not isinstance(settings, PearWeights):
        notes.append(f"sft.weights is {settings.kind}: weights are what PEAR's defaults would give")
        settings = PearWeights()
    texts = [_texts(row.values["token_ids"], decode) for row in rows]
    scored = both_logprobs(found.run_dir, rows, notes)
    if scored:
        scale = log_ratio_scale(settings)
        shown = [ratio_row(*each, settings) for each in zip(scored, texts, strict=True)]
    else:
        column, name = own_logprobs(found.run_dir, rows[0])
        scale = logprob_scale(name) if column else None
        shown = [plain_row(row, each, column) for row, each in zip(rows, texts, strict=True)]
    weighted = any(row.weights is not None for row in shown)
    yield render_legend(scale, weighted=weighted, note="; ".join(notes))
    yield from (render_tokens(row, scale) for row in shown)


def _config(run_dir: Path | None) -> tuple[RunConfig | None, list[str]]:
    """The run's config, or None with the reason."""
    if run_dir is None:
        return None, ["in no run's folder, so no tokenizer is known: tokens are shown as ids"]
    try:
        return load_run(run_dir / "config.yaml"), []
    except ConfigError as error:
        return None, [f"tokens are shown as ids: {error}"]


def _decoder(config: RunConfig | None, notes: list[str]) -> Callable[[Sequence[int]], str] | None:
    """The policy tokenizer's decode, or None with the reason among `notes`."""
    if config is None:
        return None
    # Loading a tokenizer takes seconds: only rows that hold tokens pay for it.
    from pear_ray.engines.chat import ChatTokenizer  # noqa: PLC0415
    from pear_ray.engines.model_files import resolve_model  # noqa: PLC0415

    try:
        tokenizer = ChatTokenizer(resolve_model(config.models.policy)).tokenizer
    except (ConfigError, InputError) as error:
        notes.append(f"tokens are shown as ids: models.policy: {error}")
        return None
    return lambda ids: tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def _texts(
    token_ids: Sequence[int], decode: Callable[[Sequence[int]], str] | None
) -> Sequence[str]:
    return token_texts(token_ids, decode) if decode else [f"{one} " for one in token_ids]
