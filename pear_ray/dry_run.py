"""What a run would do, in words: stages, batches, devices. Starts nothing, writes nothing."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pear_ray import pipeline, preflight
from pear_ray.artifacts.run_dir import check_owner, run_path
from pear_ray.artifacts.stored.location import is_uri
from pear_ray.artifacts.stored.reading import seen_as_planned
from pear_ray.config.evaluate import suites_of
from pear_ray.config.problems import FileProblems, GameProblems, HubProblems
from pear_ray.config.rewards import describe as describe_rewards
from pear_ray.config.run import RunConfig, verified_sections
from pear_ray.distributed.capacity import check_capacity, demand
from pear_ray.errors import InputError
from pear_ray.machine import memory_bytes
from pear_ray.memory.items import Verdict, summary
from pear_ray.memory.phases import Memory, plan_phases, read_shapes
from pear_ray.tasks.difficulty import describe_band
from pear_ray.tasks.problem_sets import num_problems


def describe(
    config: RunConfig,
    *,
    only: str | None = None,
    reuse_from: Sequence[Path] = (),
    rollouts: Path | None = None,
) -> str:
    """The plan of the run, or of its stage `only`, as text; the rest as in `pipeline.run`.

    Raises:
        PearRayError: What the run itself would refuse before its first engine starts.
    """
    run_dir = (
        seen_as_planned(config.output_dir, config.name)
        if is_uri(config.output_dir)
        else run_path(config.output_dir, config.name)
    )
    check_owner(run_dir, name=config.name)
    models = preflight.check_models(config)
    planned = pipeline.plan(
        config, run_dir, models, only=only, reuse_from=reuse_from, rollouts=rollouts
    )
    stages = [stage for stage in planned if only in (None, stage.name)]
    shown = [*pipeline.taken(planned, only), *stages]
    to_make = [stage.name for stage in stages if not stage.is_made]
    if "sft" in to_make:
        pipeline.check_sources(config, run_dir, planned[0], models)
    if "collect" in to_make:
        preflight.check_corpus(config, models)
    if {"collect", "ready", "rl", "rl_rollouts", "evaluate"}.intersection(to_make):
        preflight.check_problems(config, models.policy, to_make)
    for stage in stages:
        if stage.rollouts is not None and not stage.is_made:
            preflight.check_rollouts(stage.rollouts, models.policy, config.models.max_model_len)
    lines = [
        f"run {config.name} in {config.output_dir if is_uri(config.output_dir) else run_dir}",
        f"policy    {config.models.policy} ({models.policy})",
        *(f"behavior  {model} (source {source})" for source, model in models.behavior.items()),
        "",
        "stages",
        *(_stage_line(run_dir, stage) for stage in planned if stage in shown),
        "",
        "batches",
        *_batch_lines(config),
        "",
        "rewards",
        *_reward_lines(config),
        "",
        "devices",
        *_device_lines(config),
        "",
        "memory",
        *_memory_lines(config, models, only=only),
    ]
    return "\n".join(lines) + "\n"


def _stage_line(run_dir: Path, stage: pipeline.PlannedStage) -> str:
    if stage.is_current:
        what = "skip: complete and current"
    elif stage.reuse_from is not None:
        what = f"take: complete in {stage.reuse_from}"
    elif (run_dir / stage.name).exists():
        what = "make: what is there is unfinished, or of another config"
    else:
        what = "make"
    if stage.rollouts is not None:
        what += f", from {stage.rollouts}"
    return f"  {stage.name:<9} {stage.fingerprint}  {what}"


def _batch_lines(config: RunConfig) -> Iterator[str]:
    ranks, sft, rl = config.cluster.num_trainers, config.sft, config.rl
    size = sft.global_batch_size
    yield (
        f"  sft       {size} sequences per step = {ranks} ranks x {size // ranks}, "
        f"{sft.num_epochs} epochs"
        if sft.num_epochs
        else "  sft       none: 0 epochs, and the policy goes on as it came"
    )
    prompts = rl.prompts_per_step
    yield (
        f"  rl        {prompts} prompts x {rl.group_size} = {prompts * rl.group_size} rollouts "
        f"per step = {ranks} ranks x {prompts // ranks * rl.group_size}, {rl.num_steps} steps = "
        f"{prompts * rl.group_size * rl.num_steps} rollouts"
    )
    suites, checkpoints = suites_of(config.evaluate), len(config.evaluate.checkpoints)
    for suite in suites:
        problems, samples = num_problems(suite.problems), suite.num_samples
        name = f"{suite.name}: " if len(suites) > 1 else ""
        yield (
            f"  evaluate  {name}{problems} problems x {samples} samples x {checkpoints} "
            f"checkpoint{'s' if checkpoints > 1 else ''} = {problems * samples * checkpoints}"
        )


def _reward_lines(config: RunConfig) -> Iterator[str]:
    """Where each stage's problems come from, and what verifies them."""
    for stage, each in verified_sections(config).items():
        problems, rewards = each.problems, each.rewards
        match problems:
            case GameProblems():
                source = ", ".join(game.name for game in problems.games)
            case FileProblems():
                source = problems.path
            case HubProblems():
                source = f"hub:{problems.name}"
        terms = describe_rewards(rewards)
        yield f"  {stage:<9} {num_problems(problems)} problems of {source}: {terms}"
    if words := describe_band(config.rl):
        yield f"  {'rl':<9} {words}"


def _device_lines(config: RunConfig) -> Iterator[str]:
    asked = ", ".join(f"{amount:g} {name}" for name, amount in demand(config).items())
    yield f"  asked     {asked} for the largest stage"
    if config.cluster.address:
        yield f"  found     not looked at: the cluster at {config.cluster.address} is not contacted"
        return
    found = preflight.local_resources(config.cluster.device)
    yield (
        "  found     "
        + ", ".join(f"{n:g} {name}" for name, n in found.items())
        + " on this machine"
    )
    check_capacity(config, found)


def _memory_lines(
    config: RunConfig, models: preflight.Models, *, only: str | None
) -> Iterator[str]:
    """One line per phase; a model that cannot be planned for may still run."""
    try:
        shapes = read_shapes(models.policy, models.behavior)
    except InputError as error:
        yield f"  not planned: {error}"
        return
    memory = Memory(device_bytes=None, host_bytes=memory_bytes())
    phases = plan_phases(config, shapes, memory)
    yield from (f"  {each.name:<9} {summary(each)}" for each in phases if only in (None, each.name))
    if any(each.verdict is Verdict.TOO_LARGE for each in phases):
        yield "  `pear plan RUN.yaml` says what to set"
