"""The section every part of a run's config derives from."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, strict, and closed: an unknown key is an error, and `yes` is not 1."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )
