"""The automaton: 16 states, operations that permute them, and programs to be run in the head."""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from random import Random
from typing import Literal

STATES = "abcdefghijklmnop"
OPERATIONS = "qrstuvwxyz"
PLACES = "1234567"
RECITAL = "CDEFGHIJKLMNOPQRSTUVWXYZ"
"""What a plain step recites at its end; how far decides how long completions are."""
NUM_STEPS = len(PLACES)
CLOSING_TOKENS = 4  # <answer>, the state, </answer> and the end token
STEP_TOKENS = 4  # place, operation, state and result; then comes the recital
MIN_RECITAL, MAX_RECITAL = 4, len(RECITAL)

Game = Literal["A", "B"]
OPERATIONS_OF: dict[Game, str] = {"A": OPERATIONS[:8], "B": OPERATIONS[2:]}
"""Game B is the shifted one: two of its eight operations never occur in A."""


def _permutation(operation: str) -> str:
    """Where the operation takes each state; by a hash, so that no library's shuffle matters."""

    def rank(state: str) -> bytes:
        return hashlib.blake2b(f"{operation}{state}".encode()).digest()

    return "".join(sorted(STATES, key=rank))


PERMUTATIONS = {operation: _permutation(operation) for operation in OPERATIONS}
CHANGED = {operation: _permutation(f"{operation}'") for operation in OPERATIONS}
"""What an operation does in a regime in which the student has learnt something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One problem.

    Attributes:
        game: Which operations it is drawn from.
        start: The state it begins in.
        operations: `NUM_STEPS` of them.
        num_recited: Letters that each plain step recites.
        changed: Operations that do something else than the shipped student has learnt.
    """

    game: Game
    start: str
    operations: str
    num_recited: int
    changed: str = ""

    @property
    def prompt(self) -> str:
        """`AGcq1t2x3q4v5r6s7`: game, last letter of the recital, state, numbered operations."""
        numbered = "".join(map("".join, zip(self.operations, PLACES, strict=True)))
        return f"{self.game}{self.recital[-1]}{self.start}{numbered}"

    @property
    def recital(self) -> str:
        """What each plain step recites."""
        return RECITAL[: self.num_recited]

    @property
    def step_width(self) -> int:
        """Tokens of one plain step."""
        return STEP_TOKENS + self.num_recited

    @property
    def answer(self) -> str:
        """The state that it ends in."""
        return self.run(self.operations, self.start)

    def run(self, operations: str, state: str) -> str:
        """The state after all `operations`."""
        for operation in operations:
            table = CHANGED if operation in self.changed else PERMUTATIONS
            state = table[operation][STATES.index(state)]
        return state


def completion_tokens(num_recited: int) -> int:
    """Length of a completion of either style, its end token included."""
    return NUM_STEPS * (STEP_TOKENS + num_recited) + CLOSING_TOKENS


def recited_for(length: int) -> int:
    """Letters to recite for completions of `length` tokens, or as near to it as steps allow.

    Raises:
        ValueError: No recital is that short or that long.
    """
    shortest, longest = completion_tokens(MIN_RECITAL), completion_tokens(MAX_RECITAL)
    if not shortest <= length <= longest:
        raise ValueError(
            f"a completion has {shortest} to {longest} tokens, not {length}; choose one of those"
        )
    return round((length - CLOSING_TOKENS) / NUM_STEPS) - STEP_TOKENS


def others_than(last: str) -> str:
    """The letters that a free recital is made of, which ends with `last`."""
    return RECITAL.replace(last, "")


def draw_programs(
    rng: Random,
    game: Game,
    *,
    count: int,
    num_recited: int,
    changed: str = "",
    exclude: Collection[str] = (),
) -> list[Program]:
    """Distinct random programs, none of whose prompts are in `exclude`."""
    known, programs = set(exclude), list[Program]()
    while len(programs) < count:
        program = Program(
            game=game,
            start=draw(rng, STATES),
            operations="".join(draw(rng, OPERATIONS_OF[game]) for _ in range(NUM_STEPS)),
            num_recited=num_recited,
            changed=changed,
        )
        if program.prompt not in known:
            known.add(program.prompt)
            programs.append(program)
    return programs


def draw(rng: Random, symbols: str) -> str:
    """One of `symbols`; of `rng` only `random()` is used, which Python keeps the same for ever."""
    return symbols[int(rng.random() * len(symbols))]
