"""A Ray Train worker group around one training loop: placement, restarts, what ends it.

Ray Train's controller, a process of its own, reads this module for the callbacks; what a loop calls
is in `train_worker`, with the models' packages that only workers need.
"""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed as dist
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import (
    PlacementGroupHandle,
)

from pear_ray.clusters.market import training_selector
from pear_ray.config.sections import ClusterConfig
from pear_ray.distributed import in_process
from pear_ray.distributed.addresses import use_rays_interface
from pear_ray.distributed.capacity import worker_environment, worker_resources
from pear_ray.distributed.failures import causes, one_line
from pear_ray.distributed.watchdog import STALLED_FILE, stalled
from pear_ray.errors import PearRayError, StopRequested, TrainingError
from pear_ray.stopping import gracefully

CHECKPOINTS_KEPT = 2
STOP_FILE = ".stop"  # how the driver reaches the loops: they need the folder anyway
MODEL = "model"  # what a loop that came to its end leaves in the stage's folder


def run_train_group(
    loop: Callable[[dict[str, Any]], None],
    job: dict[str, Any],
    *,
    cluster: ClusterConfig,
    stage_dir: Path,
) -> None:
    """Run `loop(job)` on every worker until all return; restart the group when one dies.

    A group of the same `stage_dir` takes up at its last committed checkpoint, whether a worker died
    or the driver did and the stage is run again.

    Raises:
        PearRayError: The loop raised one of ours: the same error, from the worker, at once. It
            would come again after a restart.
        StopRequested: SIGTERM came; the loop has checkpointed and left.
        TrainingError: The group failed more often than `cluster.max_failures`.
    """
    wish = stage_dir / STOP_FILE
    wish.unlink(missing_ok=True)
    (stage_dir / STALLED_FILE).unlink(missing_ok=True)
    with gracefully(wish.touch):
        if in_process.is_host():
            in_process.run_here(loop, job, stage_dir=stage_dir)
        else:
            _fit_until_started(loop, job, cluster=cluster, stage_dir=stage_dir)
    if not (stage_dir / MODEL).exists() and wish.exists():
        raise StopRequested(
            f"{stage_dir.name} stopped at a checkpoint, as SIGTERM asked; run the same command "
            "again to go on"
        )


def _fit_until_started(
    loop: Callable[[dict[str, Any]], None],
    job: dict[str, Any],
    *,
    cluster: ClusterConfig,
    stage_dir: Path,
) -> None:
    """Run the group to its end; again where a worker died before all had started."""
    for failures in itertools.count(1):
        try:
            _fit(_trainer(loop, job, cluster=cluster, stage_dir=stage_dir))
        except ray.train.TrainingFailedError as error:
            if not _failed_while_starting(error) or failures > cluster.max_failures:
                raise _cause(error) from error
        else:
            break


def stop_wished(stage_dir: Path) -> bool:
    """Whether the driver was told to stop; a loop asks after each step, on all ranks alike."""
    return (stage_dir / STOP_FILE).exists()


def _fit(trainer: TorchTrainer) -> None:
    """Run `trainer` to its end, in a thread of its own.

    In the main thread Ray Train takes Ctrl-C for itself, ends the process with 0 and keeps the
    handler, and with it the controller and all that it occupies, after the end of the training.
    """
    done: Future[None] = Future()

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=fit, name="ray-train", daemon=True).start()
    done.result()


def _trainer(
    loop: Callable[[dict[str, Any]], None],
    job: dict[str, Any],
    *,
    cluster: ClusterConfig,
    stage_dir: Path,
) -> TorchTrainer:
    return TorchTrainer(
        loop,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=cluster.num_trainers,
            use_gpu=cluster.device == "cuda",
            resources_per_worker=worker_resources(cluster),
            label_selector=training_selector(cluster) or None,
        ),
        # CPU tensors (metrics, counts) are reduced on every device; only parameters are on the GPU.
        torch_config=MeetingConfig(
            backend="cpu:gloo,cuda:nccl" if cluster.device == "cuda" else "gloo"
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(stage_dir),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
            worker_runtime_env={"env_vars": worker_environment(cluster)},
            callbacks=[StopAtOurErrors(stage_dir), GiveResourcesBack()],
        ),
    )


def _failed_while_starting(error: Exception) -> bool:
    """Whether a worker's process or host was lost before Ray Train had started the whole group.

    Ray Train 2.60 restarts a group whose worker dies later, but takes this for a fault of its own
    controller and gives up. Ranks that wait for one on a lost host say that they cannot connect.
    """
    failure = getattr(error, "controller_failure", None)
    lost = isinstance(failure, ray.exceptions.RayActorError)
    return lost or (failure is not None and any(_cannot_connect(e) for e in causes([failure])))


def _cannot_connect(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or "Gloo connect" in str(error)


class MeetingConfig(TorchConfig):
    """How a group is formed, on whatever hosts.

    Gloo listens where the host's own name leads, and that is the loopback wherever `/etc/hosts`
    says so, as on Debian (`127.0.1.1 NAME`) and in many images: ranks on other hosts then cannot
    connect.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What forms the group."""
        return _OnRaysInterface


class _OnRaysInterface(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(use_rays_interface)
        super().on_start(worker_group, backend_config)


class StopAtOurErrors(UserCallback):
    """Ends a group whose worker raised one of our errors, instead of restarting it.

    Our errors say what is wrong with the run (weights, rewards, rows, models); restarts are for
    processes and machines that die. What a callback raises, Ray Train does not retry.

    A worker that is stuck can raise nothing: it leaves its error in the stage's folder, and dies.
    """

    def __init__(self, stage_dir: Path) -> None:
        self._stage_dir = stage_dir

    def after_exception(
        self,
        run_context: Any,  # noqa: ARG002 - Ray Train passes it by name
        worker_exceptions: dict[int, Exception],
    ) -> None:
        """Raise the first of our errors, if there is one."""
        if said := stalled(self._stage_dir):
            raise TrainingError(f"{said} (cluster.on_stall=fail)")
        for error in causes(worker_exceptions.values()):
            if isinstance(error, PearRayError):
                raise error


class GiveResourcesBack(ControllerCallback, WorkerGroupCallback):
    """Frees the devices of a group whose start failed.

    Ray Train 2.60 forgets such a group's placement group: the CPUs and GPUs stay reserved, and on a
    cluster without spare ones the next group would wait for them for ever. Ray Train has no public
    callback with the placement group in it.
    """

    def __init__(self) -> None:
        self._reserved: PlacementGroupHandle | None = None

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """Remember what is reserved."""
        self._reserved = worker_group.get_worker_group_state().placement_group_handle

    async def before_controller_shutdown(self) -> None:
        """Free it; nothing happens where Ray Train did so itself."""
        if self._reserved is not None:
            self._reserved.shutdown()


def _cause(error: Exception) -> PearRayError:
    """The first of our own errors behind a failed group, or a TrainingError with the root cause."""
    failures = [*getattr(error, "worker_failures", {}).values()]
    failures += [f for f in (getattr(error, "controller_failure", None), error) if f is not None]
    chain = list(causes(failures))
    for link in chain:
        if isinstance(link, PearRayError):
            return link
    return TrainingError(f"the worker group failed: {one_line(chain[0])}")
