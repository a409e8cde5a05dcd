"""Where prompts with verifiable answers come from."""

from typing import Annotated

from pydantic import Field, JsonValue

from pear_ray.config.base import Section


class GameConfig(Section):
    """One reasoning-gym game with its parameters."""

    name: str
    """The game's name in reasoning-gym, such as `chain_sum`."""
    params: dict[str, JsonValue] = Field(default={})
    """Parameters of the game's own config (difficulty); `seed` and `size` are set by the problem
    set."""
    share: Annotated[float, Field(gt=0)] = 1.0
    """This game's share of the set, relative to the other games' shares."""


class ProblemSetConfig(Section):
    """A deterministic set of problems: the same config always makes the same problems."""

    games: Annotated[list[GameConfig], Field(min_length=1)]
    """The games to mix, interleaved by share."""
    size: Annotated[int, Field(gt=0)]
    """How many distinct problems."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Sets with different seeds hold different problems; give training and evaluation different
    ones."""


class RewardConfig(Section):
    """How completions are verified: in killable processes, three-state."""

    num_processes: Annotated[int, Field(gt=0)] = 1
    """Verifier processes per worker."""
    deadline_s: Annotated[float, Field(gt=0)] = 10.0
    """A verifier that runs longer is killed and its reward is `errored`."""
    max_errored_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """A step with a larger share of errored rewards stops the run."""
