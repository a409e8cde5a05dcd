"""What crosses a boundary between stages, processes or engines, and its column names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

STAGES = ("collect", "score", "sft", "rl", "evaluate", "report")  # in order
ON_DEMAND_STAGES = ("diagnose", "ready")  # made only when asked for by name
HALF_STAGES = ("rl_rollouts", "rl_train")  # `pear rl --rollouts-only` and `--train-only`


class RewardStatus(StrEnum):
    """What a verifier could say. `ERRORED` is not a wrong answer: it is no answer at all."""

    OK = "ok"
    FAILED = "failed"
    ERRORED = "errored"


class FinishReason(StrEnum):
    """Why a completion ended: its own end token, or the token limit (truncated)."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Problem:
    """One prompt with what its verifier needs.

    Attributes:
        problem_id: Unique within a run, stable over reruns: `game/seed/index`, or `file/row`.
        task: Name of the game or set that the problem comes from.
        question: The user turn, as text.
        entry: The verifier's own record of the problem, as JSON.
    """

    problem_id: str
    task: str
    question: str
    entry: str


@dataclass(frozen=True, slots=True)
class Reward:
    """A verifier's three-state result. `value` is meaningless when `status` is `ERRORED`.

    Attributes:
        status: The outcome: correct, wrong, or no verdict. It decides pass@k.
        value: What is learned from: the weighted sum of the components.
        detail: Why, for people.
        components: Each component's own value, by its name; nothing where no sum was made.
        answer: What was extracted, in the verifier's normal form; None where nothing was, or where
            the verifier extracts nothing. Votes are by it. No part of what makes verdicts equal.
    """

    status: RewardStatus
    value: float
    detail: str = ""
    components: Mapping[str, float] = field(default_factory=dict)
    answer: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Completion:
    """What a sampler made of one prompt.

    Attributes:
        token_ids: Sampled ids, the end token included when there is one.
        behavior_logprobs: One natural-log probability per id, at the sampling temperature.
        text: The decoded ids, special tokens left out.
        finish_reason: Whether it ended by itself or was cut.
    """

    token_ids: list[int]
    behavior_logprobs: list[float]
    text: str
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion of one problem in one RL step, with its reward."""

    problem: Problem
    prompt_ids: list[int]
    completion: Completion
    policy_version: int
    reward: Reward


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The rollouts of one problem in one step: the unit over which a baseline is taken."""

    rollouts: list[Rollout]
