"""A step's rollouts: of its own problems, or of further ones where groups teach nothing.

Dynamic sampling is DAPO's (arXiv 2503.14476). A group is informative where it has both right and
wrong completions, by the verifier's outcome: a format term or a length penalty makes no group so.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pear_ray.distributed.loops import SAMPLED_GROUPS
from pear_ray.distributed.rl_endings import check_endings
from pear_ray.distributed.rl_rollouts import RolloutMaker
from pear_ray.distributed.train_worker import Laps
from pear_ray.records import RolloutGroup
from pear_ray.tasks.reward_totals import outcomes_of

CURSOR_FILE = "sampling.json"


class Worth(IntEnum):
    """What a group is worth; lower trains first."""

    INFORMATIVE = 0
    DEGENERATE = 1
    ERRORED = 2  # no verdict at all


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one rank has of a step.

    Attributes:
        groups: Those it trains on; as many on every rank.
        sampled: Those it sampled, whoever trains on them, if anyone does.
        sums: What `sampling_metrics` wants to know of it.
    """

    groups: list[RolloutGroup]
    sampled: list[RolloutGroup]
    sums: dict[str, float] = field(default_factory=dict)


def worth_of(group: RolloutGroup) -> Worth:
    """By the outcomes that occur in it."""
    outcomes = outcomes_of(one.reward for one in group.rollouts)
    return (Worth.ERRORED, Worth.DEGENERATE, Worth.INFORMATIVE)[len(outcomes)]


def next_round_size(*, wanted: int, informative: int, sampled: int, most: int) -> int:
    """How many problems to sample next; 0 when there are enough groups, or no more may be sampled.

    As many as are needed if they are informative as often as those before: a whole batch for a
    missing group or two would be thrown away nearly whole.
    """
    missing = wanted - informative
    if missing <= 0:
        return 0
    needed = -(-missing * sampled // informative) if informative else wanted
    return min(needed, wanted, most - sampled)


def choose_places(worths: Mapping[int, Worth], *, wanted: int) -> list[int]:
    """The places of the groups that train, in order: informative ones first, then by place."""
    return sorted(sorted(worths, key=lambda place: (worths[place], place))[:wanted])


class BatchMaker:
    """Makes the rollouts of one step after the other; `make` is a collective.

    Places in the endless order of problems are used once each, whether or not their groups train.

    Attributes:
        next_place: The first place that no step has used; kept up where sampling is dynamic.
    """

    def __init__(
        self,
        maker: RolloutMaker,
        *,
        warn: Callable[[str], None],
        enter: Callable[[str], None],
    ) -> None:
        self._maker, self._warn, self._enter = maker, warn, enter
        self._settings = maker.config.dynamic_sampling
        self._has_warned = False
        self.next_place = 0

    def make(self, step: int, *, policy_version: int, laps: Laps) -> StepBatch:
        """Sample and reward the step's groups.

        Raises:
            RewardError: Too large a share of the rewards could not be computed.
            HandoverError: It is the first step, and the policy does not end its completions.
        """
        if self._settings is not None:
            wanted = self._maker.config.prompts_per_step
            most = wanted * self._settings.max_batches
            return self._in_rounds(
                step, wanted=wanted, most=most, policy_version=policy_version, laps=laps
            )
        places = self._maker.places_of(step)
        mine: dict[int, RolloutGroup] = {}
        self._sample_round(step, places, mine, policy_version=policy_version, laps=laps)
        groups = list(mine.values())
        return StepBatch(groups, groups)

    def close(self) -> None:
        """Nothing is under way between two steps."""

    def save(self, folder: Path) -> None:
        """Write the place to go on from (rank 0)."""
        if self._settings is not None and self._maker.rank == 0:
            (folder / CURSOR_FILE).write_text(json.dumps({"next_place": self.next_place}))

    def load(self, folder: Path) -> None:
        """Go on from the place that `save` wrote."""
        if self._settings is not None:
            self.next_place = json.loads((folder / CURSOR_FILE).read_text())["next_place"]

    def _in_rounds(
        self, step: int, *, wanted: int, most: int, policy_version: int, laps: Laps
    ) -> StepBatch:
        """`wanted` groups out of at most `most`."""
        mine: dict[int, RolloutGroup] = {}
        worths: dict[int, Worth] = {}  # of all ranks' groups, so that all decide alike
        rounds, informative, size = 0, 0, wanted
        while size:
            places = range(self.next_place, self.next_place + size)
            self._sample_round(step, places, mine, policy_version=policy_version, laps=laps)
            worths |= _gather({place: worth_of(mine[place]) for place in places if place in mine})
            self.next_place, rounds = places.stop, rounds + 1
            informative = _num_informative(worths)
            size = next_round_size(
                wanted=wanted, informative=informative, sampled=len(worths), most=most
            )
        if informative < wanted:
            self._say_cap_reached(step, wanted=wanted, informative=informative, most=most)
        chosen = choose_places(worths, wanted=wanted)
        sums = _sums(mine, chosen) | {
            "max/sampling_rounds": float(rounds),
            "max/sampling_cap_reached": float(informative < wanted),
        }
        groups = _share_out(mine, chosen)
        laps.lap("reward")
        return StepBatch(groups, list(mine.values()), sums)

    def _sample_round(
        self,
        step: int,
        places: Sequence[int],
        mine: dict[int, RolloutGroup],
        *,
        policy_version: int,
        laps: Laps,
    ) -> None:
        """Put this rank's groups of `places` among those it has of the step."""
        maker = self._maker
        self._enter("sample")
        sampled = maker.sample(step, places)
        if step == 0 and not mine:
            check_endings(maker, sampled)
        laps.lap("sample")
        self._enter("reward")
        groups = maker.reward(sampled, policy_version=policy_version)
        mine |= dict(zip(places[maker.rank :: maker.world_size], groups, strict=True))
        maker.check_rewards(list(mine.values()))
        laps.lap("reward")

    def _say_cap_reached(self, step: int, *, wanted: int, informative: int, most: int) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        self._warn(
            f"step {step + 1}: {informative} of {most} sampled groups have both right and wrong "
            f"completions, and rl.dynamic_sampling.max_batches allows no more: the other "
            f"{wanted - informative} of the step's {wanted} groups teach little. Give problems "
            "nearer to what the policy can do, or raise rl.group_size; "
            "rl/dynamic_sampling/cap_reached tells of later steps"
        )


def sampling_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """What dynamic sampling cost, from the sums of all ranks; nothing where there is none."""
    if "sampled_groups" not in sums:
        return {}
    sampled, trained = sums["sampled_groups"], sums["trained_groups"]
    return {
        "rl/dynamic_sampling/rounds": sums["max/sampling_rounds"],
        SAMPLED_GROUPS: sampled,
        "rl/dynamic_sampling/kept_fraction": trained / sampled,
        "rl/dynamic_sampling/filled_fraction": 1 - sums["informative_groups"] / trained,
        "rl/dynamic_sampling/discarded_tokens": sums["discarded_tokens"],
        "rl/dynamic_sampling/cap_reached": sums["max/sampling_cap_reached"],
    }


def _sums(mine: Mapping[int, RolloutGroup], chosen: Sequence[int]) -> dict[str, float]:
    kept = set(chosen).intersection(mine)
    discarded = [group for place, group in mine.items() if place not in kept]
    return {
        "sampled_groups": float(len(mine)),
        "trained_groups": float(len(kept)),
        "informative_groups": float(
            sum(worth_of(mine[place]) is Worth.INFORMATIVE for place in kept)
        ),
        "discarded_tokens": float(
            sum(len(one.completion.token_ids) for group in discarded for one in group.rollouts)
        ),
    }


def _num_informative(worths: Mapping[int, Worth]) -> int:
    return sum(worth is Worth.INFORMATIVE for worth in worths.values())


def _gather(mine: dict[int, Worth]) -> dict[int, Worth]:
    """All ranks' entries (a collective)."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return {place: worth for each in gathered for place, worth in each.items()}


def _share_out(mine: Mapping[int, RolloutGroup], chosen: Sequence[int]) -> list[RolloutGroup]:
    """This rank's part of the chosen groups, as many on each rank (a collective).

    Rank r trains on every world_size-th from the r-th on, as where each rank keeps its own: which
    groups share an update does not follow from the number of ranks.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found: dict[int, RolloutGroup] = {}
    for source in range(world_size):  # each group travels to the one rank that wants it
        received: list[Any] = [None]
        parcels = [
            {place: mine[place] for place in chosen[target::world_size] if place in mine}
            for target in range(world_size)
        ]
        dist.scatter_object_list(received, parcels if rank == source else None, src=source)
        found |= received[0]
    return [found[place] for place in chosen[rank::world_size]]
