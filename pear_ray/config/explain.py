"""What is wrong with a config, in words: where, what was found, and the key that was meant."""

import difflib
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, root: type[BaseModel]) -> Iterator[str]:
    """A line per problem of a config whose outermost section is `root`."""
    for problem in error.errors(include_url=False):
        # A problem set's tag is no key of the file.
        loc = tuple(part for part in problem["loc"] if not str(part).startswith("kind="))
        where = ".".join(str(part) for part in loc) or "the run"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"unknown key{_did_you_mean(problem['loc'], root)}"
        found = (
            "" if problem["type"] in {"value_error", "missing"} else f" (got {problem['input']!r})"
        )
        yield f"  {where}: {message}{found}"


def _did_you_mean(loc: tuple[Any, ...], root: type[BaseModel]) -> str:
    known, kinds = _keys_beside(loc[:-1], root)
    siblings, word = sorted(known), str(loc[-1])
    if word in kinds:
        return f"; it belongs to kind {' and '.join(sorted(kinds[word]))}"
    close = difflib.get_close_matches(word, siblings, n=1, cutoff=0.6)
    if not close and len(loc) > 1:  # one level too high: a value that has become a section's
        close = _inside(root.model_fields[str(loc[0])].annotation, word, path=str(loc[0]))
    if not close:  # a key put in the wrong section is as common as a misspelt one
        close = difflib.get_close_matches(word, sorted(_all_keys(root)), n=1, cutoff=0.8)
    return f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(siblings)}"


def _inside(annotation: Any, word: str, *, path: str) -> list[str]:
    """The dotted keys named `word` in the sections that `annotation` can hold, `path` in front."""
    if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        parts = (_inside(part, word, path=path) for part in get_args(annotation))
        return [key for keys in parts for key in keys]
    fields = annotation.model_fields
    here = [f"{path}.{word}"] if word in fields else []
    parts = (_inside(each.annotation, word, path=f"{path}.{name}") for name, each in fields.items())
    return here + [key for keys in parts for key in keys]


def _keys_beside(
    loc: tuple[Any, ...], root: type[BaseModel]
) -> tuple[set[str], dict[str, set[str]]]:
    """The keys that the section at `loc` knows, and the kinds that have a key where it has not.

    The latter where a section is one of several kinds.
    """
    section = root
    others: dict[str, set[str]] = {}
    parts = iter(loc)
    for part in parts:
        field = section.model_fields.get(str(part))
        members = {_kind(member): member for member in _sections_in(field and field.annotation)}
        others = {}
        if len(members) == 1:
            (section,) = members.values()
            if _holds_several(field and field.annotation):
                next(parts, None)  # the key or index of one of them
            continue
        chosen = members.pop(str(next(parts, "")), None)
        if chosen is None:
            return _all_keys(root), {}
        for kind, member in members.items():
            for key in member.model_fields.keys() - chosen.model_fields.keys():
                others.setdefault(key, set()).add(kind)
        section = chosen
    return set(section.model_fields), others


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that an annotation allows, unions and `Annotated` looked into."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections_in(inner)


def _holds_several(annotation: Any) -> bool:
    """Whether it is a mapping or list of sections, or that or nothing."""
    parts = [annotation, *get_args(annotation)]
    return any(get_origin(part) in {dict, list} for part in parts) and not any(
        isinstance(part, type) and issubclass(part, BaseModel) for part in parts
    )


def _kind(section: type[BaseModel]) -> str:
    field = section.model_fields.get("kind")
    return str(get_args(field.annotation)[0]) if field else section.__name__


def _all_keys(root: type[BaseModel]) -> set[str]:
    schema = root.model_json_schema()
    nested = (part.get("properties", {}) for part in schema.get("$defs", {}).values())
    return set(schema["properties"]).union(*nested)
