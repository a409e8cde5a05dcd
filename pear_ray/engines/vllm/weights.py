"""Weights from a trainer into the engine of the same process, through vLLM's weight-transfer API.

The backends that ship with vLLM send between processes (NCCL, CUDA IPC). Colocated, trainer and engine
share a process, so tensors are handed over as they are, on CPU and CUDA alike.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm import LLM
from vllm.distributed.weight_transfer.base import (
    ModuleSource,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import (
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from pear_ray.errors import WeightSyncError

BACKEND = "in_process"
BUCKET_BYTES = 64 << 20  # bounds the unsharded copies alive at once


@dataclass
class InProcessInit(WeightTransferInitInfo):
    """Nothing to agree on: both ends are in this process."""


@dataclass
class InProcessUpdate(WeightTransferUpdateInfo):
    """One bucket of full tensors, `[(name, tensor), ...]`, by reference."""

    tensors: Any = None


class InProcessReceiver(WeightTransferEngine[InProcessInit, InProcessUpdate]):
    """vLLM's end: loads buckets layer by layer as if from a checkpoint."""

    init_info_cls = InProcessInit
    update_info_cls = InProcessUpdate

    def init_transfer_engine(self, init_info: InProcessInit) -> None:
        """Nothing to open."""

    def start_weight_update(self) -> None:
        """Make the model ready to be loaded again."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket."""
        # Not the base class's: it synchronises an accelerator, which a CPU does not have.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: InProcessUpdate) -> None:
        """Load the tensors of one bucket into the model."""
        self.model.load_weights(update_info.tensors)

    def finish_weight_update(self) -> None:
        """Finish the layers, and rebuild what layerwise loading leaves stale."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            repack_tied_head(self.model)

    def shutdown(self) -> None:
        """Nothing to close."""


def repack_tied_head(model: torch.nn.Module) -> None:
    """Rebuild the CPU-packed copy of an embedding that is also the output head.

    vLLM 0.32 on CPU keeps a prepacked copy of a tied head that no reload rebuilds: without this the
    engine goes on sampling from old weights, silently, off by nats.
    """
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


@dataclass
class InProcessTrainerInit(TrainerInitInfo):
    """Trainer's end of the in-process backend."""

    backend: ClassVar[str] = BACKEND


class InProcessSender(TrainerWeightTransferEngine[InProcessTrainerInit]):
    """Trainer's end: every rank feeds its own engine, so every rank is a sender."""

    init_info_cls = InProcessTrainerInit

    @classmethod
    def trainer_init(
        cls, init_info: InProcessTrainerInit, *, client: Any, source: Any = None
    ) -> "InProcessSender":
        """Connect `source` to the engine behind `client`."""
        client.init_weight_transfer_engine({})
        return cls(client=client, source=source, is_sender=init_info.is_sender)

    def send_weights(self) -> None:
        """Gather every parameter (a collective over ranks) and load it, bucket by bucket."""
        self.client.start_weight_update()
        bucket: list[tuple[str, torch.Tensor]] = []
        num_bytes = 0
        for names, tensors in self.source.iter_groups():
            bucket += zip(names, (tensor.detach() for tensor in tensors), strict=True)
            num_bytes += sum(tensor.nbytes for tensor in tensors)
            if num_bytes >= BUCKET_BYTES:
                self.client.update_weights({"tensors": bucket})
                bucket, num_bytes = [], 0
        if bucket:
            self.client.update_weights({"tensors": bucket})
        self.client.finish_weight_update()


class _LocalClient:
    """vLLM's weight-sync calls on an engine of this process."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.llm.finish_weight_update(weight_version)
        if not self.llm.reset_prefix_cache():
            raise WeightSyncError(
                "the prefix cache could not be emptied after a weight sync, so it would answer from "
                "old weights; sync only between generate calls"
            )


class WeightSender:
    """Publishes a trainer module's weights into one engine."""

    def __init__(self, llm: LLM, module: torch.nn.Module) -> None:
        self._sender = WeightTransferTrainerFactory.trainer_init(
            InProcessTrainerInit(rank=0), client=_LocalClient(llm), source=ModuleSource(module)
        )

    def publish_weights(self) -> None:
        """Put the module's current weights into the engine. A collective when the module is sharded."""
        with torch.no_grad():
            self._sender.send_weights()


WeightTransferEngineFactory.register_engine(BACKEND, InProcessReceiver)
WeightTransferTrainerFactory.register_engine(BACKEND, InProcessSender)
