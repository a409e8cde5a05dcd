"""Where prompts with verifiable answers come from: games, a file of one's own, or the hub."""

import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, JsonValue, Tag, field_validator

from pear_ray.config.base import Section

PROMPT_MARK = "{prompt}"
# What Qwen2.5-Math's authors evaluate with; math-verify looks into the box.
BOXED_TEMPLATE = "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}."
HUB_SETS = ("gsm8k", "math-500", "aime-2024", "aime-2025")


class GameConfig(Section):
    """One reasoning-gym game with its parameters."""

    name: str
    """The game's name in reasoning-gym, such as `chain_sum`."""
    params: dict[str, JsonValue] = Field(default={})
    """Parameters of the game's own config (difficulty); `seed` and `size` are set by the problem
    set."""
    share: Annotated[float, Field(gt=0)] = 1.0
    """This game's share of the set, relative to the other games' shares."""


class GameProblems(Section):
    """A deterministic set of problems: the same config always makes the same problems."""

    kind: Literal["games"] = "games"
    games: Annotated[list[GameConfig], Field(min_length=1)]
    """The games to mix, interleaved by share."""
    size: Annotated[int, Field(gt=0)]
    """How many distinct problems."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Sets with different seeds hold different problems; give training and evaluation different
    ones."""


class ProblemColumns(Section):
    """What a problem file calls its columns. All others join the metadata."""

    prompt: str = "prompt"
    """Text of the user's turn."""
    answer: str = "answer"
    """What the verifier compares with, as text or number; needed by `exact`, `math` and `regex`
    alone."""
    metadata: str = "metadata"
    """A mapping for the verifier, such as unit tests (optional)."""
    id: str = "id"
    """The problem's own id, unique in the file (optional; file and row number without it)."""


class FileProblems(Section):
    """Problems of a file, in its order."""

    kind: Literal["file"]
    path: str
    """A JSONL or Parquet file; every node must reach it. Some come with the package, such
    as `embedded:automaton/train_a.jsonl`."""
    format: Literal["auto", "jsonl", "parquet"] = "auto"
    """What the file is; `auto` goes by its ending."""
    columns: ProblemColumns = ProblemColumns()
    """What the file calls its columns."""
    prompt_template: str = PROMPT_MARK
    """The user's turn, with `{prompt}` where the column's text goes: say there how to answer."""
    skip: Annotated[int, Field(ge=0)] = 0
    """Problems left out at the file's beginning: with `size`, one file gives a set to train on and
    another to evaluate on."""
    size: Annotated[int, Field(gt=0)] | None = None
    """How many problems. None: all that are left."""

    @field_validator("prompt_template")
    @classmethod
    def _has_the_prompt(cls, template: str) -> str:
        return with_prompt_mark(template)


class HubProblems(Section):
    """Problems of a dataset on the hub, in its order."""

    kind: Literal["hub"]
    name: str
    """`gsm8k`, `math-500`, `aime-2024` or `aime-2025`, of which dataset, split and columns are
    known, or any dataset as USER/NAME."""
    configuration: str | None = None
    """Which of the dataset's configurations. None: the known one, or the only one."""
    split: str | None = None
    """Which split. None: the one that is evaluated on, `test` where nothing is known."""
    columns: ProblemColumns | None = None
    """What the dataset calls its columns. None: the known names, or the defaults."""
    prompt_template: str = BOXED_TEMPLATE
    """The user's turn, with `{prompt}` where the column's text goes: say there how to answer."""
    skip: Annotated[int, Field(ge=0)] = 0
    """Problems left out at the beginning."""
    size: Annotated[int, Field(gt=0)] | None = None
    """How many problems. None: all that are left."""

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if name not in HUB_SETS and not re.fullmatch(r"[\w.-]+/[\w.-]+", name, flags=re.ASCII):
            raise ValueError(
                f"{name!r} is no known set ({', '.join(HUB_SETS)}) and names no dataset of the "
                "hub as USER/NAME"
            )
        return name

    @field_validator("prompt_template")
    @classmethod
    def _has_the_prompt(cls, template: str) -> str:
        return with_prompt_mark(template)


def with_prompt_mark(template: str) -> str:
    """`template`, which says where the prompt goes.

    Raises:
        ValueError: It does not.
    """
    if PROMPT_MARK not in template:
        raise ValueError(f"{template!r} has no {PROMPT_MARK}, so that all prompts are the same")
    return template


def _kind(value: Any) -> str | None:
    """The union's tag; games need not say that they are games."""
    if isinstance(value, dict):
        found = value.get("kind", "games")
        return f"kind={found}" if isinstance(found, str) else None
    known = GameProblems | FileProblems | HubProblems
    return f"kind={value.kind}" if isinstance(value, known) else None


ProblemSetConfig = Annotated[
    Annotated[GameProblems, Tag("kind=games")]
    | Annotated[FileProblems, Tag("kind=file")]
    | Annotated[HubProblems, Tag("kind=hub")],
    Discriminator(
        _kind,
        custom_error_type="problem_set_kind",
        custom_error_message="kind of a problem set is `games`, `file` or `hub`",
    ),
]
