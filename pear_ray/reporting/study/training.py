"""What the runs logged while they trained, as means over seeds: curves, weights, distances."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pear_ray.algorithms.bands import bootstrap_band
from pear_ray.reporting.study.estimates import SeedMean, seed_mean
from pear_ray.reporting.study.load import KL_METRIC, SFT_HEALTH, BySeed, Curve, StudyData

UPDATES = (
    "update/sft_norm",
    "update/rl_norm",
    "update/relative_sft_norm",
    "update/relative_rl_norm",
    "update/cosine",
)
KL_MOVED = "rl/kl_to_init at the end"
_SHOWN = ("rl/reward/mean", "rl/correct_fraction", "rl/entropy", KL_METRIC)
_SFT_SHOWN = ("sft/heldout/nll", "sft/nll")
_LAST = 10  # a level at the end is a mean over the last tenth of the steps


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanCurve:
    """An arm's mean over seeds, with the interval of the mean at each step.

    Attributes:
        seeds: Whose curves it is the mean of.
        steps: That all of them have.
        low: None with one seed.
    """

    arm: str
    seeds: list[int]
    steps: list[int]
    mean: list[float]
    low: list[float] | None
    high: list[float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveSet:
    """One metric of every arm that logged it."""

    metric: str
    arms: list[MeanCurve]


def curve_sets(data: StudyData) -> list[CurveSet]:
    """Reward and pass@k over RL first, then SFT's losses; what nobody logged is left out."""
    names = {metric for _, metric in data.curves}
    passes = sorted(
        (name for name in names if "/eval/pass_at_" in name),
        key=lambda name: (name.partition("/")[0], int(re.findall(r"\d+", name)[-1])),
    )
    rl = [_SHOWN[0], *(name for name in passes if name.startswith("rl/")), *_SHOWN[1:]]
    sft = [*_SFT_SHOWN, *(name for name in passes if name.startswith("sft/"))]
    return [
        CurveSet(metric=metric, arms=curves)
        for metric in (*rl, *sft)
        if (curves := [c for arm in data.arms if (c := _mean_curve(data, arm, metric))])
    ]


def weight_health(data: StudyData) -> dict[str, dict[str, SeedMean]]:
    """By weighted arm and metric: its level at SFT's end."""
    found = {}
    for arm in data.facts.arms:
        levels = {metric: _at_end(data, arm.name, metric) for metric in SFT_HEALTH}
        kept = {metric: level for metric, level in levels.items() if level}
        if arm.weights != "uniform" and kept:
            found[arm.name] = kept
    return found


def distances(data: StudyData) -> dict[str, dict[str, SeedMean]]:
    """By arm and metric: how far SFT and RL moved the parameters, and RL the distribution."""
    found = {}
    for arm in data.arms:
        levels = {
            metric: _mean(data, data.scores.get((arm, "", "", metric), {})) for metric in UPDATES
        }
        levels[KL_MOVED] = _at_end(data, arm, KL_METRIC)
        kept = {metric: level for metric, level in levels.items() if level}
        if kept:
            found[arm] = kept
    return found


def _mean(data: StudyData, values: BySeed) -> SeedMean | None:
    return seed_mean(values, confidence=data.config.confidence)


def _ended(data: StudyData, arm: str, metric: str) -> Mapping[int, Curve]:
    """The curves of the arm's complete runs: half a curve would bend the mean where it stops.

    Those of unfinished ones where there is no other.
    """
    curves = data.curves.get((arm, metric), {})
    done = {run.seed for run in data.runs if run.arm == arm and run.status == "done"}
    return {seed: curve for seed, curve in curves.items() if seed in done} or curves


def _mean_curve(data: StudyData, arm: str, metric: str) -> MeanCurve | None:
    curves = _ended(data, arm, metric)
    if not curves:
        return None
    steps = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    if not steps:
        return None
    seeds = sorted(curves)
    rows = [[curves[seed][step] for step in steps] for seed in seeds]
    values = torch.tensor(rows, dtype=torch.float64)  # [seed, step]
    low = high = None
    if len(seeds) > 1:
        low, high = (
            end.tolist()
            for end in bootstrap_band(values, seed=0, confidence=data.config.confidence)
        )
    return MeanCurve(
        arm=arm, seeds=seeds, steps=steps, mean=values.mean(0).tolist(), low=low, high=high
    )


def _at_end(data: StudyData, arm: str, metric: str) -> SeedMean | None:
    levels = {}
    for seed, curve in _ended(data, arm, metric).items():
        steps = sorted(curve)
        last = steps[-max(1, len(steps) // _LAST) :]
        levels[seed] = sum(curve[step] for step in last) / len(last)
    return _mean(data, levels)
