"""The readiness report: what RL would make of the SFT checkpoint."""

from typing import Annotated

from pydantic import Field

from pear_ray.config.base import Section


class ReadyConfig(Section):
    """The on-demand stage `ready`: the first rollout batches of `rl`, from the SFT checkpoint."""

    num_steps: Annotated[int, Field(gt=0)] = 4
    """Rollout batches of `rl.prompts_per_step` problems: those that RL would begin with."""
    drift_completions: Annotated[int, Field(ge=0)] = 2
    """Completions per problem that the base model scores as well, for the KL from it; at most
    `rl.group_size`. 0: none, and the base model is not loaded."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Level of the bootstrap intervals over problems."""
