"""What a report says in words. It never claims more than the intervals carry."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pear_ray.config.evaluate import CHECKPOINTS
from pear_ray.reporting.load import Estimate, Evaluation
from pear_ray.reporting.paired import Counts, difference_words, pair, problem_counts

if TYPE_CHECKING:
    from pear_ray.algorithms.paired import PairedDifference

CHECKPOINT_WORDS = {"base": "base model", "sft": "after SFT", "rl": "after RL"}
_METRIC_WORDS = {
    "tied_fraction": "majority tied",
    "mean_length": "mean length (tokens)",
    "truncated_fraction": "truncated",
    "entropy": "entropy (nats per token)",
    "format_fraction": "in form",
    "reward/mean": "reward",
    "errored_fraction": "reward errored",
}
_FRACTIONS = {"tied_fraction", "truncated_fraction", "format_fraction", "errored_fraction"}
_AT = re.compile(r"(pass|mean|maj)_at_(\d+)")
_COMPONENT = re.compile(r"reward/(.+)/mean")


def metric_words(name: str) -> str:
    """`pass_at_8` as `pass@8`; the other metrics in plain words."""
    if at := _AT.fullmatch(name):
        return f"{at[1]}@{at[2]}"
    if component := _COMPONENT.fullmatch(name):
        return f"reward: {component[1]}"
    return _METRIC_WORDS.get(name, name.replace("_", " "))


def pass_at_k_names(names: Iterable[str]) -> list[str]:
    """The pass@k metrics among `names`, by k."""
    return sorted(
        (name for name in names if name.startswith("pass_at_")),
        key=lambda name: int(name.removeprefix("pass_at_")),
    )


def summary_order(names: Iterable[str]) -> list[str]:
    """`names` as a reader wants the columns: pass@k by k, votes, the known others, the rest."""
    given = set(names)
    votes = sorted(
        (each for each in given if each.startswith(("mean_at_", "maj_at_"))), reverse=True
    )
    first = [*pass_at_k_names(given), *votes, *(name for name in _METRIC_WORDS if name in given)]
    return first + sorted(given - set(first))


def estimate_words(estimate: Estimate, *, name: str = "") -> str:
    """`0.213 [0.180, 0.246]`; fractions that are not scores as percentages."""
    if name in _FRACTIONS:
        low, high = 100 * estimate.low, 100 * estimate.high
        return f"{100 * estimate.value:.1f} % [{low:.1f}, {high:.1f}]"
    digits = 1 if name == "mean_length" else 3
    value, low, high = (f"{v:.{digits}f}" for v in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def overlap(one: Estimate, other: Estimate) -> bool:
    """Whether the intervals share a point; touching ones do."""
    return one.low <= other.high and other.low <= one.high


def change_sentence(
    name: str,
    before: tuple[str, Estimate],
    after: tuple[str, Estimate],
    paired: "PairedDifference | None" = None,
) -> str:
    """How a metric changed between two checkpoints, and whether this evaluation tells them apart.

    By the interval of the difference, problem by problem, where there is one; else by whether the
    two intervals overlap.
    """
    (before_name, old), (after_name, new) = before, after
    numbers = (
        f"from {estimate_words(old)} {_where(before_name)} to {estimate_words(new)} "
        f"{_where(after_name)}"
    )
    if paired is not None:
        words = f"{difference_words(paired)} ({problem_counts(paired)})"
        if paired.is_told_apart:
            verb = "rose" if paired.value > 0 else "fell"
            return f"{metric_words(name)} {verb} {numbers}; paired by problem: {words}."
        return (
            f"{metric_words(name)} went {numbers}; paired by problem: {words}, so this evaluation "
            "does not tell them apart."
        )
    if overlap(old, new):
        return (
            f"{metric_words(name)} went {numbers}: the intervals overlap, so this evaluation does "
            "not tell them apart."
        )
    verb = "rose" if new.value > old.value else "fell"
    return f"{metric_words(name)} {verb} {numbers}: the intervals do not overlap."


def suite_words(evaluation: Evaluation) -> str:
    """What a suite's numbers are of."""
    words = (
        f"{evaluation.num_problems:,} held-out problems{problem_words(evaluation)}, "
        f"{evaluation.num_samples} samples each, temperature {evaluation.temperature}, at most "
        f"{evaluation.max_tokens} tokens"
    )
    rewards = evaluation.settings.get("rewards")
    return f"{words}, verified by {rewards}" if rewards else words


def problem_words(evaluation: Evaluation) -> str:
    """` of chain_sum`, ` of hub:gsm8k`, ...; nothing where the results do not say."""
    problems = evaluation.settings.get("problems") or {}
    match problems.get("kind"):
        case "games":
            return f" of {', '.join(game['name'] for game in problems['games'])}"
        case "file":
            return f" of {problems['path']}"
        case "hub":
            return f" of hub:{problems['name']}"
        case _:
            return ""


def verdicts(suites: Sequence[Evaluation], counts: Mapping[tuple[str, str], Counts]) -> list[str]:
    """The run's outcome on every suite that holds a checkpoint; of several each is named."""
    return [
        f"{evaluation.suite}: {sentence}" if len(suites) > 1 else sentence
        for evaluation in suites
        if evaluation.checkpoints
        for sentence in verdict(evaluation, counts)
    ]


def verdict(
    evaluation: Evaluation, counts: Mapping[tuple[str, str], Counts] | None = None
) -> list[str]:
    """The run's outcome, the most telling sentence first: the last stage's change of pass@1.

    Then pass@k for larger k over the same stage, then each from the base model, then how many
    rewards are unknown. `counts` are the samples of each problem, where they are known.
    """
    done = [name for name in CHECKPOINTS if name in evaluation.checkpoints]
    metrics = pass_at_k_names(evaluation.checkpoints[done[-1]])
    if len(done) == 1:
        only = evaluation.checkpoints[done[0]]
        return [
            f"{metric_words(n)} is {estimate_words(only[n])} {_where(done[0])}; "
            "there is no other checkpoint to compare it with."
            for n in metrics
        ]
    pairs = [(done[-2], done[-1])]
    if len(done) > 2:  # noqa: PLR2004 - with two checkpoints that is the pair already there
        pairs.append((done[0], done[-2]))
    sentences = [
        change_sentence(
            name,
            (before, evaluation.checkpoints[before][name]),
            (after, evaluation.checkpoints[after][name]),
            paired_change(evaluation, counts or {}, name, before, after),
        )
        for before, after in pairs
        for name in metrics
    ]
    return sentences + _unknown_rewards(evaluation, done)


def paired_change(
    evaluation: Evaluation,
    counts: Mapping[tuple[str, str], Counts],
    name: str,
    before: str,
    after: str,
) -> "PairedDifference | None":
    """How the pass@k `name` differs between two checkpoints of a run, problem by problem."""
    return pair(
        counts.get((evaluation.suite, before)),
        counts.get((evaluation.suite, after)),
        k=int(name.removeprefix("pass_at_")),
        confidence=evaluation.confidence,
    )


def _unknown_rewards(evaluation: Evaluation, done: Sequence[str]) -> list[str]:
    return [
        f"{100 * errored.value:.1f} % of the rewards {_where(name)} could not be computed."
        for name in done
        if (errored := evaluation.checkpoints[name].get("errored_fraction")) and errored.value > 0
    ]


def _where(checkpoint: str) -> str:
    words = CHECKPOINT_WORDS.get(checkpoint, checkpoint)
    return f"for the {words}" if checkpoint == "base" else words
