"""A data set of the game as files: the corpus with its log-probs, and three problem sets."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.embedded.automaton.game import (
    OPERATIONS_OF,
    Game,
    Program,
    draw_programs,
    recited_for,
)
from pear_ray.embedded.automaton.teacher import Solution, Teacher, score, solve, source_of

CORPUS_FILE, SETTINGS_FILE = "corpus.parquet", "settings.json"
PROBLEM_SETS: dict[str, tuple[Game, int]] = {
    "heldout_a": ("A", 80),
    "heldout_b": ("B", 80),
    "train_a": ("A", 512),
}
_CORPUS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("behavior_logprobs", pa.list_(pa.float32()), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A regime of the game.

    Attributes:
        teacher: Who writes the corpus.
        length: Tokens of a completion, end token included.
        rows: Rows of the corpus.
        logprobs: Whose log-probs the corpus holds: the teacher's own, or those of a proxy that
            writes as the teacher does but knows no key (its letters are any of the 16).
        changed: How many of game A's operations do something else than the shipped student has
            learnt: what the corpus has to teach it, and RL cannot easily find out.
        seed: Decides programs and what the teacher writes.
    """

    teacher: Teacher = field(default_factory=Teacher)
    length: int = 67
    rows: int = 512
    logprobs: Literal["teacher", "proxy"] = "teacher"
    changed: int = 0
    seed: int = 1

    def __post_init__(self) -> None:
        """See that there is something to write."""
        if self.rows < 1:
            raise ValueError(f"rows={self.rows}: a corpus has at least one row")
        if not 0 <= self.changed <= len(OPERATIONS_OF["A"]):
            raise ValueError(
                f"changed={self.changed}: game A has {len(OPERATIONS_OF['A'])} operations"
            )


def write_data(folder: Path, settings: Settings) -> None:
    """Write corpus, problem sets and the settings; the same settings give the same bytes.

    Raises:
        ValueError: No completion has that length.
    """
    form = {
        "num_recited": recited_for(settings.length),
        "changed": OPERATIONS_OF["A"][: settings.changed],
    }
    folder.mkdir(parents=True, exist_ok=True)
    used = set[str]()
    for name, (game, count) in PROBLEM_SETS.items():
        rng = Random(f"{settings.seed}/{name}")  # a string, so that it is hashed: no two sets alike
        programs = draw_programs(rng, game, count=count, exclude=used, **form)
        used.update(program.prompt for program in programs)
        lines = [json.dumps(row) + "\n" for row in _problems(name, programs)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    rng = Random(f"{settings.seed}/corpus")
    programs = draw_programs(rng, "A", count=settings.rows, exclude=used, **form)
    rows = [_row(number, program, settings, rng) for number, program in enumerate(programs)]
    pq.write_table(
        pa.Table.from_pylist(rows, schema=_CORPUS), folder / CORPUS_FILE, compression="zstd"
    )
    text = json.dumps(_written(settings), indent=2) + "\n"
    (folder / SETTINGS_FILE).write_text(text, encoding="utf-8")


def _written(settings: Settings) -> dict[str, Any]:
    """Without what came later and says nothing: the shipped files stay as they are."""
    written = asdict(settings)
    for part, key in ((written, "changed"), (written["teacher"], "free")):
        if not part[key]:
            del part[key]
    return written


def _problems(name: str, programs: list[Program]) -> list[dict[str, str]]:
    return [
        {"id": f"{name}-{number:03d}", "prompt": program.prompt, "answer": program.answer}
        for number, program in enumerate(programs)
    ]


def _row(number: int, program: Program, settings: Settings, rng: Random) -> dict[str, Any]:
    solution = solve(program, settings.teacher, rng)
    return {
        "id": f"suffix-{number:04d}",
        "source": source_of(program, solution.symbols),
        "prompt": program.prompt,
        "completion": solution.text,
        "behavior_logprobs": _logprobs(program, solution, settings),
    }


def _logprobs(program: Program, solution: Solution, settings: Settings) -> list[float]:
    if settings.logprobs == "teacher":
        return solution.logprobs
    return score(program, solution.symbols, replace(settings.teacher, distance=0.0))
