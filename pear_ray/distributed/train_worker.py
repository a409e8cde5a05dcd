"""What the loop of a training worker calls: its device, its checkpoints, its laps, its model."""

import os
import shutil
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint

from pear_ray.config.sections import ClusterConfig
from pear_ray.distributed import in_process
from pear_ray.distributed.capacity import num_threads
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.handover.record import trainers_logprobs, write_record
from pear_ray.engines.trainer import ADAPTER, Trainer


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
