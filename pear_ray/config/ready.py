"""The readiness report: what RL would make of the SFT checkpoint."""

from typing import Annotated

from pydantic import Field, model_validator

from pear_ray.config.base import Section


class ProbeConfig(Section):
    """A few steps of RL with each of several seeds, to see where the reward goes."""

    num_steps: Annotated[int, Field(gt=1)] = 6
    """Steps of each; the learning rate's schedule is that of so short a run."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field(
        default=[0, 1, 2]
    )
    """Each takes the place of the run's seed: other problems, other samples."""

    @model_validator(mode="after")
    def _distinct(self) -> "ProbeConfig":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds} has one twice; give each once")
        return self


class ReadyConfig(Section):
    """The on-demand stage `ready`: the first rollout batches of `rl`, from the SFT checkpoint."""

    num_steps: Annotated[int, Field(gt=0)] = 4
    """Rollout batches of `rl.prompts_per_step` problems: those that RL would begin with."""
    drift_completions: Annotated[int, Field(ge=0)] = 2
    """Completions per problem that the base model scores as well, for the KL from it; at most
    `rl.group_size`. 0: none, and the base model is not loaded."""
    probe: ProbeConfig | None = None
    """A short RL from the checkpoint, with several seeds; none unless this is set. Its models are
    not kept."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Level of the intervals over problems."""
