"""The problems of any set, and evaluation problems that no training stage has seen."""

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from pear_ray.config.corpus import SampledCorpus
from pear_ray.config.evaluate import EvaluateConfig, Suite, SuiteConfig
from pear_ray.config.problems import FileProblems, GameProblems, HubProblems, ProblemSetConfig
from pear_ray.config.rewards import RewardConfig, name_of, wants_answer
from pear_ray.config.rl import RlConfig
from pear_ray.config.rl_sampling import TableRates
from pear_ray.config.run import RunConfig
from pear_ray.errors import InputError
from pear_ray.records import Problem
from pear_ray.shipped import local_path
from pear_ray.tasks.entries import answer_of, metadata_of
from pear_ray.tasks.games import make_game_problems
from pear_ray.tasks.hub_sets import known_size, read_hub_problems
from pear_ray.tasks.problem_files import read_problems
from pear_ray.tasks.unit_tests import check_tests

S = TypeVar("S", SampledCorpus, RlConfig, EvaluateConfig, SuiteConfig)


def make_problems(config: ProblemSetConfig, exclude: Collection[Problem] = ()) -> list[Problem]:
    """The problems of a set, in a fixed order.

    Args:
        config: Games, a file or a dataset of the hub.
        exclude: Problems whose questions must not occur, such as the training set's. Games give
            others instead; rows that have one are refused.

    Raises:
        ConfigError: On an unknown game or parameter, or too few distinct problems.
        InputError: A file cannot be read, the hub's dataset cannot be had, or a row cannot be used.
    """
    if isinstance(config, GameProblems):
        return make_game_problems(config, exclude)
    is_file = isinstance(config, FileProblems)
    problems = read_problems(config) if is_file else read_hub_problems(config)
    seen = {problem.question: problem for problem in exclude}
    for problem in problems:
        if problem.question in seen:
            raise InputError(
                f"{where(problem)}: its question is problem {seen[problem.question].problem_id} "
                "of a training set too, so that it measures nothing; give evaluation rows of its "
                "own (`skip` and `size` part one file)"
            )
    return problems


def problems_disjoint_from(training: ProblemSetConfig, held_out: ProblemSetConfig) -> list[Problem]:
    """The problems of `held_out`, none of whose questions occur in `training`."""
    return make_problems(held_out, exclude=make_problems(training))


def evaluation_problems(config: RunConfig, suites: Sequence[Suite]) -> Iterator[list[Problem]]:
    """Each suite's problems, without any question of the corpus's or RL's problem sets.

    Raises:
        ConfigError: The games cannot give that many other problems.
        InputError: A file or the hub's dataset cannot be used, or has a training problem.
    """
    trained = make_problems(config.rl.problems)
    if isinstance(config.corpus, SampledCorpus):
        trained += make_problems(config.corpus.problems)
    for suite in suites:
        yield make_problems(suite.problems, exclude=trained)


def num_problems(config: ProblemSetConfig) -> int:
    """How many problems the set has; of one that is neither known nor has a `size` it is read.

    Raises:
        InputError: It cannot be used.
    """
    if config.size is not None:
        return config.size
    known = known_size(config) if isinstance(config, HubProblems) else None
    return len(make_problems(config)) if known is None else known


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The config for a process that works in another folder, such as Ray Train's workers."""
    evaluate = config.evaluate
    suites = [_absolute(suite) for suite in evaluate.suites]
    sections: dict[str, object] = {
        "rl": _absolute(config.rl),
        "evaluate": _absolute(evaluate.model_copy(update={"suites": suites})),
    }
    if isinstance(config.corpus, SampledCorpus):
        sections["corpus"] = _absolute(config.corpus)
    moved = config.model_copy(update=sections)
    band = moved.rl.difficulty
    if band is None or not isinstance(band.rates, TableRates):
        return moved
    path = str(Path(band.rates.path).expanduser().absolute())
    band = band.model_copy(update={"rates": band.rates.model_copy(update={"path": path})})
    return moved.model_copy(update={"rl": moved.rl.model_copy(update={"difficulty": band})})


def _absolute(section: S) -> S:
    problems = section.problems
    if not isinstance(problems, FileProblems):
        return section
    path = str(Path(local_path(problems.path)).expanduser().absolute())
    return section.model_copy(update={"problems": problems.model_copy(update={"path": path})})


def content_of(config: ProblemSetConfig) -> dict[str, str]:
    """What a fingerprint says of a set's content; nothing for games, which their config is.

    Raises:
        InputError: There is no such file, or the hub's dataset cannot be had.
    """
    if isinstance(config, GameProblems):
        return {}
    if isinstance(config, HubProblems):
        rows = [[each.problem_id, each.question, each.entry] for each in read_hub_problems(config)]
        return {"problems": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:20]}
    try:
        with Path(local_path(config.path)).expanduser().open("rb") as stream:
            return {"problems": hashlib.file_digest(stream, "sha256").hexdigest()[:20]}
    except OSError as error:
        raise InputError(
            f"{config.path}: cannot be read ({error.strerror}); give a JSONL or Parquet file"
        ) from error


def check_verifiable(problems: Sequence[Problem], rewards: RewardConfig) -> None:
    """See that every problem has what its verifiers compare with.

    Raises:
        InputError: One lacks its answer or its tests.
    """
    for component in rewards.components:
        for problem in problems:
            if wants_answer(component) and answer_of(problem) is None:
                raise InputError(
                    f"{where(problem)}: answer: missing, and the component `{name_of(component)}` "
                    "compares with it; complete the row, or set columns.answer"
                )
            if component.kind == "unit_tests":
                tests = metadata_of(problem).get(component.tests)
                try:
                    check_tests(tests)
                except ValueError as error:
                    raise InputError(
                        f"{where(problem)}: {component.tests}: {error}; the component "
                        f"`{name_of(component)}` runs them"
                    ) from error


def where(problem: Problem) -> str:
    """The problem as its author knows it: by file and row, or by its id."""
    record = json.loads(problem.entry)
    return f"{record['file']} row {record['row']}" if "file" in record else problem.problem_id
