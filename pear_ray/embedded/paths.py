"""Where the shipped models lie: a run file spells them `embedded:student`, `embedded:teacher`."""

from pathlib import Path

from pear_ray.errors import ConfigError

EMBEDDED_NAMES = ("student", "teacher")


def embedded_path(name: str) -> Path:
    """The Hugging Face folder of a shipped model, named with or without the `embedded:` prefix.

    Raises:
        ConfigError: On any other name.
    """
    bare = name.removeprefix("embedded:")
    if bare not in EMBEDDED_NAMES:
        known = " or ".join(f"embedded:{known}" for known in EMBEDDED_NAMES)
        raise ConfigError(f"no embedded model is called `{name}`; use {known}")
    return Path(__file__).parent / bare
