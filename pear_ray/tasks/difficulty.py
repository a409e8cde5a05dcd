"""RL's training problems: all of a set, or those whose stored pass rate lies in a band."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pear_ray.config.rl import RlConfig
from pear_ray.config.rl_sampling import ColumnRates, DifficultyConfig, TableRates
from pear_ray.errors import InputError
from pear_ray.records import Problem, RewardStatus
from pear_ray.tasks.entries import metadata_of
from pear_ray.tasks.problem_sets import make_problems, where

_KEY = "rl.difficulty"
_WHOSE = ("source", "checkpoint")  # columns that tell one model's rates from another's


@dataclass(frozen=True, slots=True)
class Band:
    """Problems by their place in the band of pass rates, each in its old order."""

    kept: list[Problem]
    num_below: int
    num_above: int
    num_unrated: int


def training_problems(config: RlConfig) -> list[Problem]:
    """What RL trains on, in a fixed order.

    Raises:
        ConfigError: As `make_problems`.
        InputError: A file cannot be used, problems have no pass rate, or none is in the band.
    """
    problems = make_problems(config.problems)
    return problems if config.difficulty is None else _band(problems, config.difficulty).kept


def describe_band(config: RlConfig) -> str:
    """How many problems a band leaves, in words; nothing where there is no band.

    Raises:
        InputError: As `training_problems`.
    """
    if config.difficulty is None:
        return ""
    band = _band(make_problems(config.problems), config.difficulty)
    total = len(band.kept) + band.num_below + band.num_above
    if config.difficulty.unrated == "drop":
        total += band.num_unrated
    unrated = f", {band.num_unrated} unrated" if band.num_unrated else ""
    return (
        f"{len(band.kept)} of {total} problems kept, with pass rates from "
        f"{config.difficulty.low:g} to {config.difficulty.high:g} ({band.num_below} below, "
        f"{band.num_above} above{unrated})"
    )


def rates_content(config: RlConfig) -> dict[str, str]:
    """What a fingerprint says of a table of pass rates.

    Raises:
        InputError: There is none.
    """
    if config.difficulty is None or not isinstance(config.difficulty.rates, TableRates):
        return {}
    digest = hashlib.sha256()
    for file in _files(config.difficulty.rates):
        digest.update(file.read_bytes())
    return {"pass_rates": digest.hexdigest()[:20]}


def _band(problems: Sequence[Problem], settings: DifficultyConfig) -> Band:
    if isinstance(settings.rates, ColumnRates):
        rates = [_own_rate(problem, settings.rates.column) for problem in problems]
    else:
        table = _table_rates(settings.rates)
        rates = [table.get(problem.problem_id) for problem in problems]
    unrated = [each for each, rate in zip(problems, rates, strict=True) if rate is None]
    if unrated and settings.unrated == "refuse":
        raise InputError(
            f"{_KEY}: no pass rate for {len(unrated)} of {len(problems)} problems, the first "
            f"{where(unrated[0])}; {_where_from(settings)}, or set {_KEY}.unrated to drop or keep"
        )
    known = [rate for rate in rates if rate is not None]
    kept = [
        problem
        for problem, rate in zip(problems, rates, strict=True)
        if (settings.unrated == "keep" if rate is None else settings.low <= rate <= settings.high)
    ]
    band = Band(
        kept,
        num_below=sum(rate < settings.low for rate in known),
        num_above=sum(rate > settings.high for rate in known),
        num_unrated=len(unrated),
    )
    if not kept:
        found = f"from {min(known):g} to {max(known):g}" if known else "none"
        raise InputError(
            f"{_KEY}: of {len(problems)} problems none has a pass rate from {settings.low:g} to "
            f"{settings.high:g} ({band.num_below} below, {band.num_above} above, "
            f"{band.num_unrated} unrated; rates are {found}); widen low and high, or give other "
            "problems"
        )
    return band


def _where_from(settings: DifficultyConfig) -> str:
    rates = settings.rates
    if isinstance(rates, ColumnRates):
        return f"give each row a number in `{rates.column}`, or set {_KEY}.rates.column"
    return (
        f"{rates.path} has rates of {len(_table_rates(rates))} problems; measure these with it as "
        "well (ids must be the same)"
    )


def _own_rate(problem: Problem, column: str) -> float | None:
    found = metadata_of(problem).get(column)
    if found is None:
        return None
    return _checked(found, f"{where(problem)}: {column}")


def _checked(found: Any, at: str) -> float:
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    if not is_number or not 0 <= found <= 1:
        raise InputError(f"{at}: expected a pass rate from 0 to 1, got {found!r:.60}")
    return float(found)


def _files(rates: TableRates) -> list[Path]:
    path = Path(rates.path).expanduser()
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise InputError(
            f"{_KEY}.rates.path={rates.path}: no Parquet file there; give a run's "
            "collect/pass_rates.parquet or evaluate/samples.parquet"
        )
    return files


def _table_rates(rates: TableRates) -> dict[str, float]:
    """Pass rate by problem id; problems without a verdict are left out."""
    rows = _rows_of(rates, _read(rates))
    if not rows or "pass_rate" in rows[0]:
        found = ((row["problem_id"], row["pass_rate"]) for row in rows)
        return {
            problem: _checked(rate, f"{rates.path}: pass_rate of {problem}")
            for problem, rate in found
            if rate is not None
        }
    outcomes: dict[str, list[bool]] = {}
    for row in rows:
        if row["reward_status"] != RewardStatus.ERRORED:
            outcomes.setdefault(row["problem_id"], []).append(
                row["reward_status"] == RewardStatus.OK
            )
    return {problem: sum(each) / len(each) for problem, each in outcomes.items()}


def _read(rates: TableRates) -> list[dict[str, Any]]:
    import pyarrow as pa  # noqa: PLC0415 - most runs have no table of rates
    import pyarrow.parquet as pq  # noqa: PLC0415

    rows: list[dict[str, Any]] = []
    for file in _files(rates):
        try:
            names = pq.read_schema(file).names
            value = next((each for each in ("pass_rate", "reward_status") if each in names), None)
            if "problem_id" not in names or value is None:
                raise InputError(
                    f"{file}: has the columns {', '.join(names)}; wanted problem_id and either "
                    "pass_rate or reward_status"
                )
            columns = ["problem_id", value, *(each for each in _WHOSE if each in names)]
            rows += pq.read_table(file, columns=columns).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            said = str(error).splitlines()[0]
            raise InputError(f"{file}: is no Parquet file of pass rates ({said})") from error
    return rows


def _rows_of(rates: TableRates, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the model whose rates are asked for."""
    whose = next((each for each in _WHOSE if rows and each in rows[0]), None)
    there = _distinct(row[whose] for row in rows) if whose else []
    if rates.source is None and len(there) > 1:
        raise InputError(
            f"{rates.path}: has pass rates of {', '.join(there)}; set {_KEY}.rates.source to one"
        )
    if rates.source is not None and rates.source not in there:
        raise InputError(
            f"{_KEY}.rates.source={rates.source}: {rates.path} has "
            f"{', '.join(there) or 'no column source or checkpoint'}"
        )
    return [row for row in rows if whose is None or rates.source in (None, row[whose])]


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
