"""`study.json`: what a study's runner knows and its tables do not say."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pear_ray.artifacts.run_dir import write_json
from pear_ray.config.run import RunConfig
from pear_ray.config.study import BudgetConfig
from pear_ray.config.study_plan import Arm
from pear_ray.errors import ArtifactError

FACTS_FILE = "study.json"
StudyState = Literal["running", "done", "stopped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmFacts:
    """An arm as it runs, with what its resolved run says of its SFT.

    Attributes:
        parent: The arm of the study file that it was added to; its own name if it stands there.
        control: What it does to its parent's weights; None for an arm of the file.
        rescaled: Whether the weights of a batch are divided by their mean, by the study.
        overrides: Dotted keys over the study's.
        weights: `sft.weights.kind`.
        objective: `sft.objective.kind`.
        has_sft: Whether it trains before RL at all.
    """

    name: str
    parent: str
    control: str | None
    rescaled: bool
    overrides: dict[str, Any]
    weights: str
    objective: str
    has_sft: bool

    @property
    def is_uniform(self) -> bool:
        """Whether it is plain SFT, which every other arm is compared with."""
        return self.has_sft and self.weights == "uniform" and self.objective == "nll"


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationFacts:
    """What was written down before RL.

    Attributes:
        time: When, in Unix seconds.
        first_rl_time: When the first RL of a reported run began; None before that.
        content_hash: Of arms, seeds, score and primary comparison, as they were registered.
    """

    time: float
    first_rl_time: float | None
    content_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetUse:
    """One limit of the study's, or what it used where there is none.

    Attributes:
        name: A field of `budget`: `optimizer_steps`, `tokens` or `device_hours`.
        limit: None: unlimited.
        used: By all runs so far.
    """

    name: str
    limit: float | None
    used: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyFacts:
    """What `study.json` says.

    Attributes:
        arms: In the order of the study.
        state: `stopped`: by hand, by the budget, or by an error, before all runs were done.
        learning_rates: The one chosen for each arm that was tuned.
        registration: None where the study is not registered.
        changed_since_registration: In words, each thing that is no longer as registered.
        budget: What there is a limit of, and what was used.
    """

    arms: Sequence[ArmFacts]
    state: StudyState
    learning_rates: dict[str, float] = field(default_factory=dict)
    registration: RegistrationFacts | None = None
    changed_since_registration: Sequence[str] = ()
    budget: Sequence[BudgetUse] = ()


def arm_facts(arm: Arm, run: RunConfig) -> ArmFacts:
    """The facts of `arm`, whose runs are as `run`, but for seed and learning rate."""
    return ArmFacts(
        name=arm.name,
        parent=arm.parent,
        control=arm.control,
        rescaled=arm.rescaled,
        overrides=dict(arm.overrides),
        weights=run.sft.weights.kind,
        objective=run.sft.objective.kind,
        has_sft=run.sft.num_epochs > 0,
    )


def budget_uses(budget: BudgetConfig, **used: float) -> list[BudgetUse]:
    """Each of `used`, named as a field of `budget`, with its limit."""
    return [
        BudgetUse(name=name, limit=getattr(budget, name), used=value)
        for name, value in used.items()
    ]


def write_facts(study_dir: Path, facts: StudyFacts) -> None:
    """Write `study.json` into the study's folder, whole or not at all."""
    write_json(study_dir / FACTS_FILE, asdict(facts))


def read_facts(study_dir: Path) -> StudyFacts:
    """What `study.json` in the study's folder says.

    Raises:
        ArtifactError: It is missing, or of another version.
    """
    path = study_dir / FACTS_FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        registration = tree["registration"]
        return StudyFacts(
            arms=[ArmFacts(**arm) for arm in tree["arms"]],
            state=tree["state"],
            learning_rates=tree["learning_rates"],
            registration=None if registration is None else RegistrationFacts(**registration),
            changed_since_registration=tree["changed_since_registration"],
            budget=[BudgetUse(**each) for each in tree["budget"]],
        )
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path}: no such file, so this is no folder of a study; give the one that "
            "`pear study` wrote"
        ) from error
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ArtifactError(
            f"{path}: not of this version ({error}); run `pear study` again, which writes it anew"
        ) from error
