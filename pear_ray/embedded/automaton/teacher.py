"""The scripted teacher: for every text so far the exact distribution of the next symbol.

Both of its styles begin with two plain steps and have one length. F goes on with plain steps, which
the student can write. N goes on in the letters of a cipher whose key is a hash, so that no student
can foretell them, and then gives the answer all the same.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from pear_ray.embedded.automaton.game import (
    NUM_STEPS,
    PLACES,
    STATES,
    STEP_TOKENS,
    Program,
    others_than,
)

CIPHER = "".join(chr(0x3B1 + index) for index in range(16))  # Greek letters from alpha on
ANSWER, ANSWER_ENDS, END = "<answer>", "</answer>", "<|end|>"
SHARED_STEPS = 2
RESULT = 3  # place of the new state in a plain step
PLAIN, CIPHERED = "F", "N"

Distribution = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """How the teacher writes.

    Attributes:
        plain_share: Probability of style F.
        distance: How far N is from what a student can learn: the share of its letters that follow
            the key. The others are any of the 16, and at 0 all are: a student then soon knows
            their distribution exactly.
        slip: Probability that a state is written wrong; what comes after goes on from it.
        free: Probability that a letter of a plain step's recital, but the last, is any other than
            the last. Nothing depends on it: it makes a text unlikely that a student can write.
    """

    plain_share: float = 0.15
    distance: float = 0.98
    slip: float = 0.002
    free: float = 0.0

    def __post_init__(self) -> None:
        """See that all four are probabilities."""
        for name in ("plain_share", "distance", "slip", "free"):
            if not 0 <= (found := getattr(self, name)) <= 1:
                raise ValueError(f"{name}={found} is no probability; give one from 0 to 1")


@dataclass(frozen=True, slots=True)
class Solution:
    """A completion, symbol by symbol.

    Attributes:
        symbols: One per token, the end token last.
        logprobs: The log-prob of each, in nats.
    """

    symbols: list[str]
    logprobs: list[float]

    @property
    def text(self) -> str:
        """The completion without its end token."""
        return "".join(self.symbols[:-1])


def source_of(program: Program, symbols: Sequence[str]) -> str:
    """The style: `F` or `N`."""
    return CIPHERED if symbols[SHARED_STEPS * program.step_width] in CIPHER else PLAIN


def solve(program: Program, teacher: Teacher, rng: Random) -> Solution:
    """A completion sampled from the teacher, with its log-probs."""
    symbols, logprobs = list[str](), list[float]()
    while not symbols or symbols[-1] != END:
        symbol, probability = _sampled(next_symbol(program, symbols, teacher), rng)
        symbols.append(symbol)
        logprobs.append(math.log(probability))
    return Solution(symbols, logprobs)


def score(program: Program, symbols: Sequence[str], teacher: Teacher) -> list[float]:
    """The log-probs that the teacher gives to a completion written by another.

    Raises:
        ValueError: It would never write that.
    """
    logprobs = []
    for place, symbol in enumerate(symbols):
        probability = next_symbol(program, symbols[:place], teacher).get(symbol, 0.0)
        if not probability:
            raise ValueError(f"{program.prompt}: the teacher never writes {symbol!r} at {place}")
        logprobs.append(math.log(probability))
    return logprobs


def next_symbol(program: Program, written: Sequence[str], teacher: Teacher) -> Distribution:
    """The probability of every symbol that may come after `written`; the others have none."""
    place = len(written)
    fork, closing = SHARED_STEPS * program.step_width, NUM_STEPS * program.step_width
    if place >= closing:
        return _closing(program, written, place - closing, teacher)
    if place == fork:
        letters = _letters(program, place, teacher)
        ciphered = {letter: (1 - teacher.plain_share) * p for letter, p in letters.items()}
        return {PLACES[SHARED_STEPS]: teacher.plain_share} | ciphered
    if place > fork and written[fork] in CIPHER:
        return _letters(program, place, teacher)
    return _plain(program, written, teacher)


def _plain(program: Program, written: Sequence[str], teacher: Teacher) -> Distribution:
    step, offset = divmod(len(written), program.step_width)
    state, operation = _reached(program, written, step), program.operations[step]
    if offset == RESULT:
        return _state(program.run(operation, state), teacher)
    if STEP_TOKENS <= offset < program.step_width - 1 and teacher.free:
        follows = program.recital[offset - STEP_TOKENS]
        letters = others_than(program.recital[-1])
        any_letter = teacher.free / len(letters)
        return {each: any_letter + (1 - teacher.free) * (each == follows) for each in letters}
    return {(PLACES[step] + operation + state + " " + program.recital)[offset]: 1.0}


def _reached(program: Program, written: Sequence[str], steps: int) -> str:
    """The state that so many plain steps have reached, as they are written."""
    return written[(steps - 1) * program.step_width + RESULT] if steps else program.start


def _closing(
    program: Program, written: Sequence[str], offset: int, teacher: Teacher
) -> Distribution:
    if offset == 1:
        if written[SHARED_STEPS * program.step_width] in CIPHER:  # worked out where nobody sees it
            reached = _reached(program, written, SHARED_STEPS)
            return _state(program.run(program.operations[SHARED_STEPS:], reached), teacher)
        return _state(_reached(program, written, NUM_STEPS), teacher)
    return {(ANSWER, "", ANSWER_ENDS, END)[offset]: 1.0}


def _state(right: str, teacher: Teacher) -> Distribution:
    slipped = teacher.slip / (len(STATES) - 1)
    return {state: 1 - teacher.slip if state == right else slipped for state in STATES}


def _letters(program: Program, place: int, teacher: Teacher) -> Distribution:
    key = hashlib.blake2b(f"{program.prompt}/{place}".encode(), digest_size=1).digest()[0]
    follows = CIPHER[key % len(CIPHER)]
    others = (1 - teacher.distance) / len(CIPHER)
    return {letter: others + teacher.distance * (letter == follows) for letter in CIPHER}


def _sampled(distribution: Distribution, rng: Random) -> tuple[str, float]:
    left = rng.random() * math.fsum(distribution.values())
    possible = [(symbol, p) for symbol, p in distribution.items() if p > 0]
    for symbol, probability in possible:
        left -= probability
        if left < 0:
            return symbol, probability
    return possible[-1]  # rounding: the sum of all may fall short of what was drawn
