"""`pear plan --cluster`: a run on the nodes of a cluster file; nothing is started."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pear_ray.clusters.fit import (
    HOUR_S,
    Fit,
    StageFits,
    fit_stages,
    total_dollars,
    total_seconds,
)
from pear_ray.clusters.load import load_shape
from pear_ray.clusters.prices import SOURCE
from pear_ray.clusters.shape import ClusterShape
from pear_ray.config.run import RunConfig
from pear_ray.memory.durations import Workload
from pear_ray.memory.time_words import duration_words
from pear_ray.run_models import run_models

NODE_START_S = 600.0  # the longer of what clouds take; shorter waits are worth a word
DOES_NOT_FIT = 2  # as where an input cannot be used: nothing was started, and nothing should be


def run_cluster_plan(config: RunConfig, file: Path, *, workload: Workload, as_json: bool) -> int:
    """Print which stages fit on which nodes; the exit code: 0, or 2 where one fits on none.

    Args:
        config: The run.
        file: The cluster file.
        workload: Sizes that the run file does not hold.
        as_json: For machines instead of people.

    Raises:
        ConfigError: The cluster file cannot be read, or something in it is wrong.
        InputError: A model's sizes cannot be read.
    """
    shape = load_shape(file)
    stages = fit_stages(config, run_models(config), shape, workload)
    if as_json:
        sys.stdout.write(json.dumps(_tree(config, shape, stages), indent=2) + "\n")
    else:
        lines = [*_lines(config, file, shape, stages), *_notes(config, shape)]
        sys.stdout.write("\n".join(lines) + "\n")
    return 0 if all(each.chosen for each in stages) else DOES_NOT_FIT


def _lines(
    config: RunConfig, file: Path, shape: ClusterShape, stages: Sequence[StageFits]
) -> Iterator[str]:
    yield f"run {config.name} on cluster {shape.name} ({file})"
    machine, dollars = shape.head
    yield f"  head: {machine}, {'price not said' if dollars is None else f'{dollars:g} $/h'}"
    for kind in shape.workers:
        yield f"  {kind.words}"
    for stage in stages:
        yield ""
        workers = "worker" if stage.num_workers == 1 else "workers"
        on = f"on {stage.chosen.kind.name}" if stage.chosen else "fits on no type of node"
        yield f"{stage.stage}: {stage.num_workers} {workers}, {on}"
        width = max(len(each.kind.name) for each in stage.fits)
        for each in stage.fits:
            yield f"  {each.kind.name:<{width}}  {_fit_words(each)}"
    yield ""
    yield _total_words(shape, stages)


def _fit_words(fit: Fit) -> str:
    if fit.why_not is not None:
        return f"no: {fit.why_not}"
    nodes = f"{fit.num_nodes} node{'s' if fit.num_nodes > 1 else ''}"
    time = "time not known" if fit.seconds is None else duration_words(fit.seconds)
    words = [nodes, time]
    if fit.dollars is not None:
        hours = (fit.seconds or 0.0) / HOUR_S
        words.append(
            f"{fit.num_nodes} x {fit.kind.dollars_per_hour:g} $/h x {hours:.3g} h = "
            f"{fit.dollars:,.2f} $"
        )
    return ", ".join([*words, *fit.notes])


def _total_words(shape: ClusterShape, stages: Sequence[StageFits]) -> str:
    unfit = [each.stage for each in stages if not each.chosen]
    if unfit:
        return f"does not fit: {', '.join(unfit)}; see above what would"
    seconds, dollars = total_seconds(stages), total_dollars(stages, shape)
    if seconds is None:
        return "all stages fit; how long is not known"
    cost = "cost not known: say prices under metadata.prices"
    if dollars is not None:
        cost = f"{dollars:,.2f} $ with the head all the time"
    return (
        f"all stages: {duration_words(seconds)} without starts of nodes and engines, {cost}; an "
        "estimate, of the kind in docs/planning.md"
    )


def _notes(config: RunConfig, shape: ClusterShape) -> Iterator[str]:
    cluster = config.cluster
    if any(kind.dollars_per_hour is not None for kind in shape.workers):
        yield f"prices: {SOURCE}; or as the file says under metadata.prices"
    if cluster.device == "cpu" and any(kind.gpus for kind in shape.workers):
        yield "note: cluster.device=cpu uses no GPU; add cluster.device=cuda"
    shared = shape.shared_storage
    if shared is None:
        yield "note: the file does not say where all nodes reach the same files"
    elif not f"{config.output_dir}/".startswith(f"{shared.rstrip('/')}/"):
        yield (
            f"note: output_dir={config.output_dir} is not on {shared}, which all nodes share; add "
            f"output_dir={shared.rstrip('/')}/outputs"
        )
    wait_s = cluster.wait_for_devices_s
    if wait_s is not None and wait_s < NODE_START_S:
        yield (
            f"note: cluster.wait_for_devices_s={wait_s:g} is less than a node with GPUs takes to "
            "start, some minutes; leave it out to wait as long as it takes"
        )
    if shape.to_fill_in:
        count, first = len(shape.to_fill_in), ", ".join(shape.to_fill_in[:3])
        more = ", ..." if count > 3 else ""  # noqa: PLR2004 - as many as fit on a line
        yield f"to fill in before it starts ({count}): {first}{more}"


def _tree(config: RunConfig, shape: ClusterShape, stages: Sequence[StageFits]) -> dict[str, Any]:
    return {
        "run": config.name,
        "cluster": asdict(shape),
        "stages": [
            {
                "stage": each.stage,
                "num_workers": each.num_workers,
                "on": each.chosen.kind.name if each.chosen else None,
                "fits": [asdict(fit) | {"kind": fit.kind.name} for fit in each.fits],
            }
            for each in stages
        ],
        "seconds": total_seconds(stages),
        "dollars": total_dollars(stages, shape),
        "prices": SOURCE,
    }
