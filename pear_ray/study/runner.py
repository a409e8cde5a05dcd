"""`pear study`: shared corpus and scores, learning rates, then every arm with every seed."""

import functools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pear_ray import pipeline, preflight
from pear_ray.artifacts import run_dir as run_dirs
from pear_ray.artifacts.study_facts import (
    ArmFacts,
    BudgetUse,
    StudyFacts,
    StudyState,
    arm_facts,
    budget_uses,
    write_facts,
)
from pear_ray.artifacts.study_results import StudyTables
from pear_ray.clusters.market import training_selector
from pear_ray.config.run import RunConfig
from pear_ray.config.study_plan import Cell, StudyPlan, dump_study
from pear_ray.distributed.call_pool import Call, CallPool, Outcome
from pear_ray.distributed.capacity import worker_environment
from pear_ray.distributed.session import ray_session
from pear_ray.preflight import Models
from pear_ray.stopping import stop_on_sigterm
from pear_ray.study.cell import Measured, measure, run_cell
from pear_ray.study.packing import Packing, packing_of
from pear_ray.study.registration import begin_rl, changes, register, registration_facts
from pear_ray.study.tuning import chosen_rates, score_after_rl

STUDY_FILE = "study.yaml"
RESULTS = "results"
RUNS = "runs"


def study_path(plan: StudyPlan) -> Path:
    """The study's folder."""
    return run_dirs.run_path(plan.study.output_dir, plan.study.name)


def describe(plan: StudyPlan) -> str:
    """What the study would run; nothing is started."""
    tuning, seeds = plan.tuning_cells(), plan.study.seeds
    reported = len(plan.arms) * len(seeds)
    lines = [f"{plan.study.name}: {len(tuning) + reported} runs in {study_path(plan)}"]
    lines += [f"  {name}: {json.dumps(arm.overrides)}" for name, arm in plan.arms.items()]
    if plan.study.tune is not None:
        lines.append(f"  {len(tuning)} of them choose a learning rate for each arm")
    lines.append(f"  {reported} of them are reported: {len(plan.arms)} arms x {len(seeds)} seeds")
    primary = plan.study.primary
    if primary is not None:
        kind = "registered" if plan.study.registered else "not registered"
        lines.append(f"  {primary.arm} against {', '.join(primary.against)} ({kind})")
    return "\n".join(lines) + "\n"


def run_study(plan: StudyPlan) -> Path:
    """Make or finish the study; its folder.

    A run that ends with an error, or whose worker dies too often, is written down as failed, and
    the others go on; a further call tries it again.

    Raises:
        ConfigError: The runs are too large to be packed.
        InputError: The folder belongs to something else, or another process drives the study.
        PearRayError: The corpus all runs share could not be made.
        StopRequested: SIGTERM came; a further call goes on.
    """
    study_dir = study_path(plan)
    run_dirs.check_owner(study_dir, name=plan.study.name)
    models = preflight.check_models(plan.shared_run())
    packing_of(plan, {})  # refuses what cannot be
    run_dirs.claim(study_dir, name=plan.study.name)
    with run_dirs.driver_lock(study_dir):
        (study_dir / STUDY_FILE).write_text(dump_study(plan.study), encoding="utf-8")
        register(plan, study_dir)
        StudyRunner(plan, study_dir, models).run()
    return study_dir


class StudyRunner:
    """The driver of one study; `measured` is what is known so far, by cell."""

    def __init__(self, plan: StudyPlan, study_dir: Path, models: Models) -> None:
        self.plan, self.study_dir, self.models = plan, study_dir, models
        self.measured: dict[Cell, Measured] = {}
        self.rates: dict[str, float] = {}

    def run(self) -> None:
        """All that is not done yet; tables and facts are current after every run."""
        shared = self.plan.shared_run()
        cells = self.plan.tuning_cells()
        state: StudyState = "stopped"
        try:
            with ray_session(shared.cluster) as session, stop_on_sigterm():
                for stage in ("collect", "score"):
                    pipeline.run(shared, only=stage)
                packing = packing_of(self.plan, session.resources)
                with self._pool(shared, packing) as pool:
                    self._run_cells(pool, cells, packing)
                    self.rates = chosen_rates(self.plan, self.measured.values())
                    self._run_cells(pool, self._reported(), packing)
            state = "done"
        finally:
            self._write(state)

    def _reported(self) -> list[Cell]:
        """The cells of the seeds that are reported; those of an arm without a rate have failed."""
        cells = self.plan.reported_cells(self.rates)
        lost = {arm for arm in self.plan.arms if self.plan.is_tuned(arm)} - self.rates.keys()
        for cell in cells:
            if cell.arm in lost:
                detail = "every learning rate failed in tuning"
                self.measured[cell] = measure(
                    cell, self._run_dir(cell), status="failed", detail=detail
                )
        return [cell for cell in cells if cell.arm not in lost]

    def _pool(self, shared: RunConfig, packing: Packing) -> CallPool:
        return CallPool(
            packing.at_once,
            num_cpus=packing.cpus,
            num_gpus=packing.gpus,
            environment=worker_environment(shared.cluster) if packing.packed else {},
            host_of=shared.cluster.device if packing.packed else None,
            selector=training_selector(shared.cluster),  # each trains, or drives what does
        )

    def _run_cells(self, pool: CallPool, cells: Sequence[Cell], packing: Packing) -> None:
        done = [cell for cell in cells if self._is_done(cell)]
        for cell in done:
            self.measured[cell] = measure(cell, self._run_dir(cell), status="done")
        left = [cell for cell in cells if cell not in done]
        if done:
            self._say(f"{len(done)} of {len(cells)} runs are done already")
        if left:
            self._write("running")
            self._say(f"{len(left)} runs to make, {packing.at_once} at once")
        by_name = {cell.name: cell for cell in left}
        begun: list[Cell] = []

        def calls() -> Iterator[Call]:
            for cell in left:
                if self._budget_words():
                    return
                begin_rl(self.study_dir)
                begun.append(cell)
                arguments = (self._run(cell), self.study_dir / "shared")
                yield Call(name=cell.name, function=run_cell, arguments=arguments)

        for number, outcome in enumerate(
            pool.run(calls(), max_retries=self.plan.study.max_retries), start=len(done) + 1
        ):
            cell = by_name[outcome.name]
            self._take(cell, outcome)
            self._say(f"{number}/{len(cells)} {self._words(cell)}")
            self._write("running")
        for cell in left:
            if cell not in begun:
                detail = f"the budget is used up: {self._budget_words()}"
                self.measured[cell] = measure(
                    cell, self._run_dir(cell), status="not_run", detail=detail
                )

    def _take(self, cell: Cell, outcome: Outcome) -> None:
        status = "failed" if outcome.error else "done"
        self.measured[cell] = measure(
            cell, self._run_dir(cell), status=status, detail=outcome.error
        )

    def _run(self, cell: Cell) -> RunConfig:
        """The cell's run, its folder under the study's wherever the worker is."""
        run = self.plan.run_of(cell)
        # How a machine is used is in no stage's identity.
        shares = {"shares_gpu": run.cluster.shares_gpu or self.plan.study.gpus_per_run < 1}
        update = {
            "output_dir": str(self.study_dir / RUNS),
            "cluster": run.cluster.model_copy(update=shares),
        }
        return run.model_copy(update=update)

    def _run_dir(self, cell: Cell) -> Path:
        return self.study_dir / RUNS / cell.name

    def _is_done(self, cell: Cell) -> bool:
        """Whether the cell's run is complete and of the settings that it has now."""
        stages = pipeline.plan(self._run(cell), self._run_dir(cell), self.models)
        return all(stage.is_current for stage in stages if stage.name != "report")

    def _budget_words(self) -> str:
        """The limits that are reached; empty while there are none."""
        return ", ".join(
            f"{each.name}={each.limit:g}"
            for each in self._used()
            if each.limit is not None and each.used >= each.limit
        )

    def _used(self) -> list[BudgetUse]:
        runs = [each.run for each in self.measured.values()]
        trainers = self.plan.shared_run().cluster.num_trainers
        return budget_uses(
            self.plan.study.budget,
            optimizer_steps=sum(run.optimizer_steps for run in runs),
            tokens=sum(run.tokens for run in runs),
            device_hours=sum(run.seconds for run in runs) * trainers / 3600,
        )

    @functools.cached_property
    def _arms(self) -> list[ArmFacts]:
        first = self.plan.study.seeds[0]
        return [
            arm_facts(arm, self.plan.run_of(Cell(arm=arm.name, seed=first)))
            for arm in self.plan.arms.values()
        ]

    def _write(self, state: StudyState) -> None:
        """Tables and facts, as of now."""
        known = list(self.measured.values())
        StudyTables(
            runs=[each.run for each in known],
            scores=[score for each in known for score in each.scores],
            curves=[point for each in known for point in each.curves],
        ).write(self.study_dir / RESULTS)
        facts = StudyFacts(
            arms=self._arms,
            state=state,
            learning_rates=self.rates,
            registration=registration_facts(self.study_dir),
            changed_since_registration=changes(self.plan, self.study_dir),
            budget=self._used(),
        )
        write_facts(self.study_dir, facts)

    def _words(self, cell: Cell) -> str:
        """One line on a run that has just ended."""
        found = self.measured[cell]
        if found.run.status != "done":
            return f"{cell.name} failed: {found.run.detail}"
        score = self.plan.study.score
        before, after = (
            score_after_rl(found, score, checkpoint=checkpoint) for checkpoint in ("sft", "rl")
        )
        return (
            f"{cell.name}: {score.suite} {score.metric} {before:.3f} -> {after:.3f} "
            f"({found.run.seconds:.0f} s)"
        )

    def _say(self, words: str) -> None:
        sys.stdout.write(f"{words}\n")
        sys.stdout.flush()
