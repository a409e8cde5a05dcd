"""Evaluation problems that no training stage has seen."""

from pear_ray.config.corpus import SampledCorpus
from pear_ray.config.run import RunConfig
from pear_ray.records import Problem
from pear_ray.tasks.games import make_problems, problems_disjoint_from


def evaluation_problems(config: RunConfig) -> list[Problem]:
    """The evaluation set, without any question of the corpus's or RL's problem sets.

    Raises:
        ConfigError: The games cannot give that many other problems.
    """
    collected = (
        make_problems(config.corpus.problems) if isinstance(config.corpus, SampledCorpus) else []
    )
    return problems_disjoint_from(config.rl.problems, config.evaluate.problems, exclude=collected)
