"""The network interface on which the ranks of a group meet: the one that Ray uses.

Read by every process with an engine: it imports neither torch nor Ray Train.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Protocol

import psutil
import ray

VARIABLE = "GLOO_SOCKET_IFNAME"


class HasAddress(Protocol):
    """An address of an interface, as psutil gives it."""

    @property
    def address(self) -> str:
        """As text."""


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
