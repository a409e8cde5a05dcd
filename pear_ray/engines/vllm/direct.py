"""Weights written to where an engine on a CPU computes with them, once a sync has shown where.

vLLM's reload makes every layer anew as if from a checkpoint. Beside a small model that is half a
weight sync, and copying the weights is a tenth of it. A first sync goes that way and is read back
(`held`); where it left each parameter, the later ones are written, and read back like the first.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from pear_ray.engines.vllm.cpu_kernels import turned_weight
from pear_ray.engines.vllm.held import SentWeights, places_of
from pear_ray.errors import WeightSyncError

Destinations = Mapping[str, list[torch.Tensor]]


def find_destinations(model: nn.Module, sent: SentWeights) -> Destinations | None:
    """Views of all that `model`, vLLM's, computes with, by the names of what one sync sent.

    None where something of it cannot be written in place: packed by vLLM, of three dimensions and
    more, of another name, or part of a layer over several devices.

    Args:
        model: After a sync that left every parameter as it was sent.
        sent: What that sync sent.
    """
    if sent.not_seen:
        return None
    found = {}
    for name in sent.seen:
        views = [_views(*place) for place in places_of(model, name, sent)]
        if not views or any(each is None for each in views):
            return None
        found[name] = [view for each in views for view in each or ()]
    return found


def _views(layer: nn.Module, rows: slice, kind: str) -> list[torch.Tensor] | None:
    """All that `layer` holds of the parameter; None where it has a copy that cannot be written."""
    stored = getattr(layer, kind).data
    views = [stored[rows]] if stored.numel() else []
    if kind == "weight" and "cpu_linear" in vars(layer):
        turned = turned_weight(layer)
        if turned is None:
            return None
        views.append(turned.t()[rows])
    return views


@torch.inference_mode()
def write(destinations: Destinations, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write whole weights, as named in `destinations`.

    Raises:
        WeightSyncError: One has another shape than that which was sent before.
    """
    for name, tensor in tensors:
        for destination in destinations[name]:
            part = destination[: len(tensor)]  # an embedding has rows beyond the vocabulary
            if part.shape != tensor.shape:
                raise WeightSyncError(
                    f"{name} is {tuple(tensor.shape)} and the engine's is {tuple(part.shape)}; a "
                    "policy's parameters keep their shapes between weight syncs"
                )
            part.copy_(tensor)
