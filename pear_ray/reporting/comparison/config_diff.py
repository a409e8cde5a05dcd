"""The settings in which resolved configs differ, as few columns of words as tell them apart."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# They name a run and where its numbers go, and change none of them.
IGNORED_SETTINGS = frozenset({"name", "output_dir", "telemetry"})
SHOWN_CHARS = 44  # of one value: more makes a table that nobody reads
_ABSENT = object()  # a run's config has no such setting


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting that is not the same in all runs.

    Attributes:
        key: Its dotted key, as an override would name it.
        values: What each run has, JSON-able; None as well where a run does not have the setting.
        words: The same to read, a choice with only those of its settings that tell runs apart.
    """

    key: str
    values: list[Any]
    words: list[str]


def differing_settings(trees: Sequence[Mapping[str, Any]]) -> list[Setting]:
    """The settings in which `trees` (resolved configs, JSON-able) differ, in the configs' order.

    A section is looked into, setting by setting, unless it is a choice (it has a `kind`) that runs
    made differently, or only some runs have it: that is one setting, in which `kind` stands for
    all that goes with it. Lists count as one value.
    """
    return [
        setting
        for name in _names(trees)
        if name not in IGNORED_SETTINGS
        for setting in _differences(name, [tree.get(name, _ABSENT) for tree in trees])
    ]


def shortened(text: str) -> str:
    """`text`, without its middle where it is long: ends tell paths and lists apart."""
    if len(text) <= SHOWN_CHARS:
        return text
    half = (SHOWN_CHARS - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def _differences(key: str, values: Sequence[Any]) -> Iterator[Setting]:
    if all(value == values[0] for value in values):
        return
    sections = [value for value in values if isinstance(value, Mapping)]
    if len(sections) == len(values) and len({section.get("kind") for section in sections}) == 1:
        for name in _names(sections):
            yield from _differences(
                f"{key}.{name}", [section.get(name, _ABSENT) for section in sections]
            )
        return
    known = [None if value is _ABSENT else value for value in values]
    yield Setting(key, known, [_choice_words(value, sections) for value in values])


def _choice_words(value: Any, sections: Sequence[Mapping[str, Any]]) -> str:
    """A value among `sections`, of which those of the same kind are told apart."""
    if not isinstance(value, Mapping):
        return _value_words(value)
    if "kind" not in value:
        return shortened(", ".join(f"{name} {_value_words(each)}" for name, each in value.items()))
    alike = [section for section in sections if section.get("kind") == value["kind"]]
    place = next(index for index, section in enumerate(alike) if section is value)
    parts = [
        f"{setting.key} {setting.words[place]}"
        for name in _names(alike)
        for setting in _differences(name, [section.get(name, _ABSENT) for section in alike])
    ]
    return f"{value['kind']} ({', '.join(parts)})" if parts else str(value["kind"])


def _value_words(value: Any) -> str:
    if value is None or value is _ABSENT:
        return "none" if value is None else "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    return shortened(value if isinstance(value, str) else json.dumps(value))


def _names(sections: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every name in any of `sections`, in the order met."""
    return list(dict.fromkeys(name for section in sections for name in section))
