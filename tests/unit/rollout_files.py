"""Rollout files of a few steps, with numbers that can be followed by hand."""

from collections.abc import Sequence
from pathlib import Path

from pear_ray.artifacts.rollouts import TrainedNumbers, rollouts_table, write_step
from pear_ray.embedded.tokenizer import build_tokenizer
from pear_ray.records import (
    Completion,
    FinishReason,
    Problem,
    Reward,
    RewardStatus,
    Rollout,
    RolloutGroup,
)

QUESTION = "<|user|>1 + 2 =<|assistant|>"
ERRORED = None  # as a reward


def rollout(
    text: str, reward: float | None, *, version: int, place: int, cut: bool = False
) -> Rollout:
    tokenizer = build_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    status = {None: RewardStatus.ERRORED, 1.0: RewardStatus.OK}.get(reward, RewardStatus.FAILED)
    value = reward or 0.0
    components = {} if reward is None else {"game": float(value == 1.0), "form": value / 2}
    return Rollout(
        problem=Problem(f"sum/0/{place}", "sum", f"{place} + 2 = <b>?</b>", "{}"),
        prompt_ids=tokenizer.encode(QUESTION, add_special_tokens=False).ids,
        completion=Completion(
            token_ids=ids,
            behavior_logprobs=[-0.5] * len(ids),
            text=text,
            finish_reason=FinishReason.LENGTH if cut else FinishReason.STOP,
        ),
        policy_version=version,
        reward=Reward(status, value, "ValueError: no answer" if reward is None else "", components),
    )


def write_steps(
    folder: Path,
    steps: Sequence[int] = (1, 2, 3),
    *,
    trained: bool = True,
    temperature: float = 1.0,
) -> Path:
    """Three groups of two completions per step: all wrong, one right, one errored.

    The texts are of 3, 3, 4, 2, 3 and 3 tokens; the second to last was cut. The trainer's
    log-probs are 0.25 above the sampler's.
    """
    for step in steps:
        version = step - 1
        told = [
            [("1+1", 0.0, False), ("2+2", 0.0, False)],
            [("3+00", 1.0, False), ("4+", 0.5, False)],
            [("5+5", 0.0, True), ("6+6", ERRORED, False)],
        ]
        groups = [
            RolloutGroup(
                [
                    rollout(text, reward, version=version, place=place, cut=cut)
                    for text, reward, cut in group
                ]
            )
            for place, group in enumerate(told)
        ]
        lengths = [len(one.completion.token_ids) for each in groups for one in each.rollouts]
        numbers = TrainedNumbers([0.0, 0.0, 0.7, -0.7, 0.0, 0.0], [[-0.25] * n for n in lengths])
        table = rollouts_table(
            groups,
            step=step,
            places=range(3),
            temperature=temperature,
            trained=numbers if trained else None,
        )
        write_step(folder, step, [table])
    return folder
