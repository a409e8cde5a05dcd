"""Which problems RL trains on: those that teach something."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pear_ray.config.base import Section, by_kind


class DynamicSamplingConfig(Section):
    """Further problems in place of groups whose outcomes are all equal (DAPO, arXiv 2503.14476)."""

    max_batches: Annotated[int, Field(gt=1)] = 3
    """Most problems that a step samples, in batches of `rl.prompts_per_step`. A step that has too
    few groups with both right and wrong completions then is filled up with others."""


class ColumnRates(Section):
    """Pass rates that the problem file has itself."""

    kind: Literal["column"] = "column"
    column: str = "pass_rate"
    """The column, or the metadata's key, with a number from 0 to 1."""


class TableRates(Section):
    """Pass rates that a run has measured."""

    kind: Literal["table"]
    path: str
    """A Parquet file, or a folder of them: `collect/pass_rates.parquet` or
    `evaluate/samples.parquet` of a run, or any other with `problem_id` and either `pass_rate` or,
    per completion, `reward_status`."""
    source: str | None = None
    """Whose rates, where the table has several: a value of its column `source` or `checkpoint`."""


class DifficultyConfig(Section):
    """A band of pass rates: problems that are neither hopeless nor solved."""

    rates: Annotated[
        Annotated[ColumnRates | TableRates, Field(discriminator="kind")], by_kind("column")
    ] = ColumnRates()
    """Where the pass rates come from."""
    low: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Least pass rate of a problem that is kept."""
    high: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Greatest pass rate of a problem that is kept."""
    unrated: Literal["refuse", "drop", "keep"] = "refuse"
    """What becomes of problems without a pass rate."""

    @model_validator(mode="after")
    def _is_a_band(self) -> "DifficultyConfig":
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}; swap them")
        return self
