"""Where the shipped models lie: a run file spells them `embedded:student`, and so on."""

from pathlib import Path

from pear_ray.errors import ConfigError

EMBEDDED_NAMES = ("student", "teacher")
"""The two of the demonstration."""
AUTOMATON_STUDENT = "automaton/student"
"""The student of the suffix game."""


def embedded_path(name: str) -> Path:
    """The Hugging Face folder of a shipped model, named with or without the `embedded:` prefix.

    Raises:
        ConfigError: On any other name.
    """
    bare = name.removeprefix("embedded:")
    names = (*EMBEDDED_NAMES, AUTOMATON_STUDENT)
    if bare not in names:
        known = " or ".join(f"embedded:{known}" for known in names)
        raise ConfigError(f"no embedded model is called `{name}`; use {known}")
    return Path(__file__).parent / bare
