"""A study: arms that differ in their SFT, times seeds, all with the same corpus and RL."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from pear_ray.config.base import Section
from pear_ray.config.evaluate import MAIN_SUITE

ArmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")]
Control = Literal["shuffled", "position_profile", "likelihood_only"]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class ArmConfig(Section):
    """One way to do the SFT, and the controls that belong to it."""

    name: ArmName
    """What the report calls it."""
    overrides: dict[str, JsonValue] = Field(default={})
    """Dotted keys of the run and their values here, such as `{sft.weights.level: sequence}`."""
    controls: list[Control] = Field(default=[])
    """Arms to add that weigh as this one does, but for one thing: its weights at the wrong tokens
    or sequences; only their mean by position; the policy's likelihood without the teacher's."""
    rescaled: Literal["both", "no", "only"] = "both"
    """Of an arm with PEAR weights and of its controls: as they are, divided by their mean in each
    batch, or (two arms each) both. Small weights alone make an optimizer starve, whatever they
    say."""


class TuneConfig(Section):
    """Each arm's learning rate, chosen by its score after RL on seeds that are not reported."""

    learning_rates: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2)]
    """What `sft.optimizer.learning_rate` may be."""
    seeds: Seeds
    """None of `seeds`."""


class ScoreOfStudy(Section):
    """The number that the study is about."""

    suite: str = MAIN_SUITE
    """Of `evaluate`."""
    metric: str = "pass_at_1"
    """As in docs/evaluation.md."""


class PrimaryConfig(Section):
    """The comparison that the study was made for."""

    arm: str
    """The arm that is expected to end higher after RL."""
    against: Annotated[list[str], Field(min_length=1)]
    """It counts only if it is above every one of these."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Two-sided level of each comparison's exact sign-flip test over seeds; all must hold."""


class BudgetConfig(Section):
    """What the study may take; what no longer fits is reported as not run."""

    optimizer_steps: Annotated[int, Field(gt=0)] | None = None
    """Of SFT and RL together, over all runs."""
    tokens: Annotated[int, Field(gt=0)] | None = None
    """Trained on or sampled, over all runs."""
    device_hours: Annotated[float, Field(gt=0)] | None = None
    """Seconds of runs times their trainers, a packed one counting as one, in hours."""


class StudyConfig(Section):
    """Everything one study needs to know."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Names the study's folder under `output_dir`; equals the file's stem."""
    output_dir: str = "outputs"
    """Where the study's folder goes."""
    base: str
    """The run file that all arms begin with, seen from the study file."""
    overrides: dict[str, JsonValue] = Field(default={})
    """Dotted keys of the run and their values in every arm."""
    arms: Annotated[list[ArmConfig], Field(min_length=1)]
    """What is compared."""
    seeds: Seeds
    """Each arm runs once with each; a seed decides the order of the corpus, problems and samples,
    the same for every arm."""
    tune: TuneConfig | None = None
    """None: every arm has the learning rate of its settings."""
    score: ScoreOfStudy = ScoreOfStudy()
    """What is tuned by and compared."""
    primary: PrimaryConfig | None = None
    """None: everything is exploratory, and the report says so."""
    registered: bool = False
    """Write down arms, seeds, score and primary comparison before any RL starts, and hold the
    report to them. Wants `primary`."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Level of the intervals over seeds."""
    budget: BudgetConfig = BudgetConfig()
    """Limits; none unless set."""
    packed: bool | None = None
    """Whether each run is one worker's, which does all its stages in one process and keeps its
    engine from run to run. None: where `cluster.num_trainers` is 1."""
    runs_at_once: Annotated[int, Field(gt=0)] | None = None
    """None: as many as the cluster has CPUs (packed: and GPUs by `gpus_per_run`) for."""
    gpus_per_run: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a GPU that a packed run asks Ray for (CUDA only); set `cluster.gpu_memory_fraction`
    below it."""
    max_retries: Annotated[int, Field(ge=0)] = 1
    """How often a run whose worker died is started again, from its last complete stage. One that
    ends with an error of its own is not."""

    @model_validator(mode="after")
    def _seeds_are_distinct(self) -> "StudyConfig":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds} has one twice; give each once")
        if self.tune is not None and (shared := sorted(set(self.seeds) & set(self.tune.seeds))):
            raise ValueError(
                f"tune.seeds and seeds share {shared}; a rate chosen on a seed is not judged by it"
            )
        return self

    @model_validator(mode="after")
    def _names_are_distinct(self) -> "StudyConfig":
        names = [arm.name for arm in self.arms]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"arms: two are called {', '.join(twice)}; rename one")
        if self.registered and self.primary is None:
            raise ValueError("registered=true has nothing to register; set `primary`")
        return self
