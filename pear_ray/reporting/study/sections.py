"""The chapters of a study's page: tables, figures, and what they say in sentences."""

from dataclasses import dataclass, field

from pear_ray.reporting.page import Table
from pear_ray.reporting.plot import Chart
from pear_ray.reporting.study import tables
from pear_ray.reporting.study.figures import all_figures
from pear_ray.reporting.study.numbers import StudyNumbers
from pear_ray.reporting.study.orders import FEWEST_ARMS
from pear_ray.reporting.study.scores import POWER
from pear_ray.reporting.study.words import (
    compared_words,
    control_words,
    order_words,
    reversal_sentences,
    score_words,
)
from pear_ray.reporting.words import metric_words

_FAR = 2  # ranks that are worth a sentence


@dataclass(slots=True)
class Section:
    """A chapter of the page.

    Attributes:
        tables: Each under its title.
        sentences: Before them.
        after: Below them, small.
        folded: Figures that are shown when asked for.
    """

    anchor: str
    title: str
    sentences: list[str] = field(default_factory=list)
    tables: list[tuple[str, Table]] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    folded: list[Chart] = field(default_factory=list)


def build_sections(found: StudyNumbers) -> list[Section]:
    """Every chapter that has something to show, in reading order."""
    charts = all_figures(found)
    sections = [
        _scores(found, charts),
        _order(found, charts),
        _controls(found),
        _suites(found),
        Section(
            "curves", "Learning curves", charts=charts["curves"], folded=charts["folded_curves"]
        ),
        _training(found),
        _predictors(found),
        _tuning(found, charts),
        _power(found),
        _runs(found),
    ]
    return [each for each in sections if each.sentences or each.tables or each.charts]


def _scores(found: StudyNumbers, charts: dict[str, list[Chart]]) -> Section:
    number = len(found.main.comparisons)
    return Section(
        "scores",
        "Scores",
        tables=[("", tables.score_table(found.main, alpha=found.alpha))],
        charts=[*charts["differences"], *charts["scores"]],
        after=[
            (
                f"{score_words(found)}: mean over seeds [{100 * found.confidence:g} % bootstrap "
                "interval over seeds]. Differences are paired by seed; p is the exact two-sided "
                "sign-flip test over all sign patterns, Holm's the same adjusted for the "
                f"{number} comparisons of this table. `above` and `below` want an interval that "
                f"leaves 0 out and Holm's p at most {found.alpha:g}; `only alone`: the unadjusted "
                "p would do. Intervals are over seeds, on one set of problems, not over problems."
            ),
        ],
    )


def _order(found: StudyNumbers, charts: dict[str, list[Chart]]) -> Section:
    section = Section("order", "Before and after RL", charts=charts["order"])
    if len(found.ranks.arms) < 2:  # noqa: PLR2004 - two make an order
        return section
    number = len(found.ranks.arms)
    said = {each.arm for each in found.reversals if each.is_apart}
    moved = [
        each
        for each in found.ranks.arms
        if abs(each.after - each.before) >= _FAR and each.arm not in said
    ]
    moved.sort(key=lambda each: -abs(each.after - each.before))
    section.sentences = [*reversal_sentences(found)]
    section.sentences += [f"By means, {order_words(each, number)}." for each in moved]
    if all(each.before == each.after for each in found.ranks.arms):
        section.sentences.append("RL leaves the order of the arms as it was.")
    section.tables = [("", tables.order_table(found))]
    if found.reversals:
        section.tables.append(("Pairs that change order", tables.reversal_table(found)))
    if found.ranks.left_out:
        section.after.append(
            f"Left out, without a score after RL: {', '.join(found.ranks.left_out)}."
        )
    section.after.append(
        "Ranks are of means, and neighbours may be no different. Listed are the pairs with "
        f"{found.baseline}, and all that are apart both times: an interval without 0 and p <= "
        f"{found.alpha:g}, before RL one way and after it the other; not corrected for how many "
        "pairs there are."
    )
    return section


def _controls(found: StudyNumbers) -> Section:
    section = Section("controls", "Is it the importance ratio?")
    section.sentences = [
        control_words(each, found.control_kinds[each.against], found.alpha)
        for each in found.controls
    ]
    if found.controls:
        section.tables.append(
            ("Weighted arms against their own controls", _compared(found, "controls"))
        )
    if found.rescaled:
        section.sentences += [
            f"Rescaling alone: {each.arm} is {compared_words(each, found.alpha)}."
            for each in found.rescaled
        ]
        section.tables.append(
            ("Weights divided by their mean, against the same as they are",
             _compared(found, "rescaled"))
        )  # fmt: skip
    if section.tables:
        section.after.append(
            f"{score_words(found)} after RL. Controls of the same scale only: small weights alone "
            "make an optimizer starve, so that an arm that is not rescaled may lose, and its "
            "control with it, for reasons that have nothing to do with the ratio. Holm's p is "
            "adjusted within each table."
        )
    return section


def _compared(found: StudyNumbers, which: str) -> Table:
    comparisons = {"controls": found.controls, "rescaled": found.rescaled}[which]
    return tables.comparison_table(comparisons, alpha=found.alpha)


def _suites(found: StudyNumbers) -> Section:
    section = Section("suites", "Other suites and pass@k")
    for table in found.tables[1:]:
        title = f"{metric_words(table.metric)} of {table.suite}"
        section.tables.append((title, tables.score_table(table, alpha=found.alpha)))
    if section.tables:
        section.after.append(
            "As above, Holm's p within each table. These are looks beside the study's own score: "
            "the more of them, the more will stand out by chance."
        )
    return section


def _training(found: StudyNumbers) -> Section:
    section = Section("training", "Weights and distances")
    if found.weights:
        section.tables.append(("Weights at the end of SFT", tables.weight_table(found)))
    if found.distances:
        section.tables.append(("Distances", tables.distance_table(found)))
    if section.tables:
        section.after.append(
            "Means over seeds [interval]; logged metrics over the last tenth of the steps. ESS is "
            "(sum of weights)^2 / sum of squared weights. Updates are L2 norms of the change of "
            "all parameters, `/ base` over the norm of the base's; the cosine is between SFT's "
            "change and RL's. KL is in nats per token, to the policy that RL began with."
        )
    return section


def _predictors(found: StudyNumbers) -> Section:
    section = Section("predictors", "What goes with the score after RL")
    if len(found.ranks.arms) < FEWEST_ARMS:
        section.sentences = [
            f"No correlations with so few arms: they are given from {FEWEST_ARMS} on."
        ]
    if found.predictors:
        first = found.predictors[0]
        section.tables = [("", tables.predictor_table(found))]
        section.after = [
            (
                f"Spearman's rank correlation with {score_words(found)} after RL: over the means "
                f"of {first.num_arms} arms, and as the mean over seeds of the correlation over the "
                "arms that have this seed [interval over seeds; the arms are the same each time]. "
                "These are associations over the arms of this study, without a test: of few arms, "
                "a large "
                "correlation is nothing unusual, and the highest of many is too high."
            )
        ]
    return section


def _tuning(found: StudyNumbers, charts: dict[str, list[Chart]]) -> Section:
    section = Section("tuning", "Learning rates", charts=charts["tuning"])
    if found.tuning:
        section.tables = [("", tables.tuning_table(found))]
        section.sentences = [
            f"{each.arm}: {each.chosen:g} is at the end of the range; try beyond it."
            for each in found.tuning
            if each.is_at_end
        ]
        section.after = ["Mean score after RL, on seeds that are not reported."]
    return section


def _power(found: StudyNumbers) -> Section:
    section = Section("power", "How many seeds it takes")
    if found.power:
        widest = max(found.power, key=lambda each: each.sd)
        needs = ", ".join(
            f"{number:,} seeds to see {size}" for size, number in widest.needed.items()
        )
        section.sentences = [
            (
                f"The paired sd is up to {widest.sd:.3f} ({widest.arm} minus {widest.against}): "
                f"that takes {needs}."
            )
        ]
        section.tables = [("", tables.power_table(found))]
        section.after = [
            (
                f"Seeds for a difference to be found {100 * POWER:g} times in 100 at p <= "
                f"{found.alpha:g}, one comparison alone: normal formula with Guenther's "
                f"correction, never below the {found.fewest_pairs} that the sign-flip test takes. "
                "`can see`: the difference that the seeds at hand would show as often. A sd of few "
                "seeds is itself "
                "uncertain: of 6, by a third either way."
            )
        ]
    return section


def _runs(found: StudyNumbers) -> Section:
    section = Section("runs", "Runs and budget")
    if found.runs.failed:
        section.tables.append(("Failed", tables.run_table(found)))
    section.tables.append(("Budget", tables.budget_table(found)))
    return section
