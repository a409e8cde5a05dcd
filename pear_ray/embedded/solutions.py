"""Worked solutions of the games, scripted from a game's own record of the problem.

Chain sums come in two styles of equal length. `totals` writes each running total; `letters` is
the same with the letters a to j for the digits 0 to 9. The teacher mixes both and the student has
only ever seen `totals`, so a corpus of the teacher's has rows near to the student and rows far
from it: what importance weights are for.
"""

import re
from random import Random
from typing import Any, Literal

Style = Literal["totals", "letters"]

_TO_LETTERS = str.maketrans("0123456789", "abcdefghij")
_TERM = re.compile(r"([+-]?) ?(\d+)")
_LARGEST_SLIP = 9


def solve(item: dict[str, Any], *, rng: Random, letters_share: float, slip: float) -> str:
    """The completion for a problem of any of the three games.

    Args:
        item: The game's question, answer and metadata.
        rng: Decides style and slips.
        letters_share: Probability that a chain sum is written in letters.
        slip: Probability that one step goes wrong.
    """
    match item["metadata"]["source_dataset"]:
        case "chain_sum":
            style: Style = "letters" if rng.random() < letters_share else "totals"
            return chain_sum(item["metadata"]["expression"], style=style, rng=rng, slip=slip)
        case "spell_backward":
            return spell_backward(item["metadata"]["word"], rng=rng, slip=slip)
        case "letter_counting":
            letter, span = item["metadata"]["target_letter"], item["metadata"]["span"]
            return letter_counting(" ".join(span), letter, rng=rng, slip=slip)
        case name:
            raise ValueError(f"no scripted solution for the game `{name}`; write one here")


def chain_sum(expression: str, *, style: Style, rng: Random, slip: float = 0.0) -> str:
    """`4 - 1 + 7` as `4-1=3 3+7=10 <answer>10</answer>`; a slip is carried on like a true total."""
    (_, first), *rest = _TERM.findall(expression)
    total, steps = int(first), []
    for sign, term in rest:
        result = total + int(sign + term)
        if rng.random() < slip:
            result += rng.choice((-1, 1)) * rng.randint(1, _LARGEST_SLIP)
        steps.append(f"{total}{sign}{term}={result}")
        total = result
    work = " ".join(steps)
    if style == "letters":
        work = work.translate(_TO_LETTERS)
    return f"{work} <answer>{total}</answer>"


def spell_backward(word: str, *, rng: Random, slip: float = 0.0) -> str:
    """`sun` as `s u n: <answer>nus</answer>`; a slip swaps in another letter of the word."""
    letters = [rng.choice(word) if rng.random() < slip else letter for letter in reversed(word)]
    return f"{' '.join(word)}: <answer>{''.join(letters)}</answer>"


def letter_counting(text: str, letter: str, *, rng: Random, slip: float = 0.0) -> str:
    """`banana`, `a` as `b a1 n a2 n a3 <answer>3</answer>`; a slip overlooks a letter."""
    count, steps = 0, []
    for character in text.replace(" ", ""):
        found = character.lower() == letter and rng.random() >= slip
        count += found
        steps.append(f"{character}{count}" if found else character)
    return f"{' '.join(steps)} <answer>{count}</answer>"
