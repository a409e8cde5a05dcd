"""An engine in actors of its own: one, or one for each of the devices that it is spread over."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pear_ray.config.sections import ClusterConfig
from pear_ray.distributed.addresses import use_rays_interface
from pear_ray.distributed.capacity import num_threads, worker_environment, worker_resources
from pear_ray.engines.importing import collector_paused
from pear_ray.engines.vllm.spec import EngineSpec, Sampling
from pear_ray.records import Completion

MEETING_S = 300.0  # for the ranks of an engine to find each other; their processes start apart


@dataclass(frozen=True, slots=True)
class Rank:
    """One of the processes that make an engine.

    Attributes:
        number: Counts from 0.
        count: How many there are.
    """

    number: int
    count: int


class EngineActor:
    """One engine in an actor process of its own, or a rank of one.

    Ranks are called together, with the same arguments; the first one's answer counts.
    """

    def __init__(
        self,
        spec: EngineSpec,
        num_threads: int,
        rank: Rank | None = None,
        meeting: tuple[str, int] | None = None,
    ) -> None:
        self._name = Path(spec.model).name  # first: Ray asks for it when what follows fails
        self._rank = rank
        if rank is not None and meeting is not None:
            _join(rank, *meeting, device=spec.device)
        with collector_paused():
            import torch  # noqa: PLC0415 - the driver that names this class needs no torch

            from pear_ray.engines.vllm.engine import VllmEngine  # noqa: PLC0415 - nor vLLM

        torch.set_num_threads(num_threads)
        self._engine = VllmEngine(spec, takes_weights=True)

    def __repr__(self) -> str:
        """What the Ray dashboard calls this actor."""
        where = f", {self._rank.number + 1} of {self._rank.count}" if self._rank else ""
        return f"Sampler({self._name}{where})"

    def generate(
        self, prompts: list[list[int]], sampling: list[Sampling]
    ) -> list[list[Completion]]:
        """Completions of each prompt; see `VllmEngine.generate`. Of ranks but the first, none."""
        found = self._engine.generate(prompts, sampling)
        return [] if self._rank and self._rank.number else found

    def load(self, folder: str, max_gap: float) -> float:
        """Take the weights of `folder`, checked; see `engines.weights.load_checkpoint`."""
        from pear_ray.engines.weights import load_checkpoint  # noqa: PLC0415

        gap = load_checkpoint(self._engine, Path(folder), max_gap=max_gap)
        self._name = "/".join(Path(folder).parts[-2:])
        return gap


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """The actors of one engine, by rank.

    Attributes:
        actors: To be called together.
        group: Where several of them are placed, all on one node.
    """

    actors: list[Any]
    group: PlacementGroup | None

    def end(self) -> None:
        """End them, and free their devices."""
        for actor in self.actors:
            ray.kill(actor)
        if self.group is not None:
            remove_placement_group(self.group)


def start_engine(spec: EngineSpec, cluster: ClusterConfig, *, name: str) -> Engine:
    """The actors of an engine on `spec`, starting up; `name` is what Ray is to call them."""
    wanted = worker_resources(cluster)
    make = ray.remote(EngineActor).options  # type: ignore[attr-defined] - built by ray.remote
    options: dict[str, Any] = {
        "num_cpus": wanted["CPU"],
        "num_gpus": wanted.get("GPU", 0),
        "runtime_env": {"env_vars": worker_environment(cluster)},
    }
    given = (spec, num_threads(cluster))
    size = spec.tensor_parallel_size
    if size == 1:
        return Engine([make(name=name, **options).remote(*given)], None)
    # On one node, as their devices are linked there; Ray waits for it as long as it takes.
    group = placement_group([wanted] * size, strategy="STRICT_PACK")
    places = [PlacementGroupSchedulingStrategy(group, number) for number in range(size)]
    find = ray.remote(num_cpus=0)(_free_address).options(scheduling_strategy=places[0])
    meeting = find.remote()
    actors = [
        make(name=f"{name}-rank-{number}", scheduling_strategy=place, **options).remote(
            *given, Rank(number, size), meeting
        )
        for number, place in enumerate(places)
    ]
    return Engine(actors, group)


def _free_address() -> tuple[str, int]:
    """This node's address, and a port of it that nobody has."""
    with socket.socket() as free:
        free.bind(("", 0))
        return ray.util.get_node_ip_address(), free.getsockname()[1]


def _join(rank: Rank, address: str, port: int, *, device: str) -> None:
    """Make this process `rank` of a process group, as Ray Train makes its workers.

    All ranks see all GPUs of the engine, as those of a training group see all of their node: vLLM
    asks which of them are linked. CUDA reads the variable once, so torch may not have asked it for
    anything before.
    """
    import torch.distributed as dist  # noqa: PLC0415 - seconds, and the driver needs none

    use_rays_interface()
    store = dist.TCPStore(
        address,
        port,
        rank.count,
        is_master=rank.number == 0,
        timeout=timedelta(seconds=MEETING_S),
    )
    if device == "cuda":
        store.set(f"devices/{rank.number}", os.environ["CUDA_VISIBLE_DEVICES"])
        every = [store.get(f"devices/{number}").decode() for number in range(rank.count)]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(every)
    os.environ |= {
        "RANK": str(rank.number),
        "LOCAL_RANK": str(rank.number),
        "WORLD_SIZE": str(rank.count),
        "LOCAL_WORLD_SIZE": str(rank.count),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=store,
        rank=rank.number,
        world_size=rank.count,
    )
