"""The section every part of a run's config derives from."""

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """Frozen, strict, and closed: an unknown key is an error, and `yes` is not 1."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


def by_kind(default: str) -> BeforeValidator:
    """For a union told apart by `kind`: a kind's name alone stands for it with its defaults.

    A mapping without a `kind` is of the `default` one, so that an override of a single key works
    whether or not the run file has the section.
    """

    def complete(found: Any) -> Any:
        if isinstance(found, str):
            return {"kind": found}
        if isinstance(found, dict) and "kind" not in found:
            return {"kind": default} | found
        return found

    return BeforeValidator(complete)
