"""Stages in order, passing over what is complete and current."""

import contextlib
import functools
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pear_ray import preflight
from pear_ray.artifacts import manifest, replay, reuse
from pear_ray.artifacts import run_dir as run_dirs
from pear_ray.artifacts.stored.run import RunFolder, run_folder
from pear_ray.config.corpus import SampledCorpus
from pear_ray.config.run import RunConfig, dump_run
from pear_ray.distributed.capacity import check_capacity
from pear_ray.distributed.in_process import is_host
from pear_ray.engines.importing import collector_paused
from pear_ray.engines.model_files import by_source_name
from pear_ray.errors import ArtifactError, PearRayError, StopRequested
from pear_ray.identities import fingerprints
from pear_ray.preflight import Models
from pear_ray.records import HALF_STAGES, STAGES
from pear_ray.stopping import stop_asked, stop_on_sigterm
from pear_ray.tasks.difficulty import describe_band
from pear_ray.tasks.problem_sets import content_of
from pear_ray.telemetry.follow import ProgressState
from pear_ray.telemetry.live import LiveView
from pear_ray.telemetry.metrics_log import METRICS_FILE, MetricsLog, copy_metrics
from pear_ray.telemetry.trackers import open_trackers

CONFIG_FILE = "config.yaml"
# Of the stages that are made on demand, and that no other builds on.
BUILDS_ON = {"diagnose": ("collect", "score")} | dict.fromkeys(
    ("ready", *HALF_STAGES), ("collect", "score", "sft")
)
ENGINE_STAGES = frozenset(
    {"collect", "score", "diagnose", "sft", "ready", "rl", "evaluate", *HALF_STAGES}
)


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage of this run: its identity, and whether it has to be made.

    Attributes:
        is_current: Whether the run's folder holds it.
        reuse_from: Where it does not, another run's folder that does.
        rollouts: Of `rl_train`, the folder of the rollouts to train on.
    """

    name: str
    fingerprint: str
    is_current: bool
    reuse_from: Path | None = None
    rollouts: Path | None = None

    @property
    def is_made(self) -> bool:
        """Whether nothing has to run for it."""
        return self.is_current or self.reuse_from is not None


def plan(
    config: RunConfig,
    run_dir: Path,
    models: Models,
    *,
    only: str | None = None,
    reuse_from: Sequence[Path] = (),
    rollouts: Path | None = None,
) -> list[PlannedStage]:
    """Every stage in order, with whether its artifact is there already, or in another run.

    One that is made on demand is among them only where it is the stage `only`, right behind the
    stages that it builds on. `rollouts` is what `rl_train` is to train on, if not the run's own.

    Raises:
        InputError: A folder of `reuse_from` is no run's, or `rollouts` do not fit the run.
        ArtifactError: A folder of `reuse_from` holds no stage of this run.
    """
    reuse.check_runs(reuse_from)
    identities = fingerprints(config, models)
    names = [name for name in STAGES if only not in BUILDS_ON or name in BUILDS_ON[only]]
    names += [name for name in BUILDS_ON if name == only]
    found: Path | None = None
    if only in HALF_STAGES:
        inputs = {"sft": identities["sft"], **content_of(config.rl.problems)}
        identities["rl_rollouts"] = replay.rollouts_fingerprint(config, inputs)
    if only == "rl_train":
        found = replay.find_rollouts(run_dir, rollouts, current=identities["rl_rollouts"])
        identities["rl_train"] = replay.replay_fingerprint(config, found, sft=identities["sft"])
    for folder in reuse_from:
        if not any(reuse.holder([folder], name, identities[name]) for name in names):
            raise ArtifactError(
                f"--reuse {folder}: none of its complete stages was made by this run's settings "
                "and inputs; compare both config.yaml, or leave --reuse out"
            )
    current = {name: manifest.is_current(run_dir / name, identities[name]) for name in names}
    return [
        PlannedStage(
            name,
            identities[name],
            current[name],
            None if current[name] else reuse.holder(reuse_from, name, identities[name]),
            found if name == "rl_train" else None,
        )
        for name in names
    ]


def run(
    config: RunConfig,
    *,
    only: str | None = None,
    reuse_from: Sequence[Path] = (),
    rollouts: Path | None = None,
    leave_out: Sequence[str] = (),
) -> Path:
    """Run all stages but those to `leave_out`, or the stage `only`; the run's folder.

    A stage that a run of `reuse_from` holds complete, made by the same settings and inputs, is
    taken over from there, and so is what `only` builds on. `rollouts` as in `plan`.

    Raises:
        PearRayError: A stage could not start or failed. What was complete stays complete.
    """
    wait_s = config.cluster.wait_for_store_s
    with run_folder(config.output_dir, config.name, wait_s=wait_s) as folder:
        if only == "rl_train":  # what it trains on is part of its identity
            folder.bring(only, unfinished=False)
        _run(config, folder, only=only, reuse_from=reuse_from, rollouts=rollouts, without=leave_out)
    sys.stdout.write(folder.kept)
    return folder.path


def _run(
    config: RunConfig,
    folder: RunFolder,
    *,
    only: str | None,
    reuse_from: Sequence[Path],
    rollouts: Path | None,
    without: Sequence[str],
) -> None:
    run_dir = folder.path
    run_dirs.check_owner(run_dir, name=config.name)
    models = preflight.check_models(config)
    stages = plan(config, run_dir, models, only=only, reuse_from=reuse_from, rollouts=rollouts)
    to_make = [s.name for s in stages if not s.is_made and only in (None, s.name)]
    if only is not None:
        _require_inputs(stages, only, run_dir)
    if "sft" in to_make:
        check_sources(config, run_dir, stages[0], models)
    if "collect" in to_make:
        preflight.check_corpus(config, models)
    if {"collect", "ready", "rl", "rl_rollouts", "evaluate"}.intersection(to_make):
        preflight.check_problems(config, models.policy, to_make)
        if "rl" in to_make and (words := describe_band(config.rl)):
            sys.stdout.write(f"rl: {words}\n")
    for stage in stages:
        if stage.rollouts is not None and not stage.is_made:
            preflight.check_rollouts(stage.rollouts, models.policy, config.models.max_model_len)
    if config.cluster.address is None and ENGINE_STAGES.intersection(to_make):
        check_capacity(config, preflight.local_resources(config.cluster.device))
    run_dirs.claim(run_dir, name=config.name)
    with run_dirs.driver_lock(run_dir):
        (run_dir / CONFIG_FILE).write_text(dump_run(config), encoding="utf-8")
        attempt = run_dirs.next_attempt(run_dir)
        for stage in taken(stages, only):
            with folder.quiet():
                _take_over(config, run_dir, stage, attempt=attempt)
        wanted = [s for s in stages if only in (None, s.name) and s.name not in without]
        _run_stages(config, folder, wanted, attempt=attempt)


def check_sources(config: RunConfig, run_dir: Path, collect: PlannedStage, models: Models) -> None:
    """See that fixed weights by source name the corpus's sources, where those are known already.

    They are of a corpus that is there, and of one to be sampled. Of others they are looked at as
    soon as `collect` is done.

    Raises:
        ConfigError: See `preflight.check_source_weights`.
    """
    if collect.is_made:
        preflight.check_collected_sources(config, (collect.reuse_from or run_dir) / collect.name)
    elif isinstance(config.corpus, SampledCorpus):
        names = by_source_name(models.behavior)
        preflight.check_source_weights(config, names, of="models.behavior")


def taken(stages: Sequence[PlannedStage], only: str | None) -> list[PlannedStage]:
    """What is taken from other runs: of all `stages`, or of `only` and those before it."""
    names = [stage.name for stage in stages]
    wanted = stages if only is None else stages[: names.index(only) + 1]
    return [stage for stage in wanted if stage.reuse_from is not None]


def _take_over(config: RunConfig, run_dir: Path, stage: PlannedStage, *, attempt: int) -> None:
    """The stage from another run, with its numbers and a record of where it came from."""
    source = stage.reuse_from
    if source is None:
        raise ValueError(f"no run is known to hold {stage.name}")
    made = reuse.take(source / stage.name, run_dir / stage.name, expected=stage.fingerprint)
    copy_metrics(
        source / METRICS_FILE,
        run_dir / METRICS_FILE,
        stage=stage.name,
        run=config.name,
        attempt=attempt,
    )
    log = _log(config, run_dir, stage.name, attempt)
    if others := reuse.other_versions(made):
        log.event("warning", f"taken from {source}, where it was made with {', '.join(others)}")
    log.event("stage_skipped", f"taken from {source}")


def _run_stages(
    config: RunConfig, folder: RunFolder, stages: Sequence[PlannedStage], *, attempt: int
) -> None:
    run_dir = folder.path
    tree = json.loads(config.model_dump_json())
    warn = _log(config, run_dir, stages[0].name, attempt).event
    trackers = open_trackers(
        config.telemetry, run_dir, config.name, tree, warn=lambda text: warn("warning", text)
    )
    with contextlib.ExitStack() as open_things:
        on_look = None
        to_make = [stage.name for stage in stages if not stage.is_made]
        # In a host the study around it shows where its runs are.
        if any(s.name in ENGINE_STAGES and not s.is_made for s in stages) and not is_host():
            on_look = _connect(config, run_dir, to_make, open_things)
        names = [stage.name for stage in stages]
        open_things.enter_context(LiveView(run_dir, names, trackers=trackers, on_look=on_look))
        open_things.enter_context(stop_on_sigterm())
        for stage in stages:
            if stop_asked():
                raise StopRequested(
                    f"stopped before {stage.name}, as SIGTERM asked; run the same command to go on"
                )
            _run_stage(config, folder, stage, attempt=attempt)
            folder.settle(stage.name)
            if stage.name == "collect" and "sft" in to_make:  # before anything is scored
                preflight.check_collected_sources(config, run_dir / stage.name)


def _connect(
    config: RunConfig, run_dir: Path, stages: Sequence[str], open_things: contextlib.ExitStack
) -> Callable[[ProgressState], None]:
    """Connect to Ray for all stages together; what to do there with what is known of the run."""
    from pear_ray.distributed.beacon import beacon  # noqa: PLC0415 - ray takes a second
    from pear_ray.distributed.job_page import job_page, submission_id  # noqa: PLC0415
    from pear_ray.distributed.reachable import check_reachable  # noqa: PLC0415
    from pear_ray.distributed.session import ray_session  # noqa: PLC0415
    from pear_ray.distributed.waiting import require_feasible  # noqa: PLC0415

    session = open_things.enter_context(ray_session(config.cluster))
    require_feasible(config, stages)
    check_reachable(run_dir, stored="://" in config.output_dir)
    if session.dashboard_url:
        sys.stdout.write(f"Ray dashboard: {session.dashboard_url}\n")
    shows = [open_things.enter_context(beacon(config.name, run_dir)).show]
    if submission_id() is not None:
        shows.append(open_things.enter_context(job_page(config.name)).show)

    def show(state: ProgressState) -> None:
        for each in shows:
            each(state)

    return show


def _run_stage(config: RunConfig, folder: RunFolder, stage: PlannedStage, *, attempt: int) -> None:
    run_dir = folder.path
    log = _log(config, run_dir, stage.name, attempt)
    if stage.is_made:
        log.event("stage_skipped", _why_skipped(stage))
        return
    folder.say_through(functools.partial(log.event, "warning"))
    folder.bring(stage.name, unfinished=manifest.is_begun(run_dir / stage.name, stage.fingerprint))
    with folder.quiet():
        resumed = manifest.begin(run_dir / stage.name, stage.fingerprint)
    log.event("stage_started", "goes on where it stopped" if resumed else "begins")
    started = time.monotonic()
    with collector_paused():
        module = importlib.import_module(f"pear_ray.stages.{stage.name}")
    wanted = {} if stage.rollouts is None else {"rollouts": stage.rollouts}
    try:
        with _devices(config, stage.name, log):
            module.run(config, run_dir, attempt=attempt, **wanted)
    except StopRequested as stop:
        log.event("stage_stopped", str(stop))
        raise
    except BaseException as error:  # a KeyboardInterrupt ends a stage as well
        said = str(error) if isinstance(error, PearRayError) else f"{type(error).__name__}: {error}"
        log.event("stage_failed", said)
        raise
    log.event("stage_finished", f"done in {time.monotonic() - started:.1f} s")


def _devices(
    config: RunConfig, stage: str, log: MetricsLog
) -> contextlib.AbstractContextManager[None]:
    """The stage's devices are free within this; a host has its own."""
    if stage not in ENGINE_STAGES or is_host():
        return contextlib.nullcontext()
    from pear_ray.distributed.waiting import devices_for  # noqa: PLC0415 - ray takes a second

    return devices_for(config, stage, say=log.event)


def _why_skipped(stage: PlannedStage) -> str:
    return f"taken from {stage.reuse_from}" if stage.reuse_from else "complete and current"


def _require_inputs(stages: Sequence[PlannedStage], only: str, run_dir: Path) -> None:
    for stage in stages:
        if stage.name == only:
            return
        if only != "report" and not stage.is_made:
            raise ArtifactError(
                f"{run_dir / stage.name}: stage {stage.name!r}, which {only!r} builds on, is "
                f"missing or was made by another config; run `pear {stage.name} RUN.yaml` first, "
                "or `pear run`"
            )


def _log(config: RunConfig, run_dir: Path, stage: str, attempt: int) -> MetricsLog:
    return MetricsLog(run_dir, run=config.name, stage=stage, attempt=attempt)
