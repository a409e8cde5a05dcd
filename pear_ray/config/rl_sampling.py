"""Which groups a step trains on: those that teach something."""

from typing import Annotated

from pydantic import Field

from pear_ray.config.base import Section


class DynamicSamplingConfig(Section):
    """Further problems in place of groups whose outcomes are all equal (DAPO, arXiv 2503.14476)."""

    max_batches: Annotated[int, Field(gt=1)] = 3
    """Most problems that a step samples, in batches of `rl.prompts_per_step`. A step that has too
    few groups with both right and wrong completions then is filled up with others."""
