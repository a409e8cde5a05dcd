"""How completions are verified: weighted components, in processes that can be killed."""

import re
from typing import Annotated, Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from pear_ray.config.base import Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class Component(Section):
    """One term of the reward."""

    name: Name | None = None
    """What its metric is called: `rl/reward/NAME/mean`. None: its kind."""
    weight: float = 1.0
    """Multiplies its value in the reward's sum; negative for a penalty."""
    outcome: bool = False
    """Whether it decides that an answer is correct (pass@k, degenerate groups); of several, all
    must agree. With none marked, the first component does."""


class GameVerifier(Component):
    """reasoning-gym's own rule for its games: 1 for an answer that is exactly right, else 0."""

    kind: Literal["game"]


class ExactVerifier(Component):
    """1 where the extracted answer is the problem's answer, as text or as a number."""

    kind: Literal["exact"]
    extract: Literal["answer_tag", "boxed", "last_line", "all"] = "answer_tag"
    """What of the completion is the answer: the last `<answer>...</answer>`, the last `\\boxed{}`,
    the last line that is not empty, or all of it."""
    ignore_case: bool = True
    """Whether `Paris` is `paris`."""
    ignore_space: bool = True
    """Whether runs of white space are one space."""
    ignore_punctuation: bool = False
    """Whether everything but letters, digits and white space is left out on both sides."""
    numbers: bool = True
    """Whether `1,000`, `1000.0` and `1e3` are one number."""


class RegexVerifier(Component):
    """A pattern searched in the completion; its last match counts."""

    kind: Literal["regex"]
    pattern: str
    """A regular expression of Python; `.` matches a newline with `(?s)`."""
    compare: Literal["answer", "match"] = "answer"
    """`answer` gives 1 where the pattern's group is the problem's answer; `match` where there is a
    match at all: a format term."""
    group: Annotated[int, Field(ge=0)] | str = 1
    """Number or name of the group that is the answer; 0 is the whole match."""
    ignore_case: bool = True
    """Whether the answer is compared without regard to case."""

    @model_validator(mode="after")
    def _pattern_has_the_group(self) -> "RegexVerifier":
        try:
            compiled = re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"pattern {self.pattern!r} is no regular expression: {error}"
            ) from error
        known = (*range(compiled.groups + 1), *compiled.groupindex)
        if self.compare == "answer" and self.group not in known:
            raise ValueError(
                f"pattern {self.pattern!r} has no group {self.group!r}; put the answer in ( ), or "
                "set compare=match for a format term"
            )
        return self


class MathVerifier(Component):
    """1 where math-verify finds the answers mathematically equal (extra `math`)."""

    kind: Literal["math"]
    float_digits: Annotated[int, Field(ge=0, le=15)] = 6
    """Decimal places in which numbers that are not exact must agree."""


class FunctionVerifier(Component):
    """A function of yours: (Problem, completion text) to a float, a bool or a dict.

    It is your own code, named by your own run file, and runs with the run's rights.
    """

    kind: Literal["function"]
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    """`module:function`, importable on every node: on PYTHONPATH, or in the folder the run starts
    in."""
    params: dict[str, JsonValue] = Field(default={})
    """Keyword arguments of every call."""
    correct_at: float = 1.0
    """The value from which an answer counts as correct, where the function returns a float."""


class UnitTestsVerifier(Component):
    """1 where the completion's last code block passes the problem's tests, in a limited subprocess.

    Limits keep a run alive; they are no sandbox against code that wants to do harm.
    """

    kind: Literal["unit_tests"]
    tests: str = "tests"
    """Which key of the problem's metadata holds the tests: Python text that raises on failure, or a
    list of such texts."""
    deadline_s: Annotated[float, Field(gt=0)] = 5.0
    """Wall time after which the subprocess and its group are killed: the answer is wrong."""
    cpu_s: Annotated[int, Field(gt=0)] = 4
    """CPU time of one process."""
    memory_bytes: Annotated[int, Field(ge=1 << 26)] = 1 << 30
    """Address space of one process."""
    file_bytes: Annotated[int, Field(ge=0)] = 1 << 20
    """Largest file that the code may write."""


ComponentConfig = Annotated[
    GameVerifier
    | ExactVerifier
    | RegexVerifier
    | MathVerifier
    | FunctionVerifier
    | UnitTestsVerifier,
    Field(discriminator="kind"),
]


class RewardConfig(Section):
    """How completions are verified: in killable processes, three-state."""

    components: Annotated[list[ComponentConfig], Field(min_length=1)] = Field(
        default=[GameVerifier(kind="game")]
    )
    """Terms of the reward, summed by their weights. One that errors makes the reward `errored`."""
    num_processes: Annotated[int, Field(gt=0)] = 1
    """Verifier processes per worker."""
    deadline_s: Annotated[float, Field(gt=0)] = 10.0
    """Verifying one completion longer than this is killed and its reward is `errored`."""
    memory_bytes: Annotated[int, Field(ge=1 << 28)] = 8 << 30
    """Address space of one verifier process; past it a verifier gets a MemoryError. Not what it
    takes: loaded libraries alone reserve a GiB."""
    max_errored_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """A step with a larger share of errored rewards stops the run; one with nothing else always
    does."""

    @field_validator("components")
    @classmethod
    def _names_differ(cls, components: list[ComponentConfig]) -> list[ComponentConfig]:
        names = [name_of(each) for each in components]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two components are called {', '.join(twice)}; give them a `name`")
        return components

    @model_validator(mode="after")
    def _tests_end_first(self) -> "RewardConfig":
        total = sum(each.deadline_s for each in self.components if each.kind == "unit_tests")
        if total >= self.deadline_s:
            raise ValueError(
                f"unit tests may take {total:g} s, and the whole verification is killed after "
                f"deadline_s={self.deadline_s:g}: wrong code would count as an error; raise it"
            )
        return self


def name_of(component: Component) -> str:
    """What the component is called: its name, or its kind."""
    return component.name or str(getattr(component, "kind"))  # noqa: B009 - each subclass has one


def outcomes(rewards: RewardConfig) -> list[bool]:
    """Whether each component decides what is correct: those marked, or else the first."""
    marked = [each.outcome for each in rewards.components]
    return marked if any(marked) else [number == 0 for number in range(len(marked))]


def wants_answer(component: ComponentConfig) -> bool:
    """Whether the component compares with the problem's `answer`."""
    if component.kind == "regex":
        return component.compare == "answer"
    return component.kind in ("exact", "math")


def extracts_answer(component: ComponentConfig) -> bool:
    """Whether the component says which answer it judged. A function's own code decides that."""
    return component.kind == "game" or wants_answer(component)


def is_format_term(component: ComponentConfig) -> bool:
    """Whether the component judges the form of a completion, and not its answer."""
    return component.kind == "regex" and component.compare == "match"


def describe(rewards: RewardConfig) -> str:
    """The components in words, as `--dry-run` shows them."""
    parts = [
        f"{name_of(each)}{'' if name_of(each) == each.kind else f' ({each.kind})'}"
        f" x {each.weight:g}{', outcome' if decides else ''}"
        for each, decides in zip(rewards.components, outcomes(rewards), strict=True)
    ]
    return " + ".join(parts)
