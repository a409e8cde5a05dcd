"""What a study's report reads: its config, its facts, and its tables, by arm and seed."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pydantic import ValidationError

from pear_ray.artifacts.study_facts import ArmFacts, StudyFacts, read_facts
from pear_ray.artifacts.study_results import (
    CURVES_FILE,
    RUNS_FILE,
    SCORES_FILE,
    STUDY_CURVES,
    STUDY_RUNS,
    STUDY_SCORES,
    StudyRun,
)
from pear_ray.artifacts.tables import read_table
from pear_ray.config.explain import explain
from pear_ray.config.run import read_tree
from pear_ray.config.study import StudyConfig
from pear_ray.errors import ArtifactError

CONFIG_FILE, RESULTS_FOLDER = "study.yaml", "results"
BEFORE, AFTER = "before", "after"  # RL
SFT_HEALTH = (
    "sft/ess_fraction",
    "sft/weight/mean",
    "sft/log_ratio_clip_low_fraction",
    "sft/log_ratio_clip_high_fraction",
    "sft/log_weight_floor_fraction",
    "sft/log_weight_ceiling_fraction",
)
KL_METRIC = "rl/kl_to_init"
_READ = {
    *SFT_HEALTH,
    KL_METRIC,
    *("sft/nll", "sft/heldout/nll", "rl/reward/mean", "rl/correct_fraction", "rl/entropy"),
}
_PASS = re.compile(r"(?:sft|rl)/eval/pass_at_\d+")
BySeed = Mapping[int, float]
Curve = Mapping[int, float]  # value by step


@dataclass(frozen=True, slots=True)
class StudyData:
    """A study so far. Scores and curves are of reported runs, but for `tuning_scores`.

    Attributes:
        scores: By arm, suite, checkpoint and metric: the value of each seed.
        tuning_scores: By arm and learning rate: the study's score after RL of each tuning seed.
        curves: By arm and metric: each seed's.
        strangers: Arms and seeds of the tables that the study no longer has.
    """

    config: StudyConfig
    facts: StudyFacts
    runs: list[StudyRun]
    scores: Mapping[tuple[str, str, str, str], BySeed]
    tuning_scores: Mapping[tuple[str, float], BySeed]
    curves: Mapping[tuple[str, str], Mapping[int, Curve]]
    strangers: list[str]

    @property
    def arms(self) -> list[str]:
        """Names, in the study's order."""
        return [arm.name for arm in self.facts.arms]

    @property
    def alpha(self) -> float:
        """The level that p is held to."""
        primary = self.config.primary
        return primary.alpha if primary else round(1.0 - self.config.confidence, 12)

    @property
    def baseline(self) -> ArmFacts:
        """The arm that the others are compared with: plain SFT, or else the first."""
        uniform = [arm for arm in self.facts.arms if arm.is_uniform]
        return (uniform or list(self.facts.arms))[0]

    def arm(self, name: str) -> ArmFacts:
        """Its facts."""
        return next(arm for arm in self.facts.arms if arm.name == name)

    def values(self, arm: str, suite: str, when: str, metric: str) -> BySeed:
        """Each seed's score `before` or `after` RL; before it, the base model's without SFT."""
        if when == AFTER:
            return self.scores.get((arm, suite, "rl", metric), {})
        before = self.scores.get((arm, suite, "sft", metric), {})
        if not before and not self.arm(arm).has_sft:
            before = self.scores.get((arm, suite, "base", metric), {})
        return before

    def suites(self) -> list[str]:
        """Those with a score, the study's first."""
        found = {suite for _, suite, checkpoint, _ in self.scores if checkpoint}
        first = self.config.score.suite
        return sorted(found, key=lambda suite: (suite != first, suite))

    def metrics(self, suite: str) -> set[str]:
        """What the suite's checkpoints are scored by."""
        return {
            metric for _, each, checkpoint, metric in self.scores if checkpoint and each == suite
        }


def load_study_data(study_dir: Path) -> StudyData:
    """All that the study in `study_dir` has found so far.

    Raises:
        ArtifactError: It is no study's folder, or something in it is of another version.
        ConfigError: `study.yaml` is missing or not YAML.
    """
    facts, config = read_facts(study_dir), _read_config(study_dir / CONFIG_FILE)
    results = study_dir / RESULTS_FOLDER
    arms = {arm.name for arm in facts.arms}
    seeds = {True: set(config.tune.seeds if config.tune else ()), False: set(config.seeds)}

    def is_known(row: Mapping[str, object]) -> bool:
        return row["arm"] in arms and row["seed"] in seeds[bool(row["is_tuning"])]

    runs = _rows(results / RUNS_FILE, STUDY_RUNS)
    scores = [row for row in _rows(results / SCORES_FILE, STUDY_SCORES) if is_known(row)]
    strangers = {f"{row['arm']} seed {row['seed']}" for row in runs if not is_known(row)}
    return StudyData(
        config=config,
        facts=facts,
        runs=[StudyRun(**row) for row in runs if is_known(row)],
        scores=_scores(row for row in scores if not row["is_tuning"]),
        tuning_scores=_tuning_scores((row for row in scores if row["is_tuning"]), config),
        curves=_curves(results / CURVES_FILE, is_known),
        strangers=sorted(strangers),
    )


def _read_config(path: Path) -> StudyConfig:
    try:
        return StudyConfig.model_validate_json(json.dumps(read_tree(path)))
    except ValidationError as error:
        problems = "\n".join(explain(error, StudyConfig))
        raise ArtifactError(
            f"{path}: not a study of this version; run `pear study` again\n{problems}"
        ) from error


def _rows(path: Path, schema: pa.Schema) -> list[dict]:
    """None before the first run has ended, when there is no table yet."""
    return read_table(path, schema).to_pylist() if path.exists() else []


def _scores(rows: Iterable[Mapping]) -> dict[tuple[str, str, str, str], BySeed]:
    found: dict[tuple[str, str, str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if math.isfinite(row["value"]):
            key = (row["arm"], row["suite"], row["checkpoint"], row["metric"])
            found[key][row["seed"]] = row["value"]
    return dict(found)


def _tuning_scores(rows: Iterable[Mapping], config: StudyConfig) -> dict[tuple[str, float], BySeed]:
    wanted = (config.score.suite, "rl", config.score.metric)
    found: dict[tuple[str, float], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if (row["suite"], row["checkpoint"], row["metric"]) == wanted and math.isfinite(
            row["value"]
        ):
            found[row["arm"], row["learning_rate"]][row["seed"]] = row["value"]
    return dict(found)


def _curves(
    path: Path, is_known: Callable[[Mapping[str, object]], bool]
) -> dict[tuple[str, str], dict[int, dict[int, float]]]:
    """Only of the metrics that are shown: a study logs a hundred times as much."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    if not path.exists():
        return {}
    table = read_table(path, STUDY_CURVES)
    names = table["metric"].unique().to_pylist()
    wanted = {name for name in names if name in _READ or _PASS.fullmatch(name)}
    rows = zip(table["metric"].to_pylist(), table["is_tuning"].to_pylist(), strict=True)
    kept = table.filter(
        pa.array([name in wanted and not tuning for name, tuning in rows], pa.bool_())
    )
    for row in kept.to_pylist():
        if is_known(row) and math.isfinite(row["value"]):
            found[row["arm"], row["metric"]][row["seed"]][row["step"]] = row["value"]
    return {key: dict(seeds) for key, seeds in found.items()}
