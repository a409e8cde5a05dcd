"""What a study's report says in sentences. None claims more than its p and its interval do."""

from collections.abc import Iterator, Sequence

from pear_ray.algorithms.paired import PairedDifference
from pear_ray.algorithms.power import fewest_pairs, least_p
from pear_ray.reporting.paired import difference_words as with_interval
from pear_ray.reporting.study.estimates import Comparison, SeedMean
from pear_ray.reporting.study.numbers import StudyNumbers
from pear_ray.reporting.study.orders import Rank, Reversal
from pear_ray.reporting.study.primary import Primary
from pear_ray.reporting.words import metric_words

_MOST_LISTED = 6
_MOST_REVERSALS = 3  # in the verdict; the page lists all
CONTROL_WORDS = {
    "shuffled": (
        "which token or sequence gets which weight matters, beyond how the weights are spread",
        "the same weights at the wrong places are not shown to be worse",
    ),
    "position_profile": (
        "the weights do more than favour a position in the completion",
        "favouring positions alone, without a model, is not shown to be worse",
    ),
    "likelihood_only": (
        "the behavior log-probs add something to the policy's own likelihood",
        "the policy's own likelihood, without a teacher, is not shown to be worse",
    ),
}
_STANDING = {
    "registered": "The registered comparison",
    "changed": "The comparison, changed since it was registered and so exploratory,",
    "late": "The comparison, registered only after RL had begun and so exploratory,",
    "exploratory": "The primary comparison, which was not registered and so is exploratory,",
}


def p_words(p: float | None) -> str:
    """`p = 0.031`, `p < 0.001`, or that there is none."""
    if p is None:
        return "no exact p"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"  # noqa: PLR2004 - what three digits show


def mean_words(found: SeedMean | None) -> str:
    """`0.774 [0.761, 0.787]`; the mean alone with one seed."""
    if found is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.value:.3f} (one seed)"
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def difference_words(found: PairedDifference) -> str:
    """`+0.036 [+0.010, +0.062], p = 0.031`; one seed has no interval."""
    if found.num_pairs == 1:
        return f"{found.value:+.3f} (one seed), {p_words(found.p)}"
    return with_interval(found)


def relation(found: Comparison, alpha: float) -> str:
    """`above`, `below` or `not told apart from`, corrected for the family where there is one."""
    if found.difference is None:
        return "not compared with"
    if found.is_apart_in_family(alpha):
        return "above" if found.value > 0 else "below"
    return "not told apart from"


def compared_words(found: Comparison, alpha: float) -> str:
    """`above sft: +0.126 [+0.106, +0.146], p = 0.031; n = 6`, with what limits it."""
    if found.difference is None:
        return f"not compared with {found.against}: no seed has both"
    words = (
        f"{relation(found, alpha)} {found.against}: {difference_words(found.difference)}; "
        f"{_pairs_words(found)}"
    )
    if found.holm_p is not None and found.family > 1:
        words += f"; {p_words(found.holm_p)} corrected for {found.family} comparisons"
        if found.is_apart(alpha) and not found.is_apart_in_family(alpha):
            words += ", apart only if taken alone"
    return words


def verdict(found: StudyNumbers) -> list[str]:
    """The report in sentences, the most binding first."""
    if len(found.arms) == 1:
        return ["One arm: there is nothing to compare it with."]
    return [
        *_limits(found),
        *_primary(found),
        *_highest(found),
        *_reversed(found),
        *([limit] if (limit := family_limit(found)) else []),
        *_warnings(found),
    ]


def notes(found: StudyNumbers) -> list[str]:
    """What a reader must know of how the study went."""
    said = []
    for is_tuning, words in ((False, "run"), (True, "tuning run")):
        failed = [run for run in found.runs.failed if run.is_tuning == is_tuning]
        if failed:
            names = listed([f"{run.arm} seed {run.seed}" for run in failed])
            number = f"{len(failed)} {words}{'' if len(failed) == 1 else 's'}"
            tail = "" if is_tuning else "; comparisons are over the seeds that both arms have"
            said.append(f"{number} failed: {names}{tail}.")
    if found.runs.not_run:
        reasons = listed(sorted({run.detail for run in found.runs.not_run}))
        number = len(found.runs.not_run)
        said.append(f"{number} run{'' if number == 1 else 's'} not started: {reasons}.")
    said += [f"Changed since registration: {each}." for each in found.changed_since_registration]
    if found.strangers:
        said.append(f"Left out, because the study no longer has them: {listed(found.strangers)}.")
    if not found.baseline_is_uniform:
        said.append(
            f"No arm is plain SFT (uniform weights, nll): all are compared with the first, "
            f"{found.baseline}, and nothing says whether any is better than plain SFT."
        )
    return said


def order_words(found: Rank, number: int) -> str:
    """`dft is 1st of 6 before RL and 5th after`."""
    places = f"{ordinal(found.before)} of {number} before RL and {ordinal(found.after)} after"
    return f"{found.arm} is {places}"


def reversal_sentences(found: StudyNumbers) -> Iterator[str]:
    """A sentence for every arm that is ahead of others before RL and behind them after it.

    Of those that the seeds tell apart both times; in numbers the one against the baseline, or the
    largest.
    """
    ranks = {rank.arm: rank for rank in found.ranks.arms}
    apart: dict[str, list[Reversal]] = {}
    for each in found.reversals:
        if each.is_apart:
            apart.setdefault(each.arm, []).append(each)
    for arm, reversals in apart.items():
        first = next((each for each in reversals if each.against == found.baseline), reversals[0])
        others = [each.against for each in reversals if each is not first]
        where = order_words(ranks[arm], len(ranks)) if arm in ranks else f"{arm} falls behind"
        before, after = (compared_words(each, found.alpha) for each in (first.before, first.after))
        also = f" The same, apart both times, against {listed(others)}." if others else ""
        yield f"Reversal: {where}. Before RL it is {before}; after RL it is {after}.{also}"


def control_words(found: Comparison, kind: str, alpha: float) -> str:
    """What a comparison with a control says of the weights."""
    shown, not_shown = CONTROL_WORDS[kind]
    told = relation(found, alpha)
    words = f"{found.arm} is {compared_words(found, alpha)}"
    if told == "above":
        return f"{words}. So {shown}."
    if told == "below":
        return f"{words}. So the control does better."
    return f"{words}. So {not_shown}." if found.difference else f"{words}."


def ordinal(rank: float) -> str:
    """`1st`; of a shared rank `2nd to 3rd` as `2.5th`."""
    if rank != int(rank):
        return f"{rank:g}th"
    number = int(rank)
    suffix = "th" if 10 < number % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")  # noqa: PLR2004 - 11th to 13th
    return f"{number}{suffix}"


def listed(names: Sequence[str]) -> str:
    """`a, b and c`; of many the first and how many more."""
    if len(names) > _MOST_LISTED:
        return f"{', '.join(names[:_MOST_LISTED])} and {len(names) - _MOST_LISTED} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def score_words(found: StudyNumbers) -> str:
    """`pass@1 of the suite main`."""
    return f"{metric_words(found.metric)} of {found.suite}"


def _limits(found: StudyNumbers) -> Iterator[str]:
    if found.most_pairs == 0:
        which = "of the primary comparison" if found.primary else "that are to be compared"
        yield f"Nothing can be claimed yet: no seed has a score after RL of two arms {which}."
    elif found.has_too_few_seeds:
        planned = "" if found.is_complete else f" ({len(found.seeds)} are planned)"
        yield (
            f"Too few seeds for any claim: {found.most_pairs} "
            f"give{'s' if found.most_pairs == 1 else ''} p >= {found.least_p:.3g}, "
            f"whatever the scores; p <= {found.alpha:g} takes at least {found.fewest_pairs}"
            f"{planned}."
        )
    if not found.is_complete:
        failed = sum(not run.is_tuning for run in found.runs.failed)
        words = {"running": "is running", "stopped": "was stopped", "done": "left runs out"}
        yield (
            f"The study {words[found.state]}: {found.runs.done} of {found.runs.planned} runs are "
            f"done{f', {failed} failed' if failed else ''}. What follows is an early view, and "
            "stopping when it looks good would make any p too small."
        )


def _primary(found: StudyNumbers) -> Iterator[str]:
    primary = found.primary
    if primary is None:
        yield (
            "Exploratory: the study names no primary comparison, so whatever stands out was picked "
            "after the fact."
        )
        return
    name, against = _STANDING[primary.standing], listed([each.against for each in primary.against])
    rule = f"after RL, {primary.arm} above {against}, each with p <= {primary.alpha:g}"
    where, told = score_words(found), [_primary_words(primary, each) for each in primary.against]
    if primary.outcome == "holds":
        yield (
            f"{name} holds: after RL, {primary.arm} is {listed(told)}, in {where} (each "
            f"had to have p <= {primary.alpha:g})."
        )
        return
    verb = (
        "is not judged before all its runs have ended"
        if primary.outcome == "open"
        else "does not hold"
    )
    found_words = "So far" if primary.outcome == "open" else "Found"
    yield f"{name} {verb}. Rule: {rule}, in {where}. {found_words}: {listed(told)}."


def _primary_words(primary: Primary, found: Comparison) -> str:
    """By the rule alone: neither its interval nor other comparisons take part."""
    if found.difference is None:
        return f"not compared with {found.against} (no seed has both)"
    is_apart = found.difference.p is not None and found.difference.p <= primary.alpha
    told = ("above" if found.value > 0 else "below") if is_apart else "not told apart from"
    return f"{told} {found.against} ({difference_words(found.difference)}; {_pairs_words(found)})"


def _pairs_words(found: Comparison) -> str:
    """`n = 8`; where seeds are missing `n = 7 of 8, the seeds that both have`."""
    number = f"n = {len(found.seeds)}"
    if not found.missing:
        return number
    return f"{number} of {len(found.seeds) + len(found.missing)}, the seeds that both have"


def family_limit(found: StudyNumbers) -> str | None:
    """That no corrected p can be small enough, where so few seeds meet so many comparisons."""
    number = len(found.main.comparisons)
    pairs = max((len(each.seeds) for each in found.main.comparisons), default=0)
    if found.has_too_few_seeds or pairs == 0 or number * least_p(pairs) <= found.alpha:
        return None
    enough = fewest_pairs(found.alpha / number)
    return (
        f"Corrected for {number} comparisons, {pairs} seeds cannot tell any arm from "
        f"{found.baseline}, whatever the scores: that takes {enough}. A primary comparison, named "
        "before RL, needs no such correction."
    )


def _highest(found: StudyNumbers) -> Iterator[str]:
    """The arm that ends highest, and what that is worth."""
    scored = [row for row in found.main.arms if row.after]
    if len(scored) < 2:  # noqa: PLR2004 - two make an order
        return
    best = max(scored, key=lambda row: row.after.value if row.after else 0.0)
    words = f"Highest mean after RL: {best.arm}, {mean_words(best.after)} in {score_words(found)}"
    if best.versus_after is None:
        apart = [
            row.arm
            for row in scored
            if row.versus_after
            and row.versus_after.value < 0
            and row.versus_after.is_apart_in_family(found.alpha)
        ]
        others = [row.arm for row in scored if row.arm not in (best.arm, *apart)]
        words += f", which is the arm that all are compared with ({found.baseline})"
        words += f"; below it: {listed(apart)}" if apart else ""
        words += f"; not told apart from it: {listed(others)}" if others else ""
        yield f"{words}."
        return
    yield f"{words}; it is {compared_words(best.versus_after, found.alpha)}."
    if len(scored) > 2:  # noqa: PLR2004 - a choice among more than a pair
        yield (
            f"It is the highest of {len(scored)}, and the highest of several is too high by "
            "chance: a fresh study would likely find less."
        )


def _reversed(found: StudyNumbers) -> Iterator[str]:
    sentences = list(reversal_sentences(found))
    yield from sentences[:_MOST_REVERSALS]
    if len(sentences) > _MOST_REVERSALS:
        yield f"{len(sentences) - _MOST_REVERSALS} further arms are reversed, listed below."
    apart = {each.arm for each in found.reversals if each.is_apart}
    first = next((rank for rank in found.ranks.arms if rank.before == 1), None)
    if first and first.after > 1 and first.arm not in apart:
        yield (
            f"{order_words(first, len(found.ranks.arms))}, by means that these seeds do not tell "
            "apart both times: no claim of a reversal."
        )


def _warnings(found: StudyNumbers) -> Iterator[str]:
    at_end = [each.arm for each in found.tuning if each.is_at_end]
    if at_end:
        yield (
            f"The learning rate chosen for {listed(at_end)} is at the end of what was tried: a "
            "better one may lie beyond, so that comparison is not of each arm at its best."
        )
