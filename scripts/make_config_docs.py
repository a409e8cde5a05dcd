"""Write docs/configuration.md from the schema; `--check` only says whether it is current."""

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pear_ray.config.run import RunConfig

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
INTRO = """# Configuration

<!-- Written by `make docs` from the sections in pear_ray/config; do not edit. -->

A run is one YAML file. It holds what differs from the defaults below; `key=value` arguments after
it reach every field and are read as YAML:

    pear run jobs/runs/demo.yaml sft.num_epochs=2 corpus.problems.games.0.name=countdown

Unknown keys and wrong types are refused, all of them at once. The resolved config is written into
the run's folder. YAML is read by its 1.2 rules: `on` and `yes` are strings, `1e-5` is a number, and
a key written twice is an error.
"""
PLAIN = {str: "str", int: "int", float: "float", bool: "bool", types.NoneType: "null"}
BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


def main(arguments: list[str]) -> int:
    """Write or check the page; the exit code."""
    text = page()
    if arguments == ["--check"]:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
            return 0
        print("docs/configuration.md is not what the schema says; mend: make docs", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


def page() -> str:
    """The whole page."""
    prefixes: dict[type[BaseModel], list[str]] = {}
    for prefix, section in sections(RunConfig, prefix=""):
        prefixes.setdefault(section, []).append(prefix)
    parts = ["\n".join(section_lines(where, section)) for section, where in prefixes.items()]
    return "\n\n".join([INTRO.rstrip(), *parts]) + "\n"


def sections(section: type[BaseModel], *, prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Each section with the dotted key that leads to it, parents first; each choice of a union."""
    yield prefix, section
    for name, field in section.model_fields.items():
        for inner, in_list in models_in(field.annotation):
            step = f"{name}.N" if in_list else name
            yield from sections(inner, prefix=f"{prefix}.{step}".lstrip("."))


def section_lines(prefixes: list[str], section: type[BaseModel]) -> Iterator[str]:
    """A heading, the section's own sentence, and a table of its fields."""
    kind = section.model_fields.get("kind")
    choice = f" with `kind: {get_args(kind.annotation)[0]}`" if kind else ""
    keys = ", ".join(f"`{prefix}`" for prefix in dict.fromkeys(prefixes))
    yield f"## {keys}{choice}" if prefixes != [""] else "## The run"
    yield ""
    yield (section.__doc__ or "").strip()
    yield ""
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in section.model_fields.items():
        meaning = " ".join(
            (field.description or ("Which choice." if name == "kind" else "")).split()
        )
        cells = (f"`{name}`", spelt(field), default_of(field), meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def models_in(annotation: Any, *, in_list: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    """The sections that `annotation` can hold, each with whether it is a list's item."""
    if is_section(annotation):
        yield annotation, in_list
        return
    if get_origin(annotation) is Literal:
        return
    for part in get_args(annotation):
        if get_origin(part) is not None or isinstance(part, type):
            yield from models_in(part, in_list=in_list or get_origin(annotation) is list)


def spelt(field: FieldInfo) -> str:
    """The field's type and bounds as a reader of YAML would say them."""
    return f"{type_words(field.annotation)}{bounds(field.metadata)}"


def type_words(annotation: Any) -> str:
    """`annotation` in words."""
    parts = get_args(annotation)
    match get_origin(annotation):
        case None:
            words = "section" if is_section(annotation) else PLAIN.get(annotation, str(annotation))
        case origin if origin is Annotated:
            words = f"{type_words(parts[0])}{bounds(flattened(parts[1:]))}"
        case origin if origin is Literal:
            words = " | ".join(f"`{part}`" for part in parts)
        case origin if origin is list:
            words = f"list of {type_words(parts[0])}"
        case origin if origin is dict:
            words = "mapping"
        case _ if all(is_section(bare(part)) for part in parts):
            words = "section, one of several kinds"
        case _:
            words = " | ".join(type_words(part) for part in parts)
    return words


def is_section(annotation: Any) -> bool:
    """Whether `annotation` is a class of ours, and not a type expression or a plain type."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def bare(annotation: Any) -> Any:
    """`annotation` without what it is annotated with, such as the tag of a union's choice."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def flattened(metadata: tuple[Any, ...]) -> list[Any]:
    """Constraints as pydantic lists them, also where a nested `Field` still wraps them."""
    wrapped = (item.metadata if isinstance(item, FieldInfo) else [item] for item in metadata)
    return [item for items in wrapped for item in items]


def bounds(metadata: list[Any]) -> str:
    """Limits such as `, > 0` and `, not empty`."""
    said = [
        f", {sign} {getattr(item, name)}"
        for item in metadata
        for name, sign in BOUNDS
        if getattr(item, name, None) is not None
    ]
    if any(getattr(item, "min_length", None) for item in metadata):
        said.append(", not empty")
    return "".join(said)


def default_of(field: FieldInfo) -> str:
    """The default as YAML; a section's default is the sum of its fields' defaults."""
    if field.default is PydanticUndefined:
        return "required"
    value = field.default
    if isinstance(value, BaseModel):
        kind = getattr(value, "kind", None)
        return f"`kind: {kind}`" if kind else "its defaults"
    if isinstance(value, list) and all(isinstance(item, BaseModel) for item in value):
        kinds = ", ".join(f"{{kind: {item.model_dump()['kind']}}}" for item in value)
        return f"`[{kinds}]`"
    words = value.replace("\n", "\\n") if isinstance(value, str) else json.dumps(value)
    return f"`{words}`"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
