"""Adapters from a trainer into the engine of the same process, which computes beside its base."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from vllm import LLM
from vllm.distributed.weight_transfer.base import materialize_full_tensor
from vllm.lora.request import LoRARequest

from pear_ray.engines import lora
from pear_ray.engines.policy import Policy
from pear_ray.errors import WeightSyncError

# One adapter, replaced at every sync. Requests name it; its path is read when it is put in.
ADAPTER = LoRARequest("policy", 1, "put in by AdapterSender")
_SLOT = 0  # of the adapter, in an engine that has room for one


class AdapterSender:
    """Publishes a policy's adapters into one engine that was started on their base."""

    def __init__(self, llm: LLM, policy: Policy) -> None:
        self._llm, self._policy = llm, policy

    def publish_weights(self) -> list[str]:
        """Put the policy's current adapters into the engine. A collective when it is sharded.

        Returns:
            Names of the adapters' parameters that the engine does not hold bit for bit.

        Raises:
            WeightSyncError: The engine's cache could not be emptied.
        """
        sent = self._whole_adapters()
        with tempfile.TemporaryDirectory() as folder:
            lora.write_adapter(self._policy, sent, Path(folder))
            request = LoRARequest(ADAPTER.lora_name, ADAPTER.lora_int_id, folder, load_inplace=True)
            self._llm.llm_engine.add_lora(request)
        if not self._llm.reset_prefix_cache():
            raise WeightSyncError(
                "the prefix cache could not be emptied after a weight sync, so it would answer "
                "from old adapters; sync only between generate calls"
            )
        added = lora.added_weights(self._policy.causal_lm)
        wanted = {name.removeprefix("causal_lm."): each for name, each in sent.items()}
        dtype = self._llm.model_config.dtype
        (found,) = self._llm.apply_model(lambda model: differing(model, wanted, added, dtype=dtype))
        return found

    @torch.no_grad()
    def _whole_adapters(self) -> dict[str, torch.Tensor]:
        for unit in self._policy.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()  # what stays gathered after a pass is not what was trained since
        return {
            name: materialize_full_tensor(each).detach().cpu()
            for name, each in self._policy.named_parameters()
            if each.requires_grad
        }


@torch.no_grad()
def differing(
    model: nn.Module,
    sent: Mapping[str, torch.Tensor],
    added: Mapping[str, lora.Added],
    *,
    dtype: torch.dtype,
) -> list[str]:
    """Names of the adapters' parameters that `model`, vLLM's, holds otherwise than they were sent.

    Args:
        model: After the sync.
        sent: Whole parameters by name.
        added: What each adapter adds, by the name of the weight that it is on.
        dtype: What the engine rounds parameters to.
    """
    found = []
    for weight, names in added.items():
        down, up = sent[names.down].to(dtype), sent[names.up].to(dtype)
        # vLLM has the scale in B.
        for name, wanted, held in (
            (names.down, down, _held(model, weight, "lora_a_stacked")),
            (names.up, up * names.scale, _held(model, weight, "lora_b_stacked")),
        ):
            rows, columns = wanted.shape
            same = held is not None and torch.equal(
                held[:rows, :columns], wanted.to(held.device, held.dtype)
            )
            if not same or held[rows:].any() or held[:, columns:].any():
                found.append(name)
    return found


def _held(model: nn.Module, weight: str, kind: str) -> torch.Tensor | None:
    """The engine's half of the adapter on `weight`, [rank or more, ...] or [..., rank or more]."""
    path = weight.removesuffix(".weight")
    parent, _, leaf = path.rpartition(".")
    places = [(path, 0)]
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    places += [
        (f"{parent}.{fused}", parts.index(leaf)) for fused, parts in packed.items() if leaf in parts
    ]
    for place, index in places:
        try:
            stacked = getattr(model.get_submodule(place), kind, ())
        except AttributeError:
            continue
        if len(stacked) > index:
            return stacked[index][_SLOT, 0]
    return None
