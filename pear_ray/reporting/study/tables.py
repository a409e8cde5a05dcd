"""A study's tables in words, for the page and for the summary."""

from collections.abc import Mapping, Sequence

from pear_ray.reporting.page import Table
from pear_ray.reporting.study.estimates import Comparison, SeedMean
from pear_ray.reporting.study.load import SFT_HEALTH
from pear_ray.reporting.study.numbers import StudyNumbers
from pear_ray.reporting.study.scores import SIZES, ScoreTable
from pear_ray.reporting.study.training import KL_MOVED, UPDATES
from pear_ray.reporting.study.words import difference_words, mean_words, p_words, relation
from pear_ray.reporting.words import metric_words

_HEALTH_WORDS = {
    "sft/ess_fraction": "ESS / tokens",
    "sft/weight/mean": "mean weight",
    "sft/log_ratio_clip_low_fraction": "log-ratios clipped low",
    "sft/log_ratio_clip_high_fraction": "clipped high",
    "sft/log_weight_floor_fraction": "weights at the floor",
    "sft/log_weight_ceiling_fraction": "at the ceiling",
}
_UPDATE_WORDS = {
    "update/sft_norm": "SFT update (L2)",
    "update/rl_norm": "RL update (L2)",
    "update/relative_sft_norm": "SFT update / base",
    "update/relative_rl_norm": "RL update / base",
    "update/cosine": "cosine of both",
    KL_MOVED: "KL moved in RL",
}
_SECONDS_PER_HOUR = 3600


def score_table(found: ScoreTable, *, alpha: float) -> Table:
    """Every arm: scores before and after RL, and the difference from the baseline."""
    rows = []
    for row in found.arms:
        versus = row.versus_after
        cells = [row.arm, mean_words(row.before), mean_words(row.after)]
        if versus is None:
            rows.append([*cells, "-", "all are compared with it", "", "", ""])
            continue
        before = row.versus_before.difference if row.versus_before else None
        rows.append(
            [*cells, f"{before.value:+.3f}" if before else "-", *_versus(versus, alpha=alpha)]
        )
    return Table(
        [
            *("arm", "before RL", "after RL", f"minus {found.baseline}, before"),
            *("after RL", "p (Holm's)", "seeds above / below", "reads as"),
        ],
        rows,
    )


def comparison_table(comparisons: Sequence[Comparison], *, alpha: float) -> Table:
    """Pairs of arms after RL."""
    return Table(
        ["arm", "against", "difference", "p (Holm's)", "seeds above / below", "reads as"],
        [[each.arm, each.against, *_versus(each, alpha=alpha)] for each in comparisons],
    )


def order_table(found: StudyNumbers) -> Table:
    """Ranks before and after RL."""
    ranks = sorted(found.ranks.arms, key=lambda each: each.after)
    return Table(
        ["arm", "rank before RL", "rank after RL", "mean before", "mean after"],
        [
            [
                *(each.arm, f"{each.before:g}", f"{each.after:g}"),
                *(f"{each.before_mean:.3f}", f"{each.after_mean:.3f}"),
            ]
            for each in ranks
        ],
    )


def reversal_table(found: StudyNumbers) -> Table:
    """Pairs of arms whose order RL turns around."""
    return Table(
        ["ahead before RL", "and behind it after", "before RL", "after RL", "apart both times"],
        [
            [
                *(each.arm, each.against),
                *(
                    difference_words(versus.difference) if versus.difference else "-"
                    for versus in (each.before, each.after)
                ),
                "yes" if each.is_apart else "no",
            ]
            for each in found.reversals
        ],
    )


def weight_table(found: StudyNumbers) -> Table:
    """Weights of weighted arms at SFT's end."""
    return _levels(found.weights, SFT_HEALTH, _HEALTH_WORDS)


def distance_table(found: StudyNumbers) -> Table:
    """How far SFT and RL moved each arm."""
    return _levels(found.distances, (*UPDATES, KL_MOVED), _UPDATE_WORDS)


def predictor_table(found: StudyNumbers) -> Table:
    """What is known before RL against the score after it."""
    return Table(
        ["known before RL", "over arm means", "arms", "within a seed, over arms", "seeds"],
        [
            [
                _UPDATE_WORDS.get(each.metric) or metric_words(each.metric),
                "-" if each.over_arms is None else f"{each.over_arms:+.2f}",
                str(each.num_arms),
                _rho_words(each.within_seeds),
                str(len(each.within_seeds.seeds) if each.within_seeds else 0),
            ]
            for each in found.predictors
        ],
    )


def tuning_table(found: StudyNumbers) -> Table:
    """Scores after RL by learning rate; the chosen one is marked."""
    rates = [rate for rate, _ in found.tuning[0].scores] if found.tuning else []
    rows = []
    for each in found.tuning:
        cells = [
            ("-" if mean is None else f"{mean.value:.3f} (n = {len(mean.seeds)})")
            + (" chosen" if rate == each.chosen else "")
            for rate, mean in each.scores
        ]
        note = "at the end of the range" if each.is_at_end else ""
        rows.append([each.arm, *cells, note if each.chosen is not None else "not chosen yet"])
    return Table(["arm", *(f"{rate:g}" for rate in rates), ""], rows)


def power_table(found: StudyNumbers) -> Table:
    """Seeds needed for a difference of a given size."""
    sizes = [f"{size:g}" for size in SIZES]
    return Table(
        ["comparison", "seeds", "paired sd", *(f"needed for {size}" for size in sizes), "can see"],
        [
            [
                f"{each.arm} minus {each.against}",
                str(each.num_seeds),
                f"{each.sd:.3f}",
                *(f"{each.needed[size]:,}" for size in sizes),
                "nothing" if each.detectable is None else f"{each.detectable:.3f}",
            ]
            for each in found.power
        ],
    )


def run_table(found: StudyNumbers) -> Table:
    """Runs that failed, with their error."""
    return Table(
        ["run", "error", "attempts", "folder"],
        [
            [
                f"{run.arm} seed {run.seed}{' (tuning)' if run.is_tuning else ''}"
                + ("" if run.learning_rate is None else f", learning rate {run.learning_rate:g}"),
                *(run.detail, str(run.attempts), run.run_dir),
            ]
            for run in found.runs.failed
        ],
    )


def budget_table(found: StudyNumbers) -> Table:
    """What the study used."""
    runs = found.runs
    rows = [
        [
            each.name.replace("_", " "),
            f"{each.used:,.4g}" if each.used % 1 else f"{each.used:,.0f}",
            "none" if each.limit is None else f"{each.limit:,g}",
        ]
        for each in found.budget
    ]
    known = {each.name for each in found.budget}
    counts = {"optimizer_steps": runs.optimizer_steps, "tokens": runs.tokens}
    rows += [
        [name.replace("_", " "), f"{used:,}", "none"]
        for name, used in counts.items()
        if name not in known
    ]
    rows.append(["hours of runs, added up", f"{runs.seconds / _SECONDS_PER_HOUR:.2f}", "none"])
    return Table(["", "used", "limit"], rows)


def _versus(found: Comparison, *, alpha: float) -> list[str]:
    difference = found.difference
    if difference is None:
        return ["-", "-", "-", "no seed has both"]
    interval = difference_words(difference).rpartition(", ")[0]  # p has a column of its own
    planned = len(found.seeds) + len(found.missing)
    count = f"{difference.num_better} / {difference.num_worse} of {len(found.seeds)}"
    count += f" (planned {planned})" if found.missing else ""
    told = relation(found, alpha).removesuffix(" from")
    if found.is_apart(alpha) and not found.is_apart_in_family(alpha):
        told = f"only alone: {'above' if found.value > 0 else 'below'}"
    p = f"{_digits(difference.p)} ({_digits(found.holm_p)})"
    return [interval, p, count, told]


def _digits(p: float | None) -> str:
    return p_words(p).removeprefix("p ").removeprefix("= ")


def _levels(
    found: Mapping[str, Mapping[str, SeedMean]],
    metrics: Sequence[str],
    words: Mapping[str, str],
) -> Table:
    shown = [name for name in metrics if any(name in levels for levels in found.values())]
    return Table(
        ["arm", *(words[name] for name in shown)],
        [[arm, *(mean_words(levels.get(name)) for name in shown)] for arm, levels in found.items()],
    )


def _rho_words(found: SeedMean | None) -> str:
    if found is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.value:+.2f}"
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
