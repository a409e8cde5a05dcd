"""Training low-rank adapters instead of the model's own weights."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from pear_ray.config.base import Section

ALL_LINEAR = "all-linear"


class LoraConfig(Section):
    """LoRA (arXiv 2106.09685): only A and B train, of `alpha / rank * B A` added to a weight."""

    # There is no dropout: the guard, `ratio_policy: live` and a resumed run all want a forward pass
    # that gives the same twice.

    rank: Annotated[int, Field(gt=0)] = 16
    """Rows of A, columns of B."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The product's scale, times the rank."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = ALL_LINEAR
    """Linear layers that are adapted, by the last parts of their names, as in `[q_proj, v_proj]`;
    or all but the output head, which like the embedding cannot be."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names_or_all(cls, value: Any) -> Any:
        """One message, where pydantic has one per kind of value."""
        if value == ALL_LINEAR or (isinstance(value, list) and value):
            return value
        raise ValueError(
            f"wanted {ALL_LINEAR}, or a list of layers' names such as [q_proj, v_proj]; got "
            f"{value!r}"
        )

    @property
    def named_targets(self) -> list[str]:
        """The names given; none where all layers are meant."""
        return [] if self.target_modules == ALL_LINEAR else self.target_modules


class RlLoraConfig(LoraConfig):
    """Adapters of RL, and what the engine gets of them."""

    sync: Literal["merged", "adapter"] = "merged"
    """`merged`: whole weights with the adapters added, so that sampling costs what it does without
    them. `adapter`: adapters alone, beside whose products the engine computes those of its base:
    less to send, more to compute at every token."""
