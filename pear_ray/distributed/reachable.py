"""Whether every node of the cluster sees the run's folder: workers write there and read there."""

import uuid
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pear_ray.errors import InputError

ANSWER_S = 60.0  # a node starts its first process in seconds; one that is just leaving never does


def check_reachable(run_dir: Path, *, stored: bool) -> None:
    """See that all nodes that are there now have `run_dir` on a disk that they share.

    Nothing is asked where there is one node. A node that does not answer is passed over: it is
    busy, or on its way out.

    Args:
        run_dir: The run's folder, or its working copy.
        stored: Whether it is a working copy of a run on an object store.

    Raises:
        InputError: A node has another folder there, or none.
    """
    here = ray.get_runtime_context().get_node_id()
    others = {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != here
    }
    if not others:
        return
    mark = run_dir / f".seen-{uuid.uuid4().hex}"
    mark.touch()
    try:
        asked = {_ask(node, mark): address for node, address in others.items()}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
        blind = sorted(asked[each] for each in answered if not ray.get(each))
    finally:
        mark.unlink()
    if blind:
        mend = (
            "set PEAR_RAY_CACHE to a folder that all nodes mount (the store alone serves runs on "
            "one node)"
            if stored
            else "set output_dir to a folder that all nodes mount"
        )
        raise InputError(
            f"{run_dir}: the nodes {', '.join(blind)} do not see this folder, and workers there "
            f"would read and write another; {mend}"
        )


def _ask(node: str, mark: Path) -> "ray.ObjectRef[bool]":
    on_node = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=on_node)(_is_there).remote(mark)


def _is_there(mark: Path) -> bool:
    return mark.exists()
