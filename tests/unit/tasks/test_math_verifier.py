r"""Mathematical equality of hand-made cases: fractions, LaTeX, units, sets, no mathematics."""

import json

import pytest

from pear_ray.config.rewards import MathVerifier
from pear_ray.records import Problem, Reward, RewardStatus
from pear_ray.tasks.math_verifier import verify_math

pytest.importorskip("math_verify", reason="extra `math`")


def problem(answer: str | None) -> Problem:
    return Problem("p/1", "p", "?", json.dumps({"answer": answer, "metadata": {}}))


def judged(answer: str | None, completion_text: str, **settings: object) -> Reward:
    config = MathVerifier.model_validate({"kind": "math", **settings})
    return verify_math(config, problem(answer), completion_text)


@pytest.mark.parametrize(
    ("answer", "completion_text"),
    [
        ("1/2", r"so \boxed{0.5}"),
        ("0.5", "<answer>1/2</answer>"),
        (r"\frac{1}{2}", r"it is $\frac{2}{4}$."),
        ("3 1/4", r"\boxed{\frac{13}{4}}"),
        ("\N{VULGAR FRACTION ONE HALF}", r"\boxed{0.5}"),
        ("18", "She makes $18 dollars."),
        ("18 dollars", "<answer>18</answer>"),
        ("5", "<answer>5 apples</answer>"),
        ("5", r"\boxed{5\text{ cm}}"),
        ("1000", "The answer is 1,000"),
        ("0.001", "<answer>1e-3</answer>"),
        ("1e3", r"\boxed{10^3}"),
        ("-3", "<answer>\N{MINUS SIGN}3</answer>"),
        ("3", "<answer>\uff13</answer>"),
        ("50%", r"\boxed{0.5}"),
        ("2x+1", r"\boxed{1+2x}"),
        ("(x+1)^2", r"\boxed{x^2+2x+1}"),
        ("sqrt(2)", r"$\sqrt{2}$"),
        (r"\{1,2\}", r"\boxed{\{2, 1\}}"),
        ("$7$", r"\boxed{7}"),
        ("x=5", r"\boxed{5}"),
        ("5", r"\boxed{4}, no, \boxed{5}"),
        ("5", "  \n\n <answer>\n 5 \n</answer>"),
        ("7", "word " * 20_000 + r"\boxed{7}"),
    ],
)
def test_equal(answer: str, completion_text: str) -> None:
    assert judged(answer, completion_text).status is RewardStatus.OK


@pytest.mark.parametrize(
    ("answer", "completion_text"),
    [
        ("1/2", r"\boxed{0.49}"),
        ("2x+1", r"\boxed{2}"),  # what math-verify reads of an answer that is not marked
        ("2^{100000}", r"\boxed{2}"),
        ("3 1/4", r"\boxed{1}"),
        ("5", r"\boxed{5}, no, \boxed{4}"),
        ("5", "<answer>4</answer>"),
        (r"\{1,2\}", r"\boxed{\{1\}}"),
        ("5", ""),
        ("5", "  \n"),
        ("5", "no idea"),
        ("5", r"\boxed{\frac{1}{"),
        ("5", r"\boxed{}"),
        ("5", "<answer></answer>"),
        ("2", "9" * 50_000),
        ("5", "\N{PILE OF POO}" * 1000),
    ],
)
def test_not_equal(answer: str, completion_text: str) -> None:
    assert judged(answer, completion_text).status is RewardStatus.FAILED


def test_places() -> None:
    assert judged("3.14159", r"\boxed{3.14160}", float_digits=4).status is RewardStatus.OK
    assert judged("3.14159", r"\boxed{3.14160}").status is RewardStatus.FAILED


@pytest.mark.parametrize("answer", [None, r"\frac{"])
def test_an_answer_of_the_problem_that_cannot_be_read_is_no_verdict(answer: str | None) -> None:
    with pytest.raises(ValueError, match="answer"):
        judged(answer, r"\boxed{5}")


def test_equal_answers_vote_alike() -> None:
    """However they are written; unequal ones do not, and what is no mathematics has no vote."""
    half = [r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", "<answer>2/4</answer>", "so 1/2"]
    assert {judged("7", text).answer for text in half} == {"0.500000"}
    assert judged("0.5", half[0]).answer == "0.500000"  # right or wrong
    assert judged("7", r"\boxed{x+1}").answer == judged("7", r"\boxed{1+x}").answer == "x + 1"
    assert judged("7", r"\boxed{0.501}").answer == "0.501000"
    assert judged("7", "no idea").answer is None
