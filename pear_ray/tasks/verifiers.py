"""From a completion to a three-state reward: a game's own rule, equal text, a pattern."""

import math
import re
import unicodedata
from collections.abc import Callable

from pear_ray.config.rewards import ExactVerifier, RegexVerifier
from pear_ray.records import Problem, Reward, RewardStatus
from pear_ray.tasks.entries import answer_of, game_and_item

Verifier = Callable[[Problem, str], Reward]

NO_ANSWER = "no answer"

# Innermost pairs only, so that a stray open tag earlier in the text does not swallow the answer.
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_BOX = "\\boxed{"
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:[eE][-+]?\d+)?")


def extract_answer(completion_text: str) -> str | None:
    """What stands between the last `<answer>` and `</answer>`, stripped; None without a pair."""
    answers = _ANSWER.findall(completion_text)
    return answers[-1].strip() if answers else None


def extract_boxed(completion_text: str) -> str | None:
    r"""What the last complete `\boxed{...}` holds, braces within it balanced; None without one."""
    opened: list[int] = []
    last, content = -1, None
    for place in (match.start() for match in re.finditer(r"[{}]", completion_text)):
        if completion_text[place] == "{":
            opened.append(place)
        elif opened:
            begin = opened.pop()
            if begin > last and completion_text.endswith(_BOX, 0, begin + 1):
                last, content = begin, completion_text[begin + 1 : place].strip()
    return content


def verify(problem: Problem, completion_text: str) -> Reward:
    """1.0 and OK when the game scores the answer as exactly right, else 0.0 and FAILED.

    The reward is the task's outcome and is not shaped: partial credit only shows in `detail`.
    Whatever the game's verifier raises passes through; the reward pool reports it as ERRORED.
    """
    answer = extract_answer(completion_text)
    if answer is None:
        return failed(NO_ANSWER)
    dataset, item = game_and_item(problem.task, problem.entry)
    score = float(dataset.score_answer(answer, item))
    if not math.isfinite(score):
        raise ValueError(f"{problem.problem_id}: the game's score is {score}, not a finite number")
    vote = " ".join(answer.split())
    if score == 1.0:
        return right(vote)
    return failed(f"partial score {score:.3g}" if score > 0 else "", answer=vote)


def verify_exact(config: ExactVerifier, problem: Problem, completion_text: str) -> Reward:
    """OK where the extracted answer is the problem's, as a number or as normalised text.

    Raises:
        ValueError: The problem has no answer.
    """
    answer = _extracted(config.extract, completion_text)
    if answer is None:
        return failed(NO_ANSWER)
    wanted = required_answer(problem)
    if config.numbers and (number := as_number(wanted)) is not None:
        same = as_number(answer) == number
    else:
        same = _normalised(config, answer) == _normalised(config, wanted)
    found = as_number(answer) if config.numbers else None
    vote = _normalised(config, answer) if found is None else repr(found)
    return right(vote) if same else failed(answer=vote)


def verify_regex(config: RegexVerifier, problem: Problem, completion_text: str) -> Reward:
    """OK where the pattern's last match has the problem's answer, or where it matches at all.

    Raises:
        ValueError: The problem has no answer, and one is compared with.
    """
    match = None
    for match in re.finditer(config.pattern, completion_text):  # noqa: B007 - the last is wanted
        if config.compare == "match":
            return Reward(RewardStatus.OK, 1.0)
    if match is None:
        return failed("no match")
    found = (match.group(config.group) or "").strip()
    wanted = required_answer(problem).strip()
    if config.ignore_case:
        found, wanted = found.casefold(), wanted.casefold()
    return right(found) if found == wanted else failed(answer=found or None)


def right(answer: str | None) -> Reward:
    """A verdict of right, worth 1, for what was extracted."""
    return Reward(RewardStatus.OK, 1.0, answer=answer)


def failed(detail: str = "", *, answer: str | None = None) -> Reward:
    """A verdict of wrong, worth nothing, for what was extracted."""
    return Reward(RewardStatus.FAILED, 0.0, detail, answer=answer)


def required_answer(problem: Problem) -> str:
    """The problem's answer.

    Raises:
        ValueError: It has none; a verifier cannot say that a completion is wrong.
    """
    answer = answer_of(problem)
    if answer is None:
        raise ValueError(f"problem {problem.problem_id} has no answer to compare with")
    return answer


def as_number(text: str) -> float | None:
    """The number that all of `text` spells, thousands parted by commas or not; else None."""
    plain = unicodedata.normalize("NFKC", text).strip().replace("\N{MINUS SIGN}", "-")
    if not any(character.isdigit() for character in plain) or not _NUMBER.fullmatch(plain):
        return None
    return float(plain.replace(",", ""))


def _extracted(how: str, completion_text: str) -> str | None:
    if how == "answer_tag":
        return extract_answer(completion_text)
    if how == "boxed":
        return extract_boxed(completion_text)
    if how == "all":
        return completion_text.strip() or None
    lines = [line.strip() for line in completion_text.splitlines() if line.strip()]
    return lines[-1] if lines else None


def _normalised(config: ExactVerifier, text: str) -> str:
    text = unicodedata.normalize("NFKC", text).strip()  # one spelling of é, full-width digits, ...
    if config.ignore_case:
        text = text.casefold()
    if config.ignore_punctuation:
        text = "".join(one for one in text if one.isalnum() or one.isspace())
    return " ".join(text.split()) if config.ignore_space else text
