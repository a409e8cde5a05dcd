"""A Ray Train worker group around one training loop: placement, restarts, checkpoints."""

import itertools
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import ray.train
import torch
import torch.distributed as dist
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import (
    PlacementGroupHandle,
)

from pear_ray.clusters.market import training_selector
from pear_ray.config.sections import ClusterConfig
from pear_ray.distributed import in_process
from pear_ray.distributed.addresses import MeetingConfig
from pear_ray.distributed.capacity import num_threads, worker_environment, worker_resources
from pear_ray.distributed.failures import causes, one_line
from pear_ray.distributed.watchdog import STALLED_FILE, stalled
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.handover.record import trainers_logprobs, write_record
from pear_ray.engines.trainer import ADAPTER, Trainer
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


def start_worker(cluster: ClusterConfig) -> torch.device:
    """Threads and device of this worker; call it first in a loop."""
    torch.set_num_threads(num_threads(cluster))
    if cluster.device == "cuda":
        here = in_process.is_host()
        return torch.device("cuda", 0) if here else ray.train.torch.get_device()
    return torch.device("cpu")


class Resumable(Protocol):
    """What a checkpoint holds beside the trainer: all that decides how a loop goes on."""

    def save(self, folder: Path) -> None:
        """Write it on rank 0, or each rank its own part, under names of its own."""

    def load(self, folder: Path) -> None:
        """Take up where `save` left off, on every rank."""


def restore(trainer: Trainer, *others: Resumable) -> bool:
    """Load the last committed checkpoint into `trainer`, if there is one (a collective)."""
    if in_process.is_host():
        folder = in_process.saved_here()
        found = None if folder is None else nullcontext(folder)
    else:
        checkpoint = ray.train.get_checkpoint()
        found = None if checkpoint is None else checkpoint.as_directory()
    if found is None:
        return False
    with found as folder:
        for each in (trainer, *others):
            each.load(Path(folder))
    return True


def commit(trainer: Trainer, *others: Resumable) -> None:
    """Checkpoint `trainer`, and what is not in it, after its current step (a collective)."""

    def save(folder: Path) -> None:
        for each in (trainer, *others):
            each.save(folder)

    if in_process.is_host():
        in_process.save_here(save)
        return
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        ray.train.report(
            {"step": trainer.step_count},
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"step-{trainer.step_count:06d}",
        )


class Laps:
    """Seconds spent per phase of a step, and memory held at the end of each.

    Attributes:
        seconds: By phase.
        gib: By phase, where a device is given: of a GPU all that is taken, by whomever; on a CPU
            this process's resident memory.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._last = time.perf_counter()
        self._device = device
        self.seconds: dict[str, float] = {}
        self.gib: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Count the time since the last lap to `phase`."""
        if self._device is not None:
            self.gib[phase] = memory_in_use(self._device) / 2**30
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def memory_in_use(device: torch.device) -> int:
    """Bytes taken of a GPU, by whomever; on a CPU, what this process has resident."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def export(trainer: Trainer, chat: ChatTokenizer, folder: Path) -> None:
    """Write the trained model as a Hugging Face folder, whole or not at all (a collective).

    With it the record that it is checked against where it is taken up. Its adapter, if it has one,
    goes into a folder beside it.
    """
    logprobs = trainers_logprobs(trainer)
    partial = folder.with_name(f".{folder.name}.partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    gathered = trainer.export(partial, save_tokenizer=chat.tokenizer.save_pretrained)
    if dist.get_rank() == 0:
        write_record(partial, trainer.module, chat, gathered, logprobs=logprobs)
        adapter = partial / ADAPTER
        for made, place in ((adapter, folder.with_name(ADAPTER)), (partial, folder)):
            shutil.rmtree(place, ignore_errors=True)
            if made.exists():
                made.replace(place)
    dist.barrier()


def _cause(error: Exception) -> PearRayError:
    """The first of our own errors behind a failed group, or a TrainingError with the root cause."""
    failures = [*getattr(error, "worker_failures", {}).values()]
    failures += [f for f in (getattr(error, "controller_failure", None), error) if f is not None]
    chain = list(causes(failures))
    for link in chain:
        if isinstance(link, PearRayError):
            return link
    return TrainingError(f"the worker group failed: {one_line(chain[0])}")
