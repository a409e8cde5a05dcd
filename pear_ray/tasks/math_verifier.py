"""Mathematical equality by math-verify, without its own timeouts: the reward pool has the clock."""

import functools
import re
import unicodedata
from typing import Any

from pear_ray.config.rewards import MathVerifier
from pear_ray.records import Problem, Reward
from pear_ray.tasks.verifiers import (
    NO_ANSWER,
    extract_answer,
    extract_boxed,
    failed,
    required_answer,
    right,
)

_LATEX_MARKS = ("$", "\\(", "\\[", "\\boxed")
_SIGNS = str.maketrans(
    {"\N{MINUS SIGN}": "-", "\N{FRACTION SLASH}": "/", "\N{MULTIPLICATION SIGN}": "*"}
)
_SCIENTIFIC = re.compile(r"([-+]?\d+(?:\.\d*)?)[eE]([-+]?\d+)")
_MIXED = re.compile(r"([-+]?\d+)\s+(\d+)\s*/\s*(\d+)")
_WITH_UNIT = re.compile(r"([-+]?[\d.,/]+)\s*([A-Za-z][A-Za-z ]+)")


def verify_math(config: MathVerifier, problem: Problem, completion_text: str) -> Reward:
    r"""OK where the completion's last answer equals the problem's, as numbers, sets or formulas.

    The answer is what the last `\boxed{}` holds, else the last `<answer>` pair, else the last
    expression of the text. One that cannot be read as mathematics is wrong: the policy wrote it.

    Raises:
        ValueError: The problem's own answer cannot be read.
        Exception: What sympy raises in comparing; it is no verdict.
    """
    import math_verify  # noqa: PLC0415 - the extra `math`; the worker has loaded it

    gold = _gold(required_answer(problem))
    answer = extract_boxed(completion_text)
    if answer is None:
        answer = extract_answer(completion_text)
    text = _latex(answer) if answer is not None else _plain(completion_text)
    found = math_verify.parse(text, parsing_timeout=None)
    if not found:
        return failed("no answer that can be read" if completion_text.strip() else NO_ANSWER)
    same = math_verify.verify(
        list(gold),
        found,
        float_rounding=config.float_digits,
        timeout_seconds=None,
        raise_on_error=True,
    )
    vote = _normal_form(found[0], digits=config.float_digits)
    return right(vote) if same else failed(answer=vote)


def _normal_form(expression: Any, *, digits: int) -> str:
    """What equal answers share: a number's decimals, else the expression as sympy writes it."""
    if getattr(expression, "is_real", None) and getattr(expression, "is_number", False):
        try:
            return f"{float(expression):.{digits}f}"
        except (OverflowError, TypeError):  # too large for a float, or of no value
            pass
    return str(expression)


@functools.lru_cache(maxsize=4096)
def _gold(answer: str) -> tuple[Any, ...]:
    import math_verify  # noqa: PLC0415

    parsed = math_verify.parse(
        _latex(answer), fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True
    )
    if not parsed:
        raise ValueError(f"the problem's answer {answer!r} cannot be read as mathematics")
    return tuple(parsed)


def _latex(answer: str) -> str:
    """An answer marked as the one expression it is.

    Unmarked, math-verify looks for a number in it, and finds 2 in `2x+1`.
    """
    text = _plain(answer).strip()
    if any(mark in text for mark in _LATEX_MARKS):
        return text
    # As LaTeX these three would be a product with e, an unlike fraction, a product of letters.
    if match := _SCIENTIFIC.fullmatch(text):
        text = f"{match[1]} \\cdot 10^{{{int(match[2])}}}"
    elif match := _MIXED.fullmatch(text):
        text = f"{match[1]}\\frac{{{match[2]}}}{{{match[3]}}}"
    elif match := _WITH_UNIT.fullmatch(text):
        text = f"{match[1]}\\text{{ {match[2]}}}"
    return f"\\boxed{{{text}}}"


def _plain(text: str) -> str:
    """`text` with full-width digits, `½` and the minus sign as LaTeX would have them."""
    return unicodedata.normalize("NFKC", text).translate(_SIGNS)
