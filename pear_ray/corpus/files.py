"""Which files a corpus is: here, on an object store, or a dataset of the `datasets` library."""

import hashlib
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import quote

import pyarrow.fs as pafs

from pear_ray.config.corpus import DatasetCorpus
from pear_ray.errors import InputError
from pear_ray.shipped import local_path
from pear_ray.stores import because, content_mark, open_filesystem, refuse_secrets

KEY = "corpus.path"
COMPRESSED = (".gz", ".zst", ".bz2")
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow"} | {
    plain + packed: "jsonl" for plain in (".jsonl", ".ndjson") for packed in COMPRESSED
}
HUB = "hub:"
SAVED_MARKS = ("dataset_info.json", "dataset_dict.json")
HASHED_BYTES = 4 * 2**30  # of content that a fingerprint reads; more is known by size and time


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusFile:
    """One file of a corpus, or a whole dataset of the `datasets` library.

    Attributes:
        path: Path or URI of the file, or the name of the dataset; good in any process.
        name: What example ids call it: the same wherever the corpus lies.
        format: `jsonl`, `parquet`, `arrow`, `saved` or `hub`.
    """

    path: str
    name: str
    format: str


def list_files(corpus: DatasetCorpus) -> list[CorpusFile]:
    """Every file of the corpus, sorted by name; those whose name begins with a dot are no corpus.

    Raises:
        InputError: There is nothing there, or no file of a known kind; its store cannot be reached;
            the path carries credentials; or no such file is shipped.
    """
    path, wanted = local_path(corpus.path), corpus.format
    refuse_secrets(path, key=KEY)
    if wanted == "hub" or path.startswith(HUB):
        name = _hub_name(path)
        return [CorpusFile(path=name, name=name, format="hub")]
    base, query = _without_query(path)
    folder, pattern = _folder_and_pattern(base)
    if folder.endswith("://"):  # all that the account owns would be listed
        raise InputError(f"corpus.path={path}: a pattern cannot stand for a bucket; name one")
    system, inside = open_filesystem(folder + query, key=KEY)
    kind = _listed(path, system, inside)
    if kind is pafs.FileType.File and not pattern:
        name = inside.rpartition("/")[2]
        return [CorpusFile(path=base + query, name=name, format=_format_of(path, name, wanted))]
    names = _names_below(path, system, inside, pattern)
    if not pattern and (wanted == "saved" or any(mark in names for mark in SAVED_MARKS)):
        if not isinstance(system, pafs.LocalFileSystem):
            raise InputError(
                f"corpus.path={path}: a saved dataset on an object store; give its files as "
                f"{base.rstrip('/')}/*.arrow, with the split's folder where there is one"
            )
        return [CorpusFile(path=base, name=corpus.split, format="saved")]
    files = [
        CorpusFile(path=_joined(folder, name, query), name=name, format=known)
        for name in names
        if (known := _known_format(name) if wanted == "auto" else wanted)
    ]
    if not files:
        raise InputError(
            f"corpus.path={path}: holds no corpus file ({', '.join(SUFFIXES)}); "
            "check the path, or name the files' corpus.format"
        )
    return files


def corpus_fingerprint(corpus: DatasetCorpus) -> str:
    """Identity of the corpus's content: of its bytes, or beyond 4 GiB of names, sizes and times.

    On an object store it is of names, sizes and the hashes that the store keeps.

    Raises:
        InputError: There is nothing at `corpus.path`, or its store cannot be reached.
    """
    digest = hashlib.sha256()
    for file in list_files(corpus):
        if file.format in ("saved", "hub"):
            from pear_ray.corpus.saved import open_dataset  # noqa: PLC0415 - seconds, and seldom

            dataset = open_dataset(file.path, file.format, corpus.split)
            digest.update(dataset._fingerprint.encode())  # noqa: SLF001
            continue
        try:
            digest.update(_identity(file))
        except OSError as error:
            raise InputError(
                f"corpus.path={file.path}: cannot be looked at{because(file.path, error)}"
            ) from error
    return digest.hexdigest()[:20]


def _identity(file: CorpusFile) -> bytes:
    system, inside = open_filesystem(file.path, key=KEY)
    if not isinstance(system, pafs.LocalFileSystem):
        return f"{file.name} {content_mark(system, inside)} ".encode()
    info = system.get_file_info(inside)
    if info.size <= HASHED_BYTES:
        return f"{info.size} ".encode() + _content_hash(Path(inside))
    return f"{info.size} {file.name} {info.mtime_ns} ".encode()


def _content_hash(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:  # preparing names it; once it can be read the corpus is another
        return f"unreadable: {error.errno}".encode()


def _hub_name(path: str) -> str:
    name = path.removeprefix(HUB)
    if not re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+", name, flags=re.ASCII):
        raise InputError(
            f"corpus.path={path}: {name!r} names no dataset of the hub; give {HUB}USER/NAME"
        )
    if Path(name).exists():  # `datasets` would read it, and not what the hub has
        raise InputError(
            f"corpus.path={path}: {name} is here as well ({Path(name).absolute()}); give it "
            f"without {HUB}, or start from another folder"
        )
    from pear_ray.corpus.saved import reach_hub  # noqa: PLC0415 - seconds, and seldom wanted

    reach_hub(name)
    return name


def _without_query(path: str) -> tuple[str, str]:
    """A URI and its query, which says how to reach the store; a path here has none."""
    if "://" not in path:
        return str(Path(path).expanduser().absolute()), ""
    base, mark, query = path.partition("?")
    return base, mark + query


def _folder_and_pattern(base: str) -> tuple[str, str]:
    """The folder in front of the first wildcard, and the rest; all of it where there is none."""
    plain = re.split(r"[*?\[]", base, maxsplit=1)[0]
    if plain == base or ("://" not in base and Path(base).exists()):
        return base, ""
    folder = plain[: plain.rfind("/") + 1]
    return folder, base[len(folder) :]


def _listed(path: str, system: pafs.FileSystem, inside: str) -> pafs.FileType:
    try:
        kind = system.get_file_info(inside).type
    except OSError as error:
        raise InputError(
            f"corpus.path={path}: cannot be looked at{because(path, error)}"
        ) from error
    if kind is pafs.FileType.NotFound:
        if not isinstance(system, pafs.LocalFileSystem):
            raise InputError(
                f"corpus.path={path}: no such bucket, file or folder; check the names and, where "
                "the store is not the provider's own, endpoint_override= in the URI"
            )
        raise InputError(
            f"corpus.path={path}: no such file or folder; give a file, a folder, a pattern, an "
            f"s3:// or gs:// URI, or {HUB}NAME"
        )
    return kind


def _names_below(path: str, system: pafs.FileSystem, inside: str, pattern: str) -> list[str]:
    """Sorted names, from the folder `inside` on, of the files in it that match."""
    deep = not pattern or "/" in pattern or "**" in pattern
    try:
        found = system.get_file_info(pafs.FileSelector(inside, recursive=deep))
    except OSError as error:
        raise InputError(f"corpus.path={path}: cannot be listed{because(path, error)}") from error
    names = (each.path[len(inside) :].lstrip("/") for each in found if each.is_file)
    wanted = pattern.split("/") if pattern else ["**"]
    return sorted(
        name
        for name in names
        if not any(step.startswith(".") for step in name.split("/"))
        and _matches(name.split("/"), wanted)
    )


def _matches(steps: list[str], wanted: list[str]) -> bool:
    """Whether a name matches a pattern step by step; `**` is any number of steps."""
    if not wanted:
        return not steps
    if wanted[0] == "**":
        return _matches(steps, wanted[1:]) or (bool(steps) and _matches(steps[1:], wanted))
    return bool(steps) and fnmatchcase(steps[0], wanted[0]) and _matches(steps[1:], wanted[1:])


def _joined(folder: str, name: str, query: str) -> str:
    """A listed file as a path or URI of its own."""
    escaped = quote(name) if "://" in folder else name
    return f"{folder.rstrip('/')}/{escaped}{query}"


def _known_format(name: str) -> str | None:
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)


def _format_of(path: str, name: str, wanted: str) -> str:
    kind = _known_format(name) if wanted == "auto" else wanted
    if kind is None:
        raise InputError(
            f"corpus.path={path}: its ending is none of {', '.join(SUFFIXES)}; "
            "set corpus.format to what it is"
        )
    return kind
