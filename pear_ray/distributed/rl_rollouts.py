"""One rank's rollouts of a step: which problems, their completions, their rewards."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pear_ray.config.rl import RlConfig
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.trainer import gather_over_ranks
from pear_ray.engines.vllm.engine import VllmEngine
from pear_ray.engines.vllm.spec import Sampling
from pear_ray.records import Completion, Problem, RewardStatus, Rollout, RolloutGroup
from pear_ray.tasks.difficulty import training_problems
from pear_ray.tasks.reward_pool import RewardPool
from pear_ray.tasks.reward_totals import check_errored, first_error


@dataclass(frozen=True, slots=True)
class Sampled:
    """The completions of one problem, before they are rewarded."""

    problem: Problem
    prompt_ids: list[int]
    completions: list[Completion]


class RolloutMaker:
    """What samples and rewards on one rank of `world_size`."""

    def __init__(
        self,
        config: RlConfig,
        chat: ChatTokenizer,
        engine: VllmEngine,
        pool: RewardPool,
        *,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.config, self.seed = config, seed
        self.chat, self.engine, self.pool = chat, engine, pool
        self.rank, self.world_size = rank, world_size
        self.problems = training_problems(config)

    def places_of(self, step: int) -> range:
        """The step's places in the endless seeded order of problems, over all ranks."""
        begin = step * self.config.prompts_per_step
        return range(begin, begin + self.config.prompts_per_step)

    def sample(self, step: int, places: Sequence[int] | None = None) -> list[Sampled]:
        """`group_size` completions of each of this rank's problems of the step.

        Args:
            step: Counts from 0.
            places: All ranks' places; the step's own unless given.
        """
        all_places = self.places_of(step) if places is None else places
        mine = set(all_places[self.rank :: self.world_size])
        problems = self._engine_problems(all_places)
        if not problems:
            return []
        prompts = [self.chat.prompt_ids(problem.question) for _, problem in problems]
        sampling = [
            Sampling(
                num_samples=self.config.group_size,
                temperature=self.config.temperature,
                max_tokens=self.config.max_tokens,
                # Keyed by place, not by rank or batch: a resumed or resharded run samples alike.
                seed=_seed(self.seed, step, place),
            )
            for place, _ in problems
        ]
        completions = self.engine.generate(prompts, sampling)
        return [
            Sampled(problem, prompt, group)
            for (place, problem), prompt, group in zip(problems, prompts, completions, strict=True)
            if place in mine
        ]

    def reward(self, sampled: Sequence[Sampled], *, policy_version: int) -> list[RolloutGroup]:
        """The completions with their rewards, one group per problem."""
        pairs = [(each.problem, one.text) for each in sampled for one in each.completions]
        rewards = iter(self.pool.verify_all(pairs))
        return [
            RolloutGroup(
                [
                    Rollout(
                        problem=each.problem,
                        prompt_ids=each.prompt_ids,
                        completion=completion,
                        policy_version=policy_version,
                        reward=next(rewards),
                    )
                    for completion in each.completions
                ]
            )
            for each in sampled
        ]

    def check_rewards(self, groups: Sequence[RolloutGroup]) -> None:
        """Refuse a step whose rewards are too often unknown (a collective).

        Raises:
            RewardError: Over all ranks more than `rl.rewards.max_errored_fraction` errored.
        """
        mine = [one for group in groups for one in group.rollouts]
        gathered = gather_over_ranks({"rollouts": len(mine), "errored": sum(map(is_errored, mine))})
        check_errored(
            errored=sum(each["errored"] for each in gathered),
            total=sum(each["rollouts"] for each in gathered),
            limit=self.config.rewards.max_errored_fraction,
            key="rl.rewards",
            first=first_error(one.reward for one in mine),
        )

    def _engine_problems(self, places: Sequence[int]) -> list[tuple[int, Problem]]:
        """Those of all ranks' `places` that this rank's engine samples, each with its place.

        The ranks of one engine ask it the same, for all of them.
        """
        size = self.config.tensor_parallel_size
        first = self.rank - self.rank % size
        of_engine = sorted(
            place
            for rank in range(first, first + size)
            for place in places[rank :: self.world_size]
        )
        return [(place, self.problems[self._order(place)]) for place in of_engine]

    def _order(self, place: int) -> int:
        epoch, index = divmod(place, len(self.problems))
        return _permutation(len(self.problems), self.seed * 1_000_003 + epoch)[index]


def is_errored(rollout: Rollout) -> bool:
    """Whether the rollout's reward is unknown."""
    return rollout.reward.status is RewardStatus.ERRORED


@functools.lru_cache(maxsize=2)
def _permutation(size: int, seed: int) -> list[int]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


def _seed(*parts: int) -> int:
    """A sampler seed that no other step or place shares, inside the range that vLLM takes."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
