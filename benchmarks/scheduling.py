"""What the pipeline costs with nothing to do: Ray, processes, groups and placements, and no work.

The same calls as in a run on two workers, with actors that hold no engine and a loop that returns
at once; summed up as `pear run` makes them.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy

sys.path.insert(0, str(Path(__file__).parent))
from record import Figure, write_figures

from pear_ray.config.run import RunConfig, load_run
from pear_ray.distributed.capacity import worker_environment
from pear_ray.distributed.failures import quiet_ray_data
from pear_ray.distributed.session import ray_session
from pear_ray.distributed.train_group import run_train_group
from pear_ray.distributed.waiting import devices_for

ROOT = Path(__file__).parents[1]
RUN_S = 600.0
GOAL = 0.03
# How often a run does it: collect and evaluate; score; sft and rl; each of these five.
TIMES = {"pool": 2, "data": 1, "group": 2, "devices": 5, "session": 1}


class Nothing:
    """An actor without an engine."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The block, as it came."""
        return batch

    def answer(self) -> int:
        """Anything."""
        return 0


def main() -> None:
    """Measure and write the figures."""
    config = load_run(ROOT / "jobs" / "runs" / "demo.yaml", [])
    spent: dict[str, float] = {}

    @contextmanager
    def counted(name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        spent[name] = time.monotonic() - began

    with counted("session"):
        session = ray_session(config.cluster)
        session.__enter__()
    with counted("devices"), devices_for(config, "sft", say=lambda *_: None):
        pass
    with counted("pool"):
        pool(config)
    with counted("data"):
        data(config)
    with counted("group"), tempfile.TemporaryDirectory() as folder:
        run_train_group(nothing(), {}, cluster=config.cluster, stage_dir=Path(folder))
    session.__exit__(None, None, None)
    total = sum(spent[name] * times for name, times in TIMES.items())
    words = {
        "session": "a local Ray, with its dashboard",
        "devices": "looking whether a stage's devices are free",
        "pool": "two actors without an engine, called once",
        "data": "the same by Ray Data, over 16 blocks",
        "group": "a worker group of two with an empty loop",
    }
    each = [Figure(name=words[name], value=spent[name], unit="s") for name in words]
    whole = Figure(
        name="all of a run's: " + ", ".join(f"{n} x {name}" for name, n in TIMES.items()),
        value=total,
        unit="s",
        reference="a run of 10 minutes",
        ratio=total / RUN_S,
        goal=f"under {GOAL:.0%}",
        holds=total / RUN_S < GOAL,
    )
    write_figures("scheduling", [*each, whole])


def nothing() -> Callable[[dict[str, Any]], None]:
    """A loop that does nothing; made here, because workers cannot import this script."""
    return lambda job: job.clear()


def pool(config: RunConfig) -> None:
    """Two actors, started, called and ended as a pool of engines is."""
    options = {"runtime_env": {"env_vars": worker_environment(config.cluster)}}
    make = ray.remote(Nothing).options(num_cpus=config.cluster.cpus_per_worker, **options)
    actors = [make.remote() for _ in range(config.cluster.num_samplers)]
    ray.get([actor.answer.remote() for actor in actors])
    for actor in actors:
        ray.kill(actor)


def data(config: RunConfig) -> None:
    """Blocks through an actor pool, as scoring sends them."""
    quiet_ray_data()
    count = config.cluster.num_samplers
    rows = ray.data.from_items([{"block": n} for n in range(16)], override_num_blocks=16)
    blocks = rows.map_batches(
        Nothing,
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=count, max_size=count),
        num_cpus=config.cluster.cpus_per_worker / 2,
        runtime_env={"env_vars": worker_environment(config.cluster)},
    )
    for _ in blocks.iter_batches(batch_size=None):
        pass


if __name__ == "__main__":
    main()
