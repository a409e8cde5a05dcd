"""The problems of any set, and evaluation problems that no training stage has seen."""

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path

from pear_ray.config.corpus import SampledCorpus
from pear_ray.config.problems import FileProblems, ProblemSetConfig
from pear_ray.config.rewards import RewardConfig, name_of, wants_answer
from pear_ray.config.rl_sampling import TableRates
from pear_ray.config.run import RunConfig, verified_sections
from pear_ray.errors import InputError
from pear_ray.records import Problem
from pear_ray.tasks.entries import answer_of, metadata_of
from pear_ray.tasks.games import make_game_problems
from pear_ray.tasks.problem_files import read_problems
from pear_ray.tasks.unit_tests import check_tests


def make_problems(config: ProblemSetConfig, exclude: Collection[Problem] = ()) -> list[Problem]:
    """The problems of a set, in a fixed order.

    Args:
        config: Games or a file.
        exclude: Problems whose questions must not occur, such as the training set's. Games give
            others instead; a file that has one is refused.

    Raises:
        ConfigError: On an unknown game or parameter, or too few distinct problems.
        InputError: A file cannot be read, or a row cannot be used.
    """
    if not isinstance(config, FileProblems):
        return make_game_problems(config, exclude)
    problems = read_problems(config)
    seen = {problem.question: problem for problem in exclude}
    for problem in problems:
        if problem.question in seen:
            raise InputError(
                f"{where(problem)}: its question is problem {seen[problem.question].problem_id} "
                "of a training set too, so that it measures nothing; give evaluation rows of its "
                "own (`skip` and `size` part one file)"
            )
    return problems


def problems_disjoint_from(
    training: ProblemSetConfig, held_out: ProblemSetConfig, *, exclude: Collection[Problem] = ()
) -> list[Problem]:
    """The problems of `held_out`, none of whose questions occur in `training` or `exclude`."""
    return make_problems(held_out, exclude=[*make_problems(training), *exclude])


def evaluation_problems(config: RunConfig) -> list[Problem]:
    """The evaluation set, without any question of the corpus's or RL's problem sets.

    Raises:
        ConfigError: The games cannot give that many other problems.
        InputError: A file cannot be used, or has a training problem.
    """
    collected = (
        make_problems(config.corpus.problems) if isinstance(config.corpus, SampledCorpus) else []
    )
    return problems_disjoint_from(config.rl.problems, config.evaluate.problems, exclude=collected)


def num_problems(config: ProblemSetConfig) -> int:
    """How many problems the set has; a file without `size` is read for it.

    Raises:
        InputError: The file cannot be used.
    """
    return config.size if config.size is not None else len(make_problems(config))


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The config for a process that works in another folder, such as Ray Train's workers."""
    sections = {
        name: section.model_copy(
            update={
                "problems": section.problems.model_copy(
                    update={"path": str(Path(section.problems.path).expanduser().absolute())}
                )
            }
        )
        for name, section in verified_sections(config).items()
        if isinstance(section.problems, FileProblems)
    }
    moved = config.model_copy(update=sections)
    band = moved.rl.difficulty
    if band is None or not isinstance(band.rates, TableRates):
        return moved
    path = str(Path(band.rates.path).expanduser().absolute())
    band = band.model_copy(update={"rates": band.rates.model_copy(update={"path": path})})
    return moved.model_copy(update={"rl": moved.rl.model_copy(update={"difficulty": band})})


def content_of(config: ProblemSetConfig) -> dict[str, str]:
    """What a fingerprint says of a file's content; nothing for games, which their config is.

    Raises:
        InputError: There is no such file.
    """
    if not isinstance(config, FileProblems):
        return {}
    try:
        with Path(config.path).expanduser().open("rb") as stream:
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
