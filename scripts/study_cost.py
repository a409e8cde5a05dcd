"""What a study takes of a kind of GPU, as `pear plan` estimates each of its runs: a Markdown table.

    python scripts/study_cost.py STUDY.yaml [key=value ...] --device h100 --rows N

Keys are the study's: `'overrides={models.policy: FOLDER}'` reaches its runs. Of a model a folder
with its config.json is enough.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pear_ray.config.run import RunConfig
from pear_ray.config.spans import engine_span
from pear_ray.config.study_plan import Cell, StudyPlan, load_study
from pear_ray.engines.model_files import config_folder
from pear_ray.errors import PearRayError
from pear_ray.memory.durations import Workload, plan_durations
from pear_ray.memory.pace import DEVICES, pace_of_gpu
from pear_ray.memory.phases import ModelShapes, read_shapes

SHARED = ("collect", "score")  # made once, for all runs
HOUR_S = 3600
NAMED = 3  # more arms than this are "and others"


@dataclass(frozen=True, slots=True)
class Cost:
    """GPU-hours of each phase of one run, in the run's order."""

    by_phase: dict[str, float]

    @property
    def shared(self) -> float:
        """Of what all runs of the study share."""
        return sum(self.by_phase.get(phase, 0.0) for phase in SHARED)

    @property
    def own(self) -> float:
        """Of what each run does for itself."""
        return sum(self.by_phase.values()) - self.shared


def cost_of(run: RunConfig, *, device: str, workload: Workload) -> Cost:
    """The run's GPU-hours: seconds times the devices that a phase holds.

    Raises:
        InputError: A model's config.json cannot be had or read.
    """
    pace = pace_of_gpu(DEVICES[device], run.models.dtype)
    durations = plan_durations(run, _shapes(run), pace, workload)
    cluster = run.cluster
    held = {
        "collect": cluster.num_samplers * engine_span(run, "collect"),
        "score": cluster.num_samplers * engine_span(run, "score"),
        "sft": cluster.num_trainers,
        "rl": cluster.num_trainers,
        "evaluate": cluster.num_samplers * engine_span(run, "evaluate"),
    }
    return Cost({each.phase: each.seconds * held[each.phase] / HOUR_S for each in durations})


def cost_lines(plan: StudyPlan, *, device: str, workload: Workload) -> Iterator[str]:
    """The table: what is shared, arms of like cost together, the arms as the file has them, all."""
    seeds = len(plan.study.seeds)
    costs = {
        arm: cost_of(
            plan.run_of(Cell(arm=arm, seed=plan.study.seeds[0])), device=device, workload=workload
        )
        for arm in plan.arms
    }
    shared = next(iter(costs.values())).shared
    yield "| runs | arms x seeds | `sft` + `rl` + `evaluate` of each | GPU-hours |"
    yield "|---|---|---|---|"
    yield f"| corpus and scores, once | | | {shared:,.1f} |"
    for own in dict.fromkeys(_words(cost) for cost in costs.values()):
        arms = [arm for arm, cost in costs.items() if _words(cost) == own]
        together = sum(costs[arm].own for arm in arms) * seeds
        yield f"| {_names(arms)} | {len(arms)} x {seeds} | {own} | {together:,.0f} |"
    plain = [name for name, arm in plan.arms.items() if not arm.control and not arm.rescaled]
    for name, arms in (("arms of the file alone", plain), ("all", list(plan.arms))):
        total = shared + sum(costs[arm].own for arm in arms) * seeds
        yield f"| {name}, with corpus and scores | {len(arms)} x {seeds} | | {total:,.0f} |"


def _words(cost: Cost) -> str:
    parts = [f"{hours:.1f}" for phase, hours in cost.by_phase.items() if phase not in SHARED]
    return f"{' + '.join(parts)} = {cost.own:.1f}"


def _names(arms: list[str]) -> str:
    return (
        ", ".join(f"`{arm}`" for arm in arms) if len(arms) <= NAMED else f"`{arms[0]}` and others"
    )


def _shapes(run: RunConfig) -> ModelShapes:
    behavior = run.models.behavior
    named = {"*": behavior} if isinstance(behavior, str) else behavior or {}
    folders = {source: config_folder(location) for source, location in named.items()}
    return read_shapes(config_folder(run.models.policy), folders)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study_file", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--device", choices=sorted(DEVICES), required=True)
    parser.add_argument("--rows", type=int, help="of the corpus")
    parser.add_argument("--row-tokens", type=int, help="mean; half of models.max_model_len")
    parser.add_argument("--completion-tokens", type=int, help="mean; half of max_tokens")
    parsed = parser.parse_args(arguments)
    try:
        plan = load_study(parsed.study_file, parsed.overrides)
        models = plan.shared_run().models
        workload = Workload(
            num_rows=parsed.rows,
            row_tokens=parsed.row_tokens or models.max_model_len // 2,
            completion_tokens=parsed.completion_tokens,
        )
        lines = list(cost_lines(plan, device=parsed.device, workload=workload))
    except PearRayError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
