"""Which groups a step trains on, and how many further problems it samples for them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pear_ray.distributed.rl_sampling import (
    Worth,
    choose_places,
    next_round_size,
    sampling_metrics,
    worth_of,
)
from pear_ray.records import (
    Completion,
    FinishReason,
    Problem,
    Reward,
    RewardStatus,
    Rollout,
    RolloutGroup,
)

OK, FAILED, ERRORED = RewardStatus.OK, RewardStatus.FAILED, RewardStatus.ERRORED
GOOD, SAME, NONE = Worth.INFORMATIVE, Worth.DEGENERATE, Worth.ERRORED


def group(*rewards: tuple[RewardStatus, float]) -> RolloutGroup:
    return RolloutGroup(
        [
            Rollout(
                problem=Problem("game/0/0", "game", "1 + 1", "{}"),
                prompt_ids=[1],
                completion=Completion([2], [-1.0], "", FinishReason.STOP),
                policy_version=0,
                reward=Reward(status, value),
            )
            for status, value in rewards
        ]
    )


@pytest.mark.parametrize(
    ("rewards", "worth"),
    [
        ([(OK, 1.0), (FAILED, 0.0)], GOOD),
        # The outcome counts and not the sum: a format term parts these two...
        ([(FAILED, 0.1), (FAILED, 0.0)], SAME),
        # ... and here it makes up for the answer.
        ([(OK, 0.5), (FAILED, 0.5)], GOOD),
        ([(OK, 1.0), (OK, 1.0)], SAME),
        # An errored reward is no outcome.
        ([(OK, 1.0), (ERRORED, 0.0)], SAME),
        ([(OK, 1.0), (ERRORED, 0.0), (FAILED, 0.0)], GOOD),
        ([(ERRORED, 0.0), (ERRORED, 0.0)], NONE),
    ],
)
def test_a_group_is_worth_what_its_outcomes_are(
    rewards: list[tuple[RewardStatus, float]], worth: Worth
) -> None:
    assert worth_of(group(*rewards)) is worth


@pytest.mark.parametrize(
    ("informative", "sampled", "size"),
    [
        (16, 16, 0),  # enough
        (20, 32, 0),
        (8, 16, 16),  # every second one: the 8 missing want 16 more
        (12, 16, 6),  # 4 / (3/4), rounded up
        (15, 30, 2),
        (0, 16, 16),  # nothing to go by: a whole batch
        (1, 16, 16),  # never more than one
        (4, 40, 8),  # what the cap leaves
        (4, 48, 0),  # the cap
    ],
)
def test_a_round_samples_what_is_missing(informative: int, sampled: int, size: int) -> None:
    assert next_round_size(wanted=16, informative=informative, sampled=sampled, most=48) == size


@given(outcomes=st.lists(st.sampled_from([GOOD, SAME, NONE]), min_size=24, max_size=24))
def test_rounds_end_with_enough_groups_or_at_the_cap(outcomes: list[Worth]) -> None:
    sampled, size = 0, 8
    while size:
        sampled += size
        informative = outcomes[:sampled].count(GOOD)
        size = next_round_size(wanted=8, informative=informative, sampled=sampled, most=24)
    assert informative >= 8 or sampled == 24
    chosen = choose_places(dict(enumerate(outcomes[:sampled])), wanted=8)
    assert len(chosen) == 8
    assert [outcomes[place] for place in chosen].count(GOOD) == min(8, informative)


def test_informative_groups_first_then_degenerate_ones_in_order() -> None:
    worths = {10: NONE, 11: SAME, 12: GOOD, 13: SAME, 14: GOOD}
    assert choose_places(worths, wanted=1) == [12]
    assert choose_places(worths, wanted=2) == [12, 14]
    assert choose_places(worths, wanted=3) == [11, 12, 14]
    assert choose_places(worths, wanted=5) == [10, 11, 12, 13, 14]


def test_waste_is_told() -> None:
    sums = {
        "sampled_groups": 40.0,
        "trained_groups": 16.0,
        "informative_groups": 12.0,
        "discarded_tokens": 960.0,
        "max/sampling_rounds": 3.0,
        "max/sampling_cap_reached": 1.0,
    }
    assert sampling_metrics(sums) == {
        "rl/dynamic_sampling/rounds": 3.0,
        "rl/dynamic_sampling/sampled_groups": 40.0,
        "rl/dynamic_sampling/kept_fraction": 0.4,
        "rl/dynamic_sampling/filled_fraction": 0.25,
        "rl/dynamic_sampling/discarded_tokens": 960.0,
        "rl/dynamic_sampling/cap_reached": 1.0,
    }
    assert sampling_metrics({"rollouts": 8.0}) == {}
