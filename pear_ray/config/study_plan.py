"""What a study runs: its arms with their controls, and the run config of each cell."""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import JsonValue, ValidationError

from pear_ray.config.evaluate import suites_of
from pear_ray.config.explain import explain
from pear_ray.config.run import RunConfig, read_override, read_tree, set_key, validate_run
from pear_ray.config.sft import WeightsConfig
from pear_ray.config.study import ArmConfig, Control, StudyConfig
from pear_ray.errors import ConfigError

LEARNING_RATE = "sft.optimizer.learning_rate"
RESCALED = "mean_one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """An arm as it runs: of the file, or added to one of the file.

    Attributes:
        name: `pear`, `pear.shuffled`, `pear.shuffled.mean_one`.
        overrides: Dotted keys over the study's.
        parent: The arm of the file that it was added to; its own name if it stands there.
        control: What it does to its parent's weights.
        rescaled: Whether the weights of a batch are divided by their mean.
    """

    name: str
    overrides: dict[str, JsonValue]
    parent: str
    control: Control | None = None
    rescaled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of a study.

    Attributes:
        arm: The arm's name.
        seed: The run's seed.
        learning_rate: Where it is tuned, the one of this run; else None.
        is_tuning: Whether it only helps to choose a learning rate.
    """

    arm: str
    seed: int
    learning_rate: float | None = None
    is_tuning: bool = False

    @property
    def name(self) -> str:
        """The run's name, and its folder's under `runs/`."""
        rate = "" if self.learning_rate is None else f"-lr{self.learning_rate:g}"
        return f"{self.arm}{rate}-seed{self.seed}"


def _expand(arm: ArmConfig, weights: WeightsConfig) -> Iterator[Arm]:
    """`arm` and what belongs to it; `weights` are its own."""
    if arm.controls and weights.kind != "pear":
        raise ConfigError(
            f"arm {arm.name!r} has controls, and its weights are {weights.kind}: only PEAR's have "
            "any; leave `controls` out"
        )
    choosable = weights.kind == "pear" and weights.rescale == "none"
    both = {"both": (False, True), "no": (False,), "only": (True,)}
    for control in (None, *arm.controls):
        for rescaled in both[arm.rescaled] if choosable else (False,):
            # Whole, whatever the base run says: it takes the keys that follow.
            written = json.loads(weights.model_dump_json(exclude_defaults=True))
            overrides = {**arm.overrides, "sft.weights": {"kind": weights.kind} | written}
            if control is not None:
                overrides["sft.weights.control"] = control
            if rescaled:
                overrides["sft.weights.rescale"] = "batch_mean_one"
            marks = [arm.name, control, RESCALED if rescaled and arm.rescaled == "both" else None]
            yield Arm(
                name=".".join(mark for mark in marks if mark),
                overrides=overrides,
                parent=arm.name,
                control=control,
                rescaled=rescaled,
            )


class StudyPlan:
    """A study with its base run: what each cell's run config is."""

    def __init__(self, study: StudyConfig, base: dict[str, Any], *, origin: str) -> None:
        self.study = study
        self._base, self._origin = base, origin
        self.arms = {
            arm.name: arm for each in study.arms for arm in _expand(each, self._weights_of(each))
        }

    def run_of(self, cell: Cell) -> RunConfig:
        """The run of a cell; its folder is `STUDY/runs/NAME`.

        Raises:
            ConfigError: The arm's settings make no run; the message names the arm.
        """
        tree = self._tree(cell.arm, self.arms[cell.arm].overrides, cell.seed)
        tree["name"] = cell.name
        tree["output_dir"] = str(Path(self.study.output_dir) / self.study.name / "runs")
        if cell.learning_rate is not None:
            set_key(tree, LEARNING_RATE, cell.learning_rate, said_by=LEARNING_RATE)
        return validate_run(tree, origin=f"{self._origin}: arm {cell.arm!r}")

    def shared_run(self) -> RunConfig:
        """The run that collects and scores for all: the first arm's, with the first seed."""
        first = next(iter(self.arms.values()))
        tree = self._tree(first.name, first.overrides, self.study.seeds[0])
        tree["name"] = "shared"
        tree["output_dir"] = str(Path(self.study.output_dir) / self.study.name)
        return validate_run(tree, origin=self._origin)

    def is_tuned(self, arm: str) -> bool:
        """Whether the arm has an SFT whose learning rate is to be chosen."""
        return self.study.tune is not None and self._run(arm).sft.num_epochs > 0

    def tuning_cells(self) -> list[Cell]:
        """Every arm with every learning rate, seed by seed."""
        tune = self.study.tune
        if tune is None:
            return []
        return [
            Cell(arm=arm, seed=seed, learning_rate=rate, is_tuning=True)
            for seed in tune.seeds
            for arm in self.arms
            if self.is_tuned(arm)
            for rate in tune.learning_rates
        ]

    def reported_cells(self, rates: dict[str, float]) -> list[Cell]:
        """Every arm with every seed, seed by seed: a study that is cut short has whole pairs.

        Args:
            rates: The learning rate chosen for each arm that is tuned.
        """
        return [
            Cell(arm=arm, seed=seed, learning_rate=rates.get(arm))
            for seed in self.study.seeds
            for arm in self.arms
        ]

    def _weights_of(self, arm: ArmConfig) -> WeightsConfig:
        tree = self._tree(arm.name, arm.overrides, self.study.seeds[0])
        return validate_run(tree, origin=f"{self._origin}: arm {arm.name!r}").sft.weights

    def _run(self, arm: str) -> RunConfig:
        return self.run_of(Cell(arm=arm, seed=self.study.seeds[0]))

    def _tree(self, arm: str, arm_overrides: dict[str, JsonValue], seed: int) -> dict[str, Any]:
        tree = copy.deepcopy(self._base)
        for said, overrides in (("overrides", self.study.overrides), (arm, arm_overrides)):
            for key, value in overrides.items():
                set_key(tree, key, copy.deepcopy(value), said_by=f"{said}: {key}")
        tree["seed"] = seed
        if tree.get("corpus", {}).get("kind") == "sampled":  # one corpus, whatever a run's seed
            tree["corpus"].setdefault("seed", self._base.get("seed", 0))
        return tree

    def check(self) -> None:
        """See that every arm makes a run, and that all share one corpus, RL and evaluation.

        Raises:
            ConfigError: One does not; the message names the arm and what differs.
        """
        first = self._run(next(iter(self.arms)))
        for name in self.arms:
            run = self._run(name)
            for section in ("corpus", "score", "models", "rl", "evaluate"):
                if getattr(run, section) != getattr(first, section):
                    raise ConfigError(
                        f"{self._origin}: arm {name!r} changes `{section}`, which all arms share: "
                        "then it would not be the SFT that is compared; put it under `overrides` "
                        "of the study, or make it a study of its own"
                    )
        primary = self.study.primary
        for wanted in (primary.arm, *primary.against) if primary else ():
            if wanted not in self.arms:
                raise ConfigError(
                    f"{self._origin}: primary names the arm {wanted!r}; there are "
                    f"{', '.join(self.arms)}"
                )
        names = [suite.name for suite in suites_of(first.evaluate)]
        if self.study.score.suite not in names:
            raise ConfigError(
                f"{self._origin}: score.suite={self.study.score.suite!r} is not evaluated; the "
                f"base run has {', '.join(names)}"
            )


_RUNS_KEYS = RunConfig.model_fields.keys() - StudyConfig.model_fields.keys()


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudyPlan:
    """Read the study at `path` and its base run, and see that every arm makes a run.

    Raises:
        ConfigError: A file is missing or not YAML, or a key or value cannot be used.
    """
    tree = read_tree(path, noun="study file")
    for override in overrides:
        _apply(tree, override)
    if runs := [key for key in tree if key in _RUNS_KEYS]:
        raise ConfigError(
            f"{path}: {', '.join(runs)}: of the run that all arms begin with, not of the study; "
            "put it under `overrides` (on the command line as in overrides.rl.num_steps=2)"
        )
    try:
        study = StudyConfig.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        problems = "\n".join(explain(error, StudyConfig))
        noun = "problem" if error.error_count() == 1 else "problems"
        raise ConfigError(f"{path}: {error.error_count()} {noun}\n{problems}") from error
    base = read_tree(path.parent / study.base)
    plan = StudyPlan(study, base, origin=str(path))
    plan.check()
    return plan


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set in a study's `tree` what `override` says.

    What stands under `overrides` is keyed by whole dotted keys: `overrides.rl.num_steps=2` is one
    key of the run, and not its section `rl`.
    """
    dotted, value = read_override(override)
    section, _, key = dotted.partition(".")
    if section == "overrides" and key:
        tree["overrides"] = {**(tree.get("overrides") or {}), key: value}
    else:
        set_key(tree, dotted, value, said_by=override)


def dump_study(study: StudyConfig) -> str:
    """The study as YAML, with every default written out."""
    tree = json.loads(study.model_dump_json())
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
