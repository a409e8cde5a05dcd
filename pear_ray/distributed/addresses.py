"""The network interface on which the ranks of a worker group meet: the one that Ray uses."""

import os
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

VARIABLE = "GLOO_SOCKET_IFNAME"


class HasAddress(Protocol):
    """An address of an interface, as psutil gives it."""

    @property
    def address(self) -> str:
        """As text."""


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


def use_rays_interface() -> None:
    """Have gloo listen on the interface of this node's address in Ray, unless one is named."""
    name = interface_of(ray.util.get_node_ip_address(), psutil.net_if_addrs())
    if name is not None:
        os.environ.setdefault(VARIABLE, name)


def interface_of(address: str, interfaces: Mapping[str, Iterable[HasAddress]]) -> str | None:
    """The name of the interface that has `address`; None where none does (a translated one)."""
    for name, addresses in interfaces.items():
        if any(each.address == address for each in addresses):
            return name
    return None
