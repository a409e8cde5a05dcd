"""`pear plan`: what each phase of a run will take, whether it fits, and which setting mends it."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from pear_ray.config.run import RunConfig
from pear_ray.errors import ConfigError
from pear_ray.machine import memory_bytes
from pear_ray.memory.durations import Workload, plan_durations
from pear_ray.memory.items import Item, Phase, Verdict, size, summary
from pear_ray.memory.mend import Mend, find_mends
from pear_ray.memory.pace import DEVICES, Pace, pace_of_gpu, pace_of_this_machine
from pear_ray.memory.phases import (
    DRIVER_AND_RAY_BYTES,
    Memory,
    ModelShapes,
    plan_phases,
)
from pear_ray.memory.time_words import time_lines, time_tree
from pear_ray.run_models import run_models

DOES_NOT_FIT = 2  # as where an input cannot be used: nothing was started, and nothing should be


def run_plan(
    config: RunConfig,
    *,
    device_bytes: int | None,
    device: str | None,
    workload: Workload,
    as_json: bool,
) -> int:
    """Print the plan; the exit code: 0, or 2 where a phase does not fit.

    Args:
        config: The run.
        device_bytes: Memory of one GPU, or of one worker on CPU, where somebody said.
        device: A GPU of `memory.pace.DEVICES`, where somebody said.
        workload: Sizes that the run file does not hold.
        as_json: For machines instead of people.

    Raises:
        ConfigError: `device` is a GPU, and the run is not for one.
        InputError: A model's sizes cannot be read.
    """
    models = run_models(config)
    pace = _pace(config, device)
    durations = plan_durations(config, models, pace, workload) if pace else []
    if device and device_bytes is None:
        device_bytes = DEVICES[device].memory_bytes
    memory = Memory(device_bytes=device_bytes, host_bytes=memory_bytes())
    phases = plan_phases(config, models, memory)
    mends = {
        phase.name: find_mends(config, phase.name, lambda run: plan_phases(run, models, memory))
        for phase in phases
        if phase.verdict is Verdict.TOO_LARGE
    }
    if as_json:
        tree = {
            "run": config.name,
            "phases": [_tree(each, mends) for each in phases],
            "time": time_tree(durations, pace),
        }
        sys.stdout.write(json.dumps(tree, indent=2) + "\n")
    else:
        lines = [
            *_lines(config, models, memory, phases, mends),
            "",
            *time_lines(config, durations, pace, workload),
        ]
        sys.stdout.write("\n".join(lines) + "\n")
    return DOES_NOT_FIT if mends else 0


def _pace(config: RunConfig, device: str | None) -> Pace | None:
    """What a worker is taken to reach; None for a GPU of which nobody said what it is."""
    if config.cluster.device == "cpu":
        if device:
            raise ConfigError(
                f"--device {device} is a GPU, and cluster.device=cpu; add cluster.device=cuda, or "
                "leave --device out"
            )
        return pace_of_this_machine(max(1, int(config.cluster.cpus_per_worker)))
    return pace_of_gpu(DEVICES[device], config.models.dtype) if device else None


def _lines(
    config: RunConfig,
    models: ModelShapes,
    memory: Memory,
    phases: Sequence[Phase],
    mends: dict[str, list[Mend]],
) -> Iterator[str]:
    yield f"memory of run {config.name}, per worker, on {config.cluster.device}"
    yield f"policy    {config.models.policy}: {models.policy.num_parameters:,} parameters"
    for source, shape in models.behavior.items():
        yield f"behavior  {shape.num_parameters:,} parameters (source {source})"
    yield f"there is  {_there_is(config, memory)}"
    for phase in phases:
        yield ""
        yield f"{phase.name}: {summary(phase)}"
        yield from _item_lines(phase.peak.items)
        others = [each for each in phase.moments if each is not phase.peak]
        if others:
            yield "  at others: " + ", ".join(
                f"{each.name} {size(each.num_bytes)}" for each in others
            )
        if phase.on_host:
            yield f"  in the host's memory, for each worker: {_sizes(phase.on_host)}"
        yield from (f"  note: {note}" for note in phase.notes)
        if phase.verdict is Verdict.TIGHT:
            yield f"  tight: measured peaks were up to {size(phase.slack_bytes)} above such a plan"
        if phase.verdict is Verdict.TOO_LARGE:
            yield from _mend_lines(phase, mends[phase.name])


def _there_is(config: RunConfig, memory: Memory) -> str:
    if memory.device_bytes is not None:
        return f"{size(memory.device_bytes)} for each worker, as the options say"
    if config.cluster.device == "cuda":
        return (
            "not known; say which GPU with --device, or what it has with --device-memory, such as "
            "80GiB"
        )
    if config.cluster.address is not None:
        return (
            f"not known: the cluster at {config.cluster.address} is not asked; say what a worker "
            "has with --device-memory, such as 16GiB"
        )
    return (
        f"{size(memory.host_bytes)} in this machine, {size(DRIVER_AND_RAY_BYTES)} for driver and "
        "Ray, the rest for the workers"
    )


def _item_lines(items: Sequence[Item]) -> Iterator[str]:
    width = max(len(item.name) for item in items)
    for item in sorted(items, key=lambda item: -item.num_bytes):
        yield f"  {item.name:<{width}}  {size(item.num_bytes):>9}  {item.formula}"


def _sizes(items: Sequence[Item]) -> str:
    return ", ".join(f"{item.name} {size(item.num_bytes)}" for item in items)


def _mend_lines(phase: Phase, mends: Sequence[Mend]) -> Iterator[str]:
    largest = phase.peak.largest
    if phase.shortage:
        yield f"  an engine cannot start: {phase.shortage.words}"
    if phase.available_bytes is not None and phase.peak.num_bytes > phase.available_bytes:
        missing = size(phase.peak.num_bytes - phase.available_bytes)
        by = f", set by {largest.setting}" if largest.setting else ""
        yield (
            f"  {missing} too much; the largest item is {largest.name}, "
            f"{size(largest.num_bytes)}{by}"
        )
    for mend in mends:
        had = "" if mend.available_bytes is None else f" of {size(mend.available_bytes)}"
        yield f"  mend: {mend.words}  ({size(mend.num_bytes)}{had})"
    if not mends:
        yield "  no setting mends it: take devices with more memory, or a smaller model"


def _tree(phase: Phase, mends: dict[str, list[Mend]]) -> dict[str, Any]:
    return {
        "phase": phase.name,
        "verdict": phase.verdict.value,
        "num_workers": phase.num_workers,
        "num_bytes": phase.peak.num_bytes,
        "available_bytes": phase.available_bytes,
        "slack_bytes": phase.slack_bytes,
        "peak": phase.peak.name,
        "moments": [asdict(each) | {"num_bytes": each.num_bytes} for each in phase.moments],
        "shortage": phase.shortage.words if phase.shortage else None,
        "on_host": [asdict(item) for item in phase.on_host],
        "notes": list(phase.notes),
        "mends": [
            {"settings": dict(mend.settings), "num_bytes": mend.num_bytes}
            for mend in mends.get(phase.name, [])
        ],
    }
