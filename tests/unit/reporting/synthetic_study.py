"""A study's folder as its runner leaves it, with effects that are known."""

import dataclasses
import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pear_ray.artifacts.study_facts import (
    ArmFacts,
    RegistrationFacts,
    StudyFacts,
    budget_uses,
    write_facts,
)
from pear_ray.artifacts.study_results import StudyPoint, StudyRun, StudyScore, StudyTables
from pear_ray.config.study import ArmConfig, PrimaryConfig, StudyConfig, TuneConfig
from pear_ray.config.study_plan import dump_study

START = 1_780_000_000.0
RL_STEPS, SFT_STEPS = 30, 24
SHARED_SD, OWN_SD = 0.05, 0.01  # what a seed does to all arms alike, and to each alone


@dataclass(frozen=True)
class MadeArm:
    """An arm and where it ends: its mean pass@1 before and after RL."""

    name: str
    before: float
    after: float
    weights: str = "uniform"
    objective: str = "nll"
    parent: str = ""
    control: str | None = None
    rescaled: bool = False
    has_sft: bool = True


SFT = MadeArm("sft", 0.30, 0.70)
DFT = MadeArm("dft", 0.45, 0.55, objective="dft")  # ahead before RL, behind after
PEAR = MadeArm("pear", 0.33, 0.80, weights="pear")
NULL = MadeArm("null", 0.30, 0.70, objective="p_family")  # no different from sft
SHUFFLED = MadeArm("pear.shuffled", 0.30, 0.70, "pear", "nll", "pear", "shuffled")
LIKELIHOOD = MadeArm("pear.likelihood_only", 0.33, 0.80, "pear", "nll", "pear", "likelihood_only")
ARMS = (SFT, DFT, PEAR, SHUFFLED, LIKELIHOOD, NULL)


@dataclass(frozen=True)
class Made:
    """What is unusual about a study.

    Attributes:
        failed: Arm and seed of runs that failed in RL.
        not_run: Arm and seed of runs that were never started.
        logs: Whether there are curves: drawing them takes seconds.
    """

    seeds: Sequence[int] = tuple(range(8))
    primary: PrimaryConfig | None = None
    registration: RegistrationFacts | None = None
    changed: Sequence[str] = ()
    failed: Collection[tuple[str, int]] = ()
    not_run: Collection[tuple[str, int]] = ()
    pending: Collection[tuple[str, int]] = ()
    state: str = "done"
    rates: Sequence[float] = ()
    chosen: Mapping[str, float] = field(default_factory=dict)
    suites: Sequence[str] = ("main", "shifted")
    logs: bool = True


def make_study(folder: Path, arms: Sequence[MadeArm] = ARMS, made: Made | None = None) -> Path:
    """Write `study.yaml`, `study.json` and the three tables into `folder`."""
    made = made or Made()
    folder.mkdir(parents=True, exist_ok=True)
    tune = TuneConfig(learning_rates=list(made.rates), seeds=[100, 101]) if made.rates else None
    config = StudyConfig(
        name=folder.name,
        base="base.yaml",
        arms=[ArmConfig(name=arm.name) for arm in arms if "." not in arm.name],
        seeds=list(made.seeds),
        primary=made.primary,
        registered=made.registration is not None,
        tune=tune,
    )
    (folder / "study.yaml").write_text(dump_study(config), encoding="utf-8")
    tables = _tables(arms, made)
    write_facts(folder, _facts(config, arms, made, tables))
    tables.write(folder / "results")
    return folder


def _facts(
    config: StudyConfig, arms: Sequence[MadeArm], made: Made, tables: StudyTables
) -> StudyFacts:
    return StudyFacts(
        arms=[
            ArmFacts(
                name=arm.name,
                parent=arm.parent or arm.name,
                control=arm.control,
                rescaled=arm.rescaled,
                overrides={},
                weights=arm.weights,
                objective=arm.objective,
                has_sft=arm.has_sft,
            )
            for arm in arms
        ],
        state=made.state,
        learning_rates=dict(made.chosen),
        registration=made.registration,
        changed_since_registration=list(made.changed),
        budget=budget_uses(config.budget, tokens=float(sum(run.tokens for run in tables.runs))),
    )


def _tables(arms: Sequence[MadeArm], made: Made) -> StudyTables:
    runs, scores, curves = [], [], []
    shift = {seed: random.Random(seed).gauss(0.0, SHARED_SD) for seed in (*made.seeds, 100, 101)}
    for arm in arms:
        for seed in (100, 101) if made.rates else ():
            for rate in made.rates:
                cell = {"arm": arm.name, "seed": seed, "learning_rate": rate, "is_tuning": True}
                runs.append(_run(cell, "done", ""))
                value = arm.after - 0.1 * abs(math.log10(rate / 1e-3)) + shift[seed]
                scores.append(_score(cell, "main", "rl", "pass_at_1", value))
        for seed in made.seeds:
            if (arm.name, seed) in made.pending:
                continue
            rate = made.chosen.get(arm.name)
            cell = {"arm": arm.name, "seed": seed, "learning_rate": rate, "is_tuning": False}
            if (arm.name, seed) in made.not_run:
                runs.append(_run(cell, "not_run", "the budget of 10 tokens was used up"))
                continue
            has_failed = (arm.name, seed) in made.failed
            error = "EngineError: the engine ran out of memory" if has_failed else ""
            runs.append(_run(cell, "failed" if has_failed else "done", error))
            scores += _scores(arm, cell, shift[seed], made, has_rl=not has_failed)
            if not made.logs:
                continue
            curves += _curves(arm, cell, shift[seed], last=11 if has_failed else RL_STEPS)
    return StudyTables(runs=runs, scores=scores, curves=curves)


def _run(cell: Mapping, status: str, detail: str) -> StudyRun:
    ran = status != "not_run"
    return StudyRun(
        **cell,
        status=status,
        detail=detail,
        run_dir=f"runs/{cell['arm']}-seed{cell['seed']}",
        attempts=2 if status == "failed" else int(ran),
        seconds=90.0 * ran,
        optimizer_steps=(SFT_STEPS + RL_STEPS) * ran,
        tokens=10_000 * ran,
    )


def _score(cell: Mapping, suite: str, checkpoint: str, metric: str, value: float) -> StudyScore:
    return StudyScore(**cell, suite=suite, checkpoint=checkpoint, metric=metric, value=value)


def _scores(
    arm: MadeArm, cell: Mapping, shift: float, made: Made, *, has_rl: bool
) -> list[StudyScore]:
    noise = random.Random(f"{cell['seed']} of {arm.name}")
    levels = {"base": 0.1, "sft": arm.before, "rl": arm.after}
    if not arm.has_sft:
        levels["base"] = levels.pop("sft")
    if not has_rl:
        levels.pop("rl")
    found = []
    for place, suite in enumerate(made.suites):
        for checkpoint, level in levels.items():
            one = level * (1.0 - 0.5 * place) + shift + noise.gauss(0.0, OWN_SD)
            rest = {"entropy": 1.0 - level, "mean_length": 60.0 + 10 * level}
            for metric, value in {
                "pass_at_1": one,
                "pass_at_8": min(1.0, one + 0.15),
                **rest,
            }.items():
                found.append(_score(cell, suite, checkpoint, metric, value))
    for metric, value in {
        "update/relative_sft_norm": 0.1 + 0.2 * arm.before,
        "update/relative_rl_norm": 0.05,
        "update/cosine": 0.2,
    }.items():
        if has_rl or metric == "update/relative_sft_norm":
            found.append(_score(cell, "", "", metric, value + noise.gauss(0.0, 0.002)))
    return found


def _curves(arm: MadeArm, cell: Mapping, shift: float, *, last: int) -> list[StudyPoint]:
    noise = random.Random(f"{arm.name} {cell['seed']} curves")
    found = []

    def log(stage: str, step: int, **metrics: float) -> None:
        found.extend(
            StudyPoint(**cell, stage=stage, step=step, metric=f"{stage}/{name}", value=value)
            for name, value in metrics.items()
        )

    for step in range(1, SFT_STEPS + 1):
        level = {"nll": 2.0 * math.exp(-step / 8) + 0.4 + noise.gauss(0.0, 0.03)}
        if arm.weights != "uniform":
            level |= {
                "ess_fraction": 0.6 + 0.01 * step,
                "log_ratio_clip_low_fraction": 0.8 - 0.02 * step,
                "log_weight_floor_fraction": 0.0,
            }
        log("sft", step, **level)
    for step in range(1, last + 1):
        progress = 1.0 - math.exp(-step / 8)
        reward = arm.before + (arm.after - arm.before) * progress + shift + noise.gauss(0, 0.03)
        log("rl", step, **{"reward/mean": reward, "entropy": 0.5, "kl_to_init": 0.02 * step})
        if step % 10 == 0:
            log("rl", step, **{"eval/pass_at_1": reward, "eval/pass_at_8": reward + 0.1})
    return found


def registered(primary: PrimaryConfig, **changes: object) -> Made:
    """A study that was registered an hour before RL."""
    facts = RegistrationFacts(time=START, first_rl_time=START + 3600, content_hash="ab12")
    return dataclasses.replace(Made(primary=primary, registration=facts), **changes)
