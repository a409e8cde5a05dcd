"""Exact, regex and function verdicts, each worked out by hand."""

import json

import pytest

from pear_ray.config.rewards import ExactVerifier, FunctionVerifier, RegexVerifier
from pear_ray.errors import ConfigError
from pear_ray.records import Problem, RewardStatus
from pear_ray.tasks.function_verifier import load_function, verify_function
from pear_ray.tasks.verifiers import as_number, extract_boxed, verify_exact, verify_regex


def problem(answer: str | None) -> Problem:
    entry = {"file": "p.jsonl", "row": 1, "answer": answer, "metadata": {}}
    return Problem("p/1", "p", "?", json.dumps(entry))


def is_exact(answer: str, completion_text: str, **settings: object) -> bool:
    config = ExactVerifier.model_validate({"kind": "exact", **settings})
    reward = verify_exact(config, problem(answer), completion_text)
    assert reward.value == (reward.status is RewardStatus.OK)
    return reward.status is RewardStatus.OK


@pytest.mark.parametrize(
    ("answer", "completion_text", "same"),
    [
        ("Paris", "<answer> paris\n</answer>", True),
        ("New  York", "<answer>new\nyork</answer>", True),
        ("Paris", "Paris", False),  # outside of the tags
        ("Paris", "", False),
        ("Paris", "<answer>Paris.</answer>", False),
        ("1000", "<answer>1,000.0</answer>", True),
        ("1000", "<answer>1e3</answer>", True),
        ("1000", "<answer>1000 dollars</answer>", False),
        ("0.5", "<answer>1/2</answer>", False),  # a fraction is for `math`
        ("-3", "<answer>\N{MINUS SIGN}3</answer>", True),
        ("12", "<answer>\uff11\uff12</answer>", True),  # full-width digits
        ("caf\u00e9", "<answer>cafe\u0301</answer>", True),  # composed and decomposed
        ("stra\u00dfe", "<answer>STRASSE</answer>", True),
        ("5", "<answer>4</answer> no, <answer>5</answer>", True),
        ("5", "<answer>5</answer> no, <answer>4</answer>", False),
        ("5", "x" * 1_000_000 + "<answer>5</answer>", True),
    ],
)
def test_exact(answer: str, completion_text: str, *, same: bool) -> None:
    assert is_exact(answer, completion_text) is same


@pytest.mark.parametrize(
    ("settings", "answer", "completion_text", "same"),
    [
        ({"ignore_case": False}, "Paris", "<answer>paris</answer>", False),
        ({"ignore_space": False}, "a b", "<answer>a  b</answer>", False),
        ({"ignore_punctuation": True}, "U.S.A.", "<answer>(USA)!</answer>", True),
        ({"numbers": False}, "1000", "<answer>1,000</answer>", False),
        ({"extract": "boxed"}, "{1}", r"\boxed{{1}} \boxed{open", True),
        ({"extract": "boxed"}, "2", r"\boxed{1}, then \boxed{2}", True),
        ({"extract": "last_line"}, "42", "so\n 42 \n\n", True),
        ({"extract": "last_line"}, "42", " \n", False),
        ({"extract": "all"}, "yes", " Yes\n", True),
        ({"extract": "all"}, "yes", "Yes, it is", False),
    ],
)
def test_exact_by_its_settings(
    settings: dict[str, object], answer: str, completion_text: str, *, same: bool
) -> None:
    assert is_exact(answer, completion_text, **settings) is same


def test_what_a_box_holds() -> None:
    assert extract_boxed(r"a \boxed{\frac{1}{2}} b") == r"\frac{1}{2}"
    assert extract_boxed(r"\boxed{\boxed{5}}") == "5"
    assert extract_boxed(r"} \boxed{5} {") == "5"
    assert extract_boxed(r"\boxed{5") is None
    assert extract_boxed("\\boxed{" * 100_000) is None


def test_numbers() -> None:
    spelt = ["7", "-7.50", "+1,234,567", ".5", "5.", "1e-3", "12,34", "", ".", "1 2", "x", "nan"]
    assert [as_number(text) for text in spelt] == [
        *(7.0, -7.5, 1234567.0, 0.5, 5.0, 0.001),
        *[None] * 6,
    ]


def is_match(answer: str | None, completion_text: str, **settings: object) -> bool:
    config = RegexVerifier.model_validate({"kind": "regex", **settings})
    return verify_regex(config, problem(answer), completion_text).status is RewardStatus.OK


@pytest.mark.parametrize(
    ("completion_text", "same"),
    [
        ("3 + 4 = 7\n#### 7", True),
        ("#### 8\n#### 7", True),
        ("#### 7\n#### 8", False),
        ("####7", True),
        ("7", False),
        ("#### ", False),
        ("", False),
    ],
)
def test_a_group_is_the_answer(completion_text: str, *, same: bool) -> None:
    assert is_match("7", completion_text, pattern=r"####[ ]*(\S+)") is same


def test_named_groups_case_and_a_group_that_did_not_take_part() -> None:
    pattern = r"(?i)answer: (?P<letter>[a-d])?"
    assert is_match("B", "Answer: b", pattern=pattern, group="letter")
    assert not is_match("B", "Answer: b", pattern=pattern, group="letter", ignore_case=False)
    assert not is_match("B", "Answer: ", pattern=pattern, group="letter")


def test_a_format_term_wants_no_answer() -> None:
    form = {"pattern": r"(?s)^<think>.*</think>", "compare": "match"}
    assert is_match(None, "<think>a\nb</think> 5", **form)
    assert not is_match(None, "5 <think>a</think>", **form)


def test_a_missing_answer_is_an_error_and_not_wrong() -> None:
    with pytest.raises(ValueError, match="problem p/1 has no answer"):
        is_match(None, "#### 7", pattern=r"#### (\d)")
    with pytest.raises(ValueError, match="problem p/1 has no answer"):
        verify_exact(ExactVerifier(kind="exact"), problem(None), "<answer>7</answer>")


def said(*, value: object, **settings: object) -> tuple[str, float, str]:
    config = FunctionVerifier(kind="function", function="m:f", **settings)
    reward = verify_function(config, lambda _problem, _text: value, problem("7"), "text")
    return str(reward.status), reward.value, reward.detail


def test_what_a_function_may_return() -> None:
    assert said(value=True) == ("ok", 1.0, "")
    assert said(value=False) == ("failed", 0.0, "")
    assert said(value=1) == ("ok", 1.0, "")
    assert said(value=0.7) == ("failed", 0.7, "")
    assert said(value=0.7, correct_at=0.5) == ("ok", 0.7, "")
    assert said(value={"value": 0.2, "correct": True, "detail": "so"}) == ("ok", 0.2, "so")


@pytest.mark.parametrize(
    ("value", "error", "why"),
    [
        (None, TypeError, "m:f returned None; it must return a float, a bool or a dict"),
        ("1.0", TypeError, "m:f returned '1.0'"),
        (float("nan"), ValueError, "m:f returned nan; it must be a finite number"),
        ({"correct": True}, TypeError, "a dict with correct; it must have `value`"),
        ({"value": 1, "reward": 2}, TypeError, "a dict with value, reward"),
    ],
)
def test_what_it_may_not(value: object, error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        said(value=value)


def test_loading_a_function() -> None:
    assert load_function("json:dumps") is json.dumps
    for spec, why in [
        ("no_such_module:verify", "cannot be loaded: ModuleNotFoundError"),
        ("math:no_such", "cannot be loaded: AttributeError"),
        ("math:pi", "is a float; name a function"),
    ]:
        with pytest.raises(ConfigError, match=why):
            load_function(spec)
