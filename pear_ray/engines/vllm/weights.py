"""Weights from a trainer into the engine of the same process, through vLLM's weight-transfer API.

The backends that ship with vLLM send between processes (NCCL, CUDA IPC). Colocated, trainer and
engine share a process, so tensors are handed over as they are, on CPU and CUDA alike.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.distributed.fsdp import FSDPModule
from vllm import LLM
from vllm.distributed.weight_transfer.base import (
    ModuleSource,
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
    materialize_full_tensor,
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

from pear_ray.engines.policy import Policy
from pear_ray.engines.vllm.direct import Destinations, find_destinations, write
from pear_ray.engines.vllm.held import SentWeights, differing
from pear_ray.engines.vllm.spec import GATHERED_BYTES
from pear_ray.errors import WeightSyncError

BACKEND = "in_process"


@dataclass
class InProcessInit(WeightTransferInitInfo):
    """Nothing to agree on: both ends are in this process."""


@dataclass
class InProcessUpdate(WeightTransferUpdateInfo):
    """One bucket of full tensors, `[(name, tensor), ...]`, by reference."""

    tensors: Any = None


class InProcessReceiver(WeightTransferEngine[InProcessInit, InProcessUpdate]):
    """vLLM's end: loads buckets layer by layer as if from a checkpoint, or writes them in place."""

    init_info_cls = InProcessInit
    update_info_cls = InProcessUpdate
    _destinations: Destinations | None = None

    def write_from_now_on(self, sent: SentWeights) -> None:
        """Write later updates where this one, found as it was `sent`, is; on CPUs, if that can be.

        On CUDA a sync is bound by its bytes.
        """
        if self.device.type == "cpu":
            self._destinations = find_destinations(self.model, sent)

    def init_transfer_engine(self, init_info: InProcessInit) -> None:  # noqa: ARG002 - vLLM's
        """Nothing to open; a sender's first update goes vLLM's way."""
        self._destinations = None

    def start_weight_update(self) -> None:
        """Make the model ready to be loaded again."""
        if self._destinations is not None:
            return
        self._packed = packed_heads(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket."""
        # Not the base class's: it synchronises an accelerator, which a CPU does not have.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: InProcessUpdate) -> None:
        """Load the tensors of one bucket into the model."""
        if self._destinations is None:
            self.model.load_weights(update_info.tensors)
        else:
            write(self._destinations, update_info.tensors)

    def finish_weight_update(self) -> None:
        """Finish the layers, and rebuild what layerwise loading leaves stale."""
        if self._destinations is not None:
            return
        finalize_layerwise_reload(self.model, self.model_config)
        repack_heads(self._packed)

    def shutdown(self) -> None:
        """Nothing to close."""


def packed_heads(model: torch.nn.Module) -> dict[Any, Any]:
    """Embeddings and output heads that the engine keeps a packed copy of (on a CPU), with it."""
    return {
        module: module.cpu_linear
        for module in model.modules()
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear")
    }


def repack_heads(before: dict[Any, Any]) -> None:
    """Make the packed copies anew that a reload has left as they were.

    vLLM 0.32 on CPU leaves that of a tied head: the engine would go on sampling from old weights,
    silently, off by nats.

    Args:
        before: What `packed_heads` found before the reload.
    """
    for head, packed in before.items():
        if head.cpu_linear is packed:
            head.quant_method.process_weights_after_loading(head)


@dataclass
class InProcessTrainerInit(TrainerInitInfo):
    """Trainer's end of the in-process backend."""

    backend: ClassVar[str] = BACKEND


class InProcessSender(TrainerWeightTransferEngine[InProcessTrainerInit]):
    """Trainer's end: every rank feeds its own engine, so every rank is a sender."""

    init_info_cls = InProcessTrainerInit
    sent = SentWeights(sync=0)
    num_syncs = 0

    @classmethod
    def trainer_init(
        cls, init_info: InProcessTrainerInit, *, client: Any, source: Any = None
    ) -> "InProcessSender":
        """Connect `source` to the engine behind `client`."""
        client.init_weight_transfer_engine({})
        return cls(client=client, source=source, is_sender=init_info.is_sender)

    def send_weights(self) -> None:
        """Gather the parameters group by group (a collective over ranks) and load each group."""
        self.sent = SentWeights(sync=self.num_syncs)
        self.num_syncs += 1
        self.client.start_weight_update()
        for names, tensors in self.source.iter_groups():
            # Loaded before the next group is gathered: the gathered copies are freed in between.
            detached = [tensor.detach() for tensor in tensors]
            self.sent.note(names, detached)
            self.client.update_weights({"tensors": list(zip(names, detached, strict=True))})
        self.client.finish_weight_update()


class PolicySource(ModuleSource):
    """A policy's weights under their Hugging Face names, one all-gather per FSDP2 unit.

    Adapters are added to the weights that they are on, and not parameters of their own.

    `full_tensor()` on every parameter would be one collective each: on many small parameters the
    waiting for each other, not the bytes, is what a sync costs. For the same reason layers are
    gathered ahead of their turn, all at once where they are small.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.causal_lm)
        self._policy = policy
        self._units = {
            name: unit for name, unit in policy.named_modules() if isinstance(unit, FSDPModule)
        }
        self._layered: list[tuple[list[str], FSDPModule | None, int]] = []
        self._names = {name: name for name, _ in policy.causal_lm.named_parameters()}
        self._owners: dict[str, tuple[torch.nn.Module, str]] = {}
        self._added: dict[str, Any] = {}
        if policy.frozen_base is not None:
            # An extra that an install need not have, and seconds to import.
            from pear_ray.engines import lora  # noqa: PLC0415

            self._names = lora.file_names(policy.causal_lm)
            self._added = lora.added_weights(policy.causal_lm)

    def metadata(self) -> list[ParamMeta]:
        """Names, dtypes and shapes of what iterating gives."""
        return [
            ParamMeta(name, each.dtype, tuple(each.shape))
            for name, each in ((name, self._parameter(own)) for name, own in self._names.items())
        ]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole weights, one at a time."""
        return ((name, self._whole(name)) for name in self._names)

    def _parameter(self, name: str) -> torch.nn.Parameter:
        # Looked up in its module each time: FSDP2 exchanges whole and split ones.
        if name not in self._owners:
            path, _, leaf = name.rpartition(".")
            self._owners[name] = (self._policy.causal_lm.get_submodule(path), leaf)
        module, leaf = self._owners[name]
        return getattr(module, leaf)

    def _whole(self, name: str) -> torch.Tensor:
        """The weight of that name in the model's file (a collective where it is still split)."""
        weight = materialize_full_tensor(self._parameter(self._names[name]))
        added = self._added.get(name)
        if added is None:
            return weight
        from pear_ray.engines.lora import merge  # noqa: PLC0415 - as above

        down, up = (
            materialize_full_tensor(self._parameter(each)) for each in (added.down, added.up)
        )
        return merge(weight, down=down, up=up, scale=added.scale)

    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        """Groups in vLLM's order (embeddings, layers, the rest), each whole while it is used.

        Layers that all fit into `GATHERED_BYTES` are one group with the rest, since vLLM looks up
        all its parameters for each. They stay whole, as the rest does, for the next forward pass:
        it is the canary's, and need not gather them again.
        """
        root = self._units.get("")
        if root is None:
            yield from super().iter_groups()
            return
        layers = self._layers_of_groups()
        root.unshard()
        if sum(num_bytes for _, _, num_bytes in layers) <= GATHERED_BYTES:
            for _ in _gathered_ahead(layers):
                pass
            names = [name for group, _, _ in layers for name in group]
            yield names, [self._whole(name) for name in names]
            return
        try:
            for names, layer in _gathered_ahead(layers):
                tensors = [self._whole(name) for name in names]
                if layer is None:
                    # vLLM finishes a tied embedding only when the whole update ends, after it is
                    # sharded again.
                    tensors = [tensor.clone() for tensor in tensors]
                yield names, tensors
                if layer:
                    layer.reshard()
        finally:
            root.reshard()

    def _layers_of_groups(self) -> list[tuple[list[str], FSDPModule | None, int]]:
        """Names of each group, the unit that holds them, and its bytes when it is whole."""
        if not self._layered:
            units = [(names, self._layer_of(names)) for names in self.groups()]
            self._layered = [(names, unit, _num_bytes(unit)) for names, unit in units]
        return self._layered

    def _layer_of(self, names: list[str]) -> FSDPModule | None:
        """The unit that holds these parameters; None when that is the root."""
        within = (
            unit
            for prefix, unit in self._units.items()
            if prefix and f"causal_lm.{names[0]}".startswith(f"{prefix}.")
        )
        return next(within, None)


def _gathered_ahead(
    groups: Sequence[tuple[list[str], FSDPModule | None, int]],
) -> Iterator[tuple[list[str], FSDPModule | None]]:
    """Each group once it is whole, with as many more under way as `GATHERED_BYTES` allow."""
    waiting: deque[tuple[tuple[list[str], FSDPModule | None, int], Any]] = deque()
    upcoming, under_way = deque(groups), 0
    while upcoming or waiting:
        while upcoming and (not waiting or under_way + upcoming[0][2] <= GATHERED_BYTES):
            group = upcoming.popleft()
            _, layer, num_bytes = group
            waiting.append((group, layer.unshard(async_op=True) if layer else None))
            under_way += num_bytes
        (names, layer, num_bytes), handle = waiting.popleft()
        if handle:
            handle.wait()
        yield names, layer
        under_way -= num_bytes


def _num_bytes(layer: FSDPModule | None) -> int:
    """Bytes of a layer's parameters when it is whole."""
    if not isinstance(layer, torch.nn.Module):
        return 0
    return sum(parameter.numel() * parameter.element_size() for parameter in layer.parameters())


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
                "the prefix cache could not be emptied after a weight sync, so it would answer "
                "from old weights; sync only between generate calls"
            )


class WeightSender:
    """Publishes a policy's weights into one engine."""

    def __init__(self, llm: LLM, policy: Policy) -> None:
        self._llm = llm
        self._sender = WeightTransferTrainerFactory.trainer_init(
            # Every rank feeds its own engine, so each is rank 0 of a transfer of its own.
            InProcessTrainerInit(rank=0),  # pyrefly: ignore[unexpected-keyword] - vLLM is untyped
            client=_LocalClient(llm),
            source=PolicySource(policy),
        )

    def publish_weights(self) -> list[str]:
        """Put the policy's current weights into the engine. A collective when it is sharded.

        Returns:
            Names of the parameters that the engine does not hold as they were sent. See `held`. Of
            an engine over several ranks, whose parts cannot be compared so, none.
        """
        with torch.no_grad():
            self._sender.send_weights()
        if self._llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size > 1:
            return []
        sent, dtype = self._sender.sent, self._llm.model_config.dtype
        (found,) = self._llm.apply_model(lambda model: differing(model, sent, dtype=dtype))
        if not found and self._sender.num_syncs == 1:
            self._llm.collective_rpc(
                lambda worker: worker.weight_transfer_engine.write_from_now_on(sent)
            )
        return found


WeightTransferEngineFactory.register_engine(BACKEND, InProcessReceiver)
WeightTransferTrainerFactory.register_engine(BACKEND, InProcessSender)
