"""Problem sets from reasoning-gym games: the same config always makes the same problems."""

import dataclasses
import difflib
import functools
import hashlib
import json
import warnings
from collections.abc import Collection, Iterator
from typing import Any

from pear_ray.config.problems import GameConfig, GameProblems
from pear_ray.errors import ConfigError
from pear_ray.records import Problem

DRAWS_PER_SEED = 20_000
"""Draws before a game is seeded anew; some games refuse a larger virtual size (word_ladder)."""
MAX_REPEATS_IN_A_ROW = 1_000
"""Consecutive repeated questions after which a game counts as exhausted."""
RESERVED_PARAMS = ("seed", "size")


def make_game_problems(config: GameProblems, exclude: Collection[Problem] = ()) -> list[Problem]:
    """Distinct problems in a fixed order, the games interleaved by their shares.

    A larger `size` only appends: the first problems stay the same, ids included.

    Args:
        config: Games, shares, size and seed.
        exclude: Problems whose questions must not occur, such as the training set's.

    Returns:
        `config.size` problems with ids `game/seed/index`, the index counting over the whole set.

    Raises:
        ConfigError: On an unknown game or parameter, or too few distinct problems.
    """
    seen = {problem.question for problem in exclude}
    draws = [_draw_distinct(game, seed=config.seed, seen=seen) for game in config.games]
    problems: list[Problem] = []
    counts = [0] * len(config.games)
    for index, turn in enumerate(_turns(config)):
        game = config.games[turn]
        drawn = next(draws[turn], None)
        if drawn is None:
            wanted = counts[turn] + _turns(config)[index:].count(turn)
            raise ConfigError(
                f"game `{game.name}` with params {json.dumps(game.params)} has only "
                f"{counts[turn]} distinct problems{' not excluded' if exclude else ''}, and "
                f"{wanted} are wanted; lower `size` or this game's `share`, or widen its params"
            )
        question, entry = drawn
        counts[turn] += 1
        problem_id = f"{game.name}/{config.seed}/{index}"
        problems.append(Problem(problem_id, game.name, question, entry))
    return problems


def _turns(config: GameProblems) -> list[int]:
    """Which game each position of the set takes: always the one furthest behind its share."""
    total = sum(game.share for game in config.games)
    counts = [0] * len(config.games)
    turns = []
    for position in range(1, config.size + 1):
        behind = [
            position * game.share / total - count
            for game, count in zip(config.games, counts, strict=True)
        ]
        turn = max(range(len(behind)), key=behind.__getitem__)
        counts[turn] += 1
        turns.append(turn)
    return turns


def _draw_distinct(game: GameConfig, *, seed: int, seen: set[str]) -> Iterator[tuple[str, str]]:
    """Question and entry of each new problem; ends when the game only repeats itself."""
    params = json.dumps(game.params, sort_keys=True)
    draw, repeats = 0, 0
    while repeats < MAX_REPEATS_IN_A_ROW:
        gym_seed = _gym_seed(game.name, seed=seed, cycle=draw // DRAWS_PER_SEED)
        index = draw % DRAWS_PER_SEED
        dataset = open_game(game.name, params, gym_seed)
        try:
            item = dataset[index]
        except IndexError:
            return
        except (ValueError, TypeError, KeyError, AssertionError, RuntimeError) as error:
            raise _params_error(game.name, game.params, error) from error
        draw += 1
        if item["question"] in seen:
            repeats += 1
            continue
        repeats = 0
        seen.add(item["question"])
        yield (
            item["question"],
            _entry_json(dataset, item, params=params, gym_seed=gym_seed, index=index),
        )


def _gym_seed(name: str, *, seed: int, cycle: int) -> int:
    """A seed far from every other: reasoning-gym adds the index to it, so 1 and 2 would overlap."""
    digest = hashlib.sha256(f"{name}/{seed}/{cycle}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


def _entry_json(
    dataset: Any,
    item: dict[str, Any],
    *,
    params: str,
    gym_seed: int,
    index: int,
) -> str:
    """The verifier's record; `item` is null where JSON would change what the game sees."""
    plain = {key: item[key] for key in ("question", "answer", "metadata")}
    try:
        copy = json.loads(json.dumps(plain))
        survives = (
            isinstance(copy["answer"], str) and dataset.score_answer(copy["answer"], copy) == 1.0
        )
    except (TypeError, ValueError, KeyError, AttributeError, IndexError):
        survives = False
    return json.dumps(
        {
            "params": json.loads(params),
            "seed": gym_seed,
            "index": index,
            "item": plain if survives else None,
        }
    )


@functools.lru_cache(maxsize=64)
def open_game(name: str, params: str, gym_seed: int) -> Any:
    """The reasoning-gym dataset of a game; `params` is JSON so that it can be a cache key.

    Raises:
        ConfigError: On an unknown game, an unknown parameter or a value that the game refuses.
    """
    datasets = _gym_datasets()
    if name not in datasets:
        raise ConfigError(
            f"problems.games has the unknown game `{name}`{_did_you_mean(name, datasets)}; "
            f"reasoning-gym has {len(datasets)} games, listed in its gallery"
        )
    fields = [
        f.name for f in dataclasses.fields(datasets[name][1]) if f.name not in RESERVED_PARAMS
    ]
    given = json.loads(params)
    for key in given:
        if key in RESERVED_PARAMS:
            raise ConfigError(
                f"game `{name}` is given params.{key}, which the problem set decides; "
                f"remove it and set the problem set's own `{key}`"
            )
        if key not in fields:
            raise ConfigError(
                f"game `{name}` has no parameter `{key}`{_did_you_mean(key, fields)}; "
                f"it has {', '.join(sorted(fields))}"
            )
    dataset_type, config_type = datasets[name]
    try:
        return dataset_type(config=config_type(**given, seed=gym_seed, size=DRAWS_PER_SEED))
    except (AssertionError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise _params_error(name, given, error) from error


def _gym_datasets() -> dict[str, tuple[Any, Any]]:
    """Every game, by name. The import takes seconds, so only what makes or checks problems pays."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its dependencies compile with SyntaxWarnings
        import reasoning_gym.factory  # noqa: PLC0415
    return reasoning_gym.factory.DATASETS


def _params_error(name: str, params: dict[str, Any], error: Exception) -> ConfigError:
    said = str(error) or type(error).__name__
    blamed = [key for key in params if key in said] or list(params)
    shown = ", ".join(f"params.{key}={json.dumps(params[key])}" for key in blamed) or "its defaults"
    return ConfigError(
        f"game `{name}` refuses {shown}: reasoning-gym says: {said}; change that value"
    )


def _did_you_mean(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean `{close[0]}`?" if close else ""
