"""Waiting for a cluster's devices, and saying so: before a stage, and while it lacks some again."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from pear_ray.config.run import RunConfig
from pear_ray.distributed.autoscaler import (
    HEAD,
    Autoscaler,
    alive_nodes,
    find_autoscaler,
    outlook,
    starting_words,
)
from pear_ray.distributed.capacity import check_capacity
from pear_ray.distributed.demand import (
    Demand,
    Node,
    NodeType,
    amounts,
    any_node_words,
    fits,
    infeasible_words,
    most_places,
    stage_demand,
    waiting_words,
)
from pear_ray.errors import CapacityError, StopRequested
from pear_ray.stopping import gracefully, stop_asked
from pear_ray.telemetry.metrics_log import EventKind

_logger = logging.getLogger(__name__)
LOOK_S = 1.0
QUIET_S = 3.0  # actors of the stage before take a moment to end: nothing is said of that
SAY_AGAIN_S = 60.0  # so that a log never looks dead
LOST_FOR_S = 5.0  # a node that is replaced at once is no news
# An autoscaler whose settings cannot be read is believed when it says so this often in a row.
VERDICTS = 5
Say = Callable[[EventKind, str], None]


def require_feasible(config: RunConfig, stages: Sequence[str]) -> None:
    """See that the cluster has room for each of `stages`, or can get it.

    Raises:
        CapacityError: It has not, and no autoscaler can start what is missing; the message says
            what would fit. Where the settings of an autoscaler cannot be read, that is found when
            the stage waits.
    """
    nodes = alive_nodes()
    demands = {stage: found for stage in stages if (found := stage_demand(config, stage))}
    short = {stage: each for stage, each in demands.items() if not fits(each, nodes)}
    if not short:
        return
    growth = _Growth()
    if growth.look() is not None:
        for stage, demand in short.items():
            growth.check(demand, stage)
    elif not config.cluster.wait_for_devices_s:
        check_capacity(config, ray.cluster_resources())
        stage, demand = next(iter(short.items()))
        raise CapacityError(_no_room(demand, stage, nodes))


class _Growth:
    """What the cluster can become. A look takes seconds, so there is one, when it is asked for.

    Attributes:
        types: The node types that can be started, as far as that is known by now.
    """

    def __init__(self) -> None:
        self._looked = False
        self._autoscaler: Autoscaler | None = None
        self.types: Sequence[NodeType] | None = None

    def look(self) -> Autoscaler | None:
        """The cluster's autoscaler, if it has one."""
        if not self._looked:
            self._autoscaler, self._looked = find_autoscaler(), True
            self.types = None if self._autoscaler is None else self._autoscaler.types
        return self._autoscaler

    @property
    def is_dark(self) -> bool:
        """Whether nodes can be started, and nobody says which."""
        return self._autoscaler is not None and self.types is None

    def check(self, demand: Demand, stage: str) -> None:
        """See that it can offer what `stage` asks for, where it says what it can start.

        Raises:
            CapacityError: It cannot.
        """
        autoscaler = self.look()
        if autoscaler is None or autoscaler.types is None:
            return
        heads = [node for node in alive_nodes() if HEAD in node.resources]
        found = most_places(demand, heads, autoscaler.types, max_nodes=autoscaler.max_nodes)
        if found < demand.count:
            raise CapacityError(infeasible_words(demand, stage, autoscaler.types, found=found))

    def words(self, demand: Demand, nodes: Sequence[Node]) -> str:
        """What is waited for, and what comes."""
        now = outlook()
        return waiting_words(
            demand,
            nodes,
            self.types or (),
            starting=starting_words(demand, now, self.types),
            failed=now.failed,
        )


def _no_room(demand: Demand, stage: str, nodes: Sequence[Node]) -> str:
    return (
        f"{stage}: no devices after {waiting_words(demand, nodes)}; lower {demand.settings}, give "
        "the cluster more nodes, or let the run wait for them with cluster.wait_for_devices_s"
        f"{any_node_words(demand, nodes)}"
    )


@contextlib.contextmanager
def devices_for(config: RunConfig, stage: str, *, say: Say) -> Iterator[None]:
    """Wait until the cluster has free what `stage` asks for; then look after it.

    `say` gets a sentence when it has to be waited for, now and then while it lasts, and one at its
    end.

    Raises:
        CapacityError: It cannot be had, or not within `cluster.wait_for_devices_s`.
        StopRequested: SIGTERM came while waiting.
    """
    demand = stage_demand(config, stage)
    if demand is None:
        yield
        return
    growth = _Growth()
    _Wait(config, stage, demand, growth, say).until_there()
    with _looked_after(demand, growth, say):
        yield


class _Wait:
    """Waits for a stage's places.

    A placement group that is not placed yet is what tells an autoscaler what to start. It asks for
    what is free rather than for what is there, and it ends with this driver, however that ends.
    `request_resources` of Ray's SDK would hold nodes that nobody uses after a driver was killed,
    and each job on a cluster overwrites what the others asked for.
    """

    def __init__(
        self, config: RunConfig, stage: str, demand: Demand, growth: _Growth, say: Say
    ) -> None:
        self._config, self._stage, self._demand = config, stage, demand
        self._growth = growth
        self._said = _Said(say)
        self._verdicts = 0

    def until_there(self) -> None:
        demand = self._demand
        group = placement_group(
            [dict(demand.place) for _ in range(demand.count)],
            strategy="PACK",
            bundle_label_selector=[dict(demand.selector)] * demand.count,
        )
        began, short_since = time.monotonic(), None
        try:
            with gracefully(lambda: None):  # Ray waits in C, where an exception would be lost
                while not stop_asked():
                    if group.wait(LOOK_S):
                        self._said.over()
                        return
                    if time.monotonic() - began < QUIET_S:
                        continue
                    if fits(demand, alive_nodes()):
                        short_since = None
                    else:
                        short_since = short_since or time.monotonic()
                    self._look(group, short_since)
        finally:
            remove_placement_group(group)
        raise StopRequested(
            f"stopped by SIGTERM while {self._stage} waited for devices; run the same command "
            "again to go on"
        )

    def _look(self, group: PlacementGroup, short_since: float | None) -> None:
        """Say what is waited for; end it where that is hopeless."""
        nodes = alive_nodes()
        words = self._growth.words(self._demand, nodes)
        self._said.say(words)  # before a look, which takes seconds
        if short_since is not None:
            self._growth.check(self._demand, self._stage)
        limit_s = self._config.cluster.wait_for_devices_s
        # Without a limit a run that has begun waits for a lost node to be replaced by whomever: it
        # had its devices, or `require_feasible` would not have let it begin.
        if (
            limit_s is not None
            and short_since is not None
            and time.monotonic() - short_since >= limit_s
        ):
            raise CapacityError(_no_room(self._demand, self._stage, nodes))
        if not self._growth.is_dark:
            return
        unfit = group.id.hex() in outlook().infeasible
        self._verdicts = self._verdicts + 1 if unfit else 0
        if self._verdicts >= VERDICTS:
            raise CapacityError(_never(self._demand, self._stage))


def _never(demand: Demand, stage: str) -> str:
    spot = ", not on spot nodes (cluster.training_nodes)" if demand.selector else ""
    return (
        f"{stage} asks for {demand.count} x ({amounts(demand.place)}), and the autoscaler says "
        f"that no node type of its cluster can offer it; lower {demand.settings}, or see the "
        f"cluster's file for what it may start{spot}"
    )


@contextlib.contextmanager
def _looked_after(demand: Demand, growth: _Growth, say: Say) -> Iterator[None]:
    """Within this, a thread says when the cluster has lost devices that the stage waits for."""
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(demand, growth, _Said(say), over), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _watch(demand: Demand, growth: _Growth, said: "_Said", over: threading.Event) -> None:
    short_since: float | None = None
    while not over.wait(LOOK_S):
        try:
            nodes = alive_nodes()
            if fits(demand, nodes):
                short_since = None
                said.over()
                continue
            short_since = short_since or time.monotonic()
            if time.monotonic() - short_since < LOST_FOR_S:
                continue
            said.say(growth.words(demand, nodes))
            growth.look()
        except (ray.exceptions.RayError, RuntimeError) as error:  # words never fail a run
            _logger.debug("cannot look at the cluster: %s", error)


class _Said:
    """Says a sentence when it is another one, or was said long ago."""

    def __init__(self, say: Say) -> None:
        self._say, self._last, self._when, self._began = say, "", 0.0, 0.0

    def say(self, words: str) -> None:
        now = time.monotonic()
        if not self._last:
            self._began = now
        if words != self._last or now - self._when >= SAY_AGAIN_S:
            self._last, self._when = words, now
            self._say(EventKind.WAITING, words)

    def over(self) -> None:
        """There is nothing to wait for any more."""
        if self._last:
            self._last = ""
            waited_s = time.monotonic() - self._began
            self._say(EventKind.WAITED, f"the devices are there, after {waited_s:.0f} s")
