"""The report's chapters: which figures each holds, and what it says where an input is missing."""

from collections.abc import Callable
from dataclasses import dataclass, field

from pear_ray.config.corpus import SampledCorpus
from pear_ray.config.sft import PearWeights, describe_weights
from pear_ray.reporting import (
    corpus_figures,
    outcome,
    rl_figures,
    rl_health_figures,
    source_figures,
    time_figures,
    training_figures,
)
from pear_ray.reporting.load import RunData
from pear_ray.reporting.page import Table
from pear_ray.reporting.plot import Chart
from pear_ray.telemetry.follow import SPEED_METRIC

_NO_SFT = "no SFT: sft.num_epochs is 0, and the policy goes on as it came"
_CONTROLS = {
    "shuffled": "A control: the arm's own weights, each given to another place of its step.",
    "position_profile": "A control: each token has the step's mean weight at its distance from the "
    "end of its sequence.",
    "likelihood_only": "A control: the behavior policy's log-probs count as 0, so that log-ratios "
    "are the policy's log-probs.",
}


@dataclass(slots=True)
class Section:
    """One chapter of the page.

    Attributes:
        notes: Sentences above the figures.
        missing: A sentence for each figure that could not be drawn or would show one number.
    """

    anchor: str
    title: str
    charts: list[Chart] = field(default_factory=list)
    wide: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def draw(
        self, data: RunData, stage: str, name: str, figure: Callable[[RunData], Chart]
    ) -> None:
        """Add a figure of the stage's metric `name`, or say that nothing logged it."""
        if data.has(stage, name):
            self.charts.append(figure(data))
        else:
            self.missing.append(f"no figure of {name}: stage `{stage}` has not logged it")

    def draw_if_any(self, data: RunData, name: str, figure: Callable[[RunData], Chart]) -> None:
        """Add a figure of a metric that not every RL run has; without it, nothing."""
        if data.has("rl", name):
            self.charts.append(figure(data))


def build_sections(data: RunData) -> list[Section]:
    """Every chapter with figures, in reading order."""
    return [
        _outcome(data),
        _corpus(data),
        _weights(data),
        _sft(data),
        *_rl(data),
        _time(data),
    ]


def _outcome(data: RunData) -> Section:
    section = Section("outcome", "Outcome")
    evaluated = [each for each in data.suites if each.checkpoints]
    for each in evaluated:
        row = section.wide if outcome.has_many_passes(each) else section.charts
        row.append(outcome.pass_at_k(each, named=len(evaluated) > 1))
    if table := outcome.paired_table(data):
        section.tables.append(table)
    return section


def _corpus(data: RunData) -> Section:
    section = Section("corpus", "Corpus")
    if data.corpus is None:
        section.missing.append(data.missing["corpus"])
    elif len(data.corpus.num_loss_tokens):
        limit = None
        if data.config and isinstance(data.config.corpus, SampledCorpus):
            limit = data.config.corpus.max_tokens
        section.charts.append(corpus_figures.length_histogram(data.corpus, limit))
    else:
        section.missing.append("the corpus holds no row")
    _verified(section, data)
    if data.corpus is not None and len(data.corpus.behavior_logprob_means):
        section.charts.append(corpus_figures.behavior_histogram(data.corpus))
    else:
        section.missing.append("no behavior log-probs: run the stage `score`")
    return section


def _verified(section: Section, data: RunData) -> None:
    name = "collect/verified_fraction"
    values = data.series("collect", name)[1]
    if len(values) == 1:  # a dot is no figure
        section.missing.append(f"{100 * values[0]:.1f} % of the sampled completions were verified")
    elif data.config is None or isinstance(data.config.corpus, SampledCorpus):
        section.draw(data, "collect", name, corpus_figures.verified_fraction)
    else:
        section.missing.append("no verified fraction: the corpus was read from a file")


def _weights(data: RunData) -> Section:
    section = Section("weights", "PEAR weights")
    weights = data.config.sft.weights if data.config else PearWeights()
    if not _trains(data):
        section.missing.append(_NO_SFT)
        return section
    if not isinstance(weights, PearWeights):
        each = "every token weighs 1" if weights.kind == "uniform" else "no ratio is in them"
        section.missing.append(f"sft.weights is {describe_weights(weights)}: {each}")
        return section
    if weights.control != "none":
        section.notes.append(f"{_CONTROLS[weights.control]} Weights are shown as they were used.")
    if data.weights is None:
        section.missing.append(data.missing["weights"])
    elif len(data.weights.steps):
        section.charts.append(corpus_figures.log_ratio_histogram(data.weights, weights))
        section.charts.append(corpus_figures.weights_by_position(data.weights, weights))
    else:
        section.missing.append("sft/weight_samples.parquet holds no row")
    section.draw(data, "sft", "sft/ess_fraction", corpus_figures.effective_sample_size)
    section.draw(data, "sft", "sft/log_ratio_clip_low_fraction", corpus_figures.clip_fractions)
    return section


def _sft(data: RunData) -> Section:
    section = Section("sft", "SFT")
    if not _trains(data):
        section.missing.append(_NO_SFT)
        return section
    _held_out(section, data, "sft")
    section.draw(data, "sft", "sft/weighted_loss", corpus_figures.sft_loss)
    section.draw(data, "sft", "sft/grad_norm", lambda of: training_figures.grad_norm(of, "sft"))
    _gradient_ratio(section, data)
    sources = source_figures.source_names(data)
    if sources:  # only a corpus of several is logged by source
        section.charts.append(source_figures.source_ess(data, sources))
        section.charts.append(source_figures.source_weight_shares(data, sources))
        section.tables.append(source_figures.source_table(data, sources))
    return section


def _trains(data: RunData) -> bool:
    return data.config is None or data.config.sft.num_epochs > 0


def _gradient_ratio(section: Section, data: RunData) -> None:
    name = "sft/grad_norm_ratio_to_uniform"
    values = data.series("sft", name)[1]
    if len(values) > 1:
        section.charts.append(corpus_figures.gradient_ratio(data))
    elif len(values) == 1:  # a dot is no figure
        section.missing.append(
            f"the first step's gradient norm was {values[0]:.3g} of what uniform weights would give"
        )


def _rl(data: RunData) -> list[Section]:
    if not data.metrics["rl"]:
        return [Section("rl", "RL", missing=["no figures of RL: stage `rl` has not logged a step"])]
    return [_rl_learning(data), _rl_health(data)]


def _rl_learning(data: RunData) -> Section:
    section = Section("rl", "RL")
    _held_out(section, data, "rl")
    section.draw(data, "rl", "rl/reward/mean", rl_figures.reward)
    if len(rl_figures.component_names(data)) > 1 or rl_figures.outcome_differs(data):
        section.charts.append(rl_figures.components(data))
    section.draw_if_any(data, "rl/advantage/mean_abs", rl_figures.advantage)
    section.draw(data, "rl", "rl/degenerate_group_fraction", rl_figures.fractions)
    section.draw(data, "rl", "rl/completion_length/mean", rl_figures.length)
    section.draw(data, "rl", "rl/entropy", rl_figures.entropy)
    return section


def _rl_health(data: RunData) -> Section:
    """Whether updates go too far, and whether the sampler is the trainer."""
    section = Section("rl-health", "RL health")
    if sentence := rl_health_figures.self_test(data):
        section.notes.append(sentence)
    section.draw(data, "rl", "rl/grad_norm", lambda of: training_figures.grad_norm(of, "rl"))
    section.draw(data, "rl", "rl/mismatch/mean_gap", rl_health_figures.gaps)
    section.draw_if_any(data, "rl/kl_to_init", rl_health_figures.kl)
    if rl_health_figures.updates_move(data):
        section.draw_if_any(data, "rl/clip_fraction/high", rl_health_figures.clip_fractions)
        section.charts.append(rl_health_figures.ratios(data))
    elif data.has("rl", "rl/ratio/max"):
        section.missing.append(
            "every ratio was 1 and no clip bound, as it must be where each rollout batch has one "
            "update"
        )
    if rl_health_figures.mismatch_costs(data):
        section.charts.append(rl_health_figures.mismatch_cost(data))
    elif data.has("rl", "rl/mismatch/ess_fraction"):
        section.missing.append(rl_health_figures.NO_MISMATCH_COST)
    return section


def _held_out(section: Section, data: RunData, stage: str) -> None:
    """pass@k while the stage trained, where the run asked for it."""
    if outcome.evaluated_while_training(data, stage):
        section.charts.append(outcome.pass_at_k_over_steps(data, stage))


def _time(data: RunData) -> Section:
    section = Section("time", "Time, tokens and memory")
    if data.manifests:
        section.charts.append(time_figures.stage_time(data))
    else:
        section.missing.append("no time per stage: no stage has finished yet")
    if any(data.has(stage, SPEED_METRIC[stage]) for stage in data.metrics):
        section.charts.append(time_figures.speed(data))
    else:
        section.missing.append("no stage has logged tokens per second")
    section.draw_if_any(data, "rl/tokens_per_s/train", time_figures.phase_speed)
    if data.has("rl", *time_figures.memory_metrics()):
        section.charts.append(time_figures.memory(data))
    if data.has("rl", "time/step_s"):
        section.charts.append(time_figures.step_time(data))
    else:
        section.missing.append("no figure of time/step_s: stage `rl` has not logged it")
    return section
