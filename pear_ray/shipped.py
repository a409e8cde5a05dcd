"""Data files that come with the package: `embedded:automaton/corpus.parquet` in a run file."""

from pathlib import Path

from pear_ray.errors import InputError

EMBEDDED = "embedded:"
_FOLDER = Path(__file__).parent / "embedded"
_ENDINGS = (".jsonl", ".parquet")


def local_path(location: str) -> str:
    """`location`, or where the file lies that it names with `embedded:`.

    Raises:
        InputError: No such file is shipped; the message lists those that are.
    """
    if not location.startswith(EMBEDDED):
        return location
    files = {
        file.relative_to(_FOLDER).as_posix(): file
        for file in sorted(_FOLDER.rglob("*"))
        if file.suffix in _ENDINGS
    }
    name = location.removeprefix(EMBEDDED)
    if name not in files:
        known = ", ".join(EMBEDDED + each for each in files)
        raise InputError(f"no file {name!r} comes with the package; there are {known}")
    return str(files[name])
