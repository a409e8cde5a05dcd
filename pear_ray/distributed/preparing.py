"""A corpus's parts prepared by Ray Data tasks, each once, whatever was killed in between."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import ray
import ray.data

from pear_ray.corpus.parts import Part
from pear_ray.corpus.prepare import PrepareJob, is_prepared, prepare_part
from pear_ray.distributed.failures import engine_errors, quiet_ray_data


def prepare_parts(
    parts: Sequence[Part], job: PrepareJob, *, progress: Callable[[int], None]
) -> None:
    """Prepare every part that is not prepared yet; the driver sees part numbers, never rows.

    Args:
        parts: All parts of the corpus.
        job: What to prepare them with.
        progress: Called with the number of parts that are done.
    """
    todo = [part for part in parts if not is_prepared(part, job)]
    done = len(parts) - len(todo)
    if len(todo) == 1:  # starting a task costs more than one part
        prepare_part(todo[0], job)
        progress(done + 1)
        return
    if not todo:
        return

    def prepare(row: dict[str, Any]) -> dict[str, int]:
        return {"rows": prepare_part(Part(**row), job).rows}

    quiet_ray_data()
    blocks = ray.data.from_items([asdict(part) for part in todo], override_num_blocks=len(todo))
    with engine_errors("preparing the corpus"):
        for _ in blocks.map(prepare, num_cpus=1).iter_rows():
            done += 1
            progress(done)
