"""What a stage asks for, whether a cluster has room for it, and what is said if not."""

import dataclasses

import pytest
from ray.core.generated.autoscaler_pb2 import AutoscalingState
from small_run import GAMES, small_run

from pear_ray.distributed.autoscaler import (
    Outlook,
    autoscaler_of,
    outlook_of,
    starting_words,
)
from pear_ray.distributed.demand import (
    Demand,
    Node,
    NodeType,
    fits,
    infeasible_words,
    most_places,
    places_on,
    stage_demand,
    waiting_words,
)

SPLIT = {"score": {"tensor_parallel_size": 2}}
TWO_GPUS = Demand(place={"CPU": 1.0, "GPU": 1.0}, count=2, settings="cluster.num_trainers=2")
SMALL = NodeType(name="l4", resources={"CPU": 8, "GPU": 1}, max_nodes=2)
LARGE = NodeType(name="h100", resources={"CPU": 96, "GPU": 8}, max_nodes=1)
SPOT = {"ray.io/market-type": "spot"}
SPOT_TYPE = NodeType(name="l4-spot", resources=SMALL.resources, max_nodes=3, labels=SPOT)
KEEPS_OFF = dataclasses.replace(TWO_GPUS, selector={"ray.io/market-type": "!spot"})


def node(labels: dict[str, str] | None = None, **resources: float) -> Node:
    return Node(resources=resources, free=resources, labels=labels or {})


def test_each_stage_asks_for_its_own_places() -> None:
    config = small_run(SPLIT, num_trainers=4, num_samplers=8, min_samplers=3, device="cuda")
    asked = {stage: stage_demand(config, stage) for stage in ("score", "sft", "rl", "evaluate")}
    assert {stage: each.count for stage, each in asked.items()} == {
        "score": 3,
        "sft": 4,
        "rl": 4,
        "evaluate": 3,
    }
    # An engine of two devices, which leaves half of its CPUs to Ray Data's own tasks.
    assert asked["score"].place == {"CPU": 1.0, "GPU": 2.0}
    assert asked["sft"].place == {"CPU": 1.0, "GPU": 1.0}
    # Training loses work where a node is taken back; the others lose a block or a call.
    keeps_off = {stage for stage, each in asked.items() if each.selector}
    assert keeps_off == {"sft", "rl"}
    assert stage_demand(small_run(training_nodes="any"), "rl").selector == {}
    assert asked["score"].settings == "cluster.min_samplers=3"
    assert stage_demand(config, "collect") is None
    assert stage_demand(config, "report") is None
    sampled = small_run({"corpus": {"kind": "sampled", "problems": GAMES}}, num_samplers=5)
    assert stage_demand(sampled, "collect").count == 5
    wide = config.evaluate.model_copy(update={"tensor_parallel_size": 4})
    evaluate = stage_demand(config.model_copy(update={"evaluate": wide}), "evaluate")
    assert (evaluate.place, evaluate.count) == ({"CPU": 4.0, "GPU": 4.0}, 3)


def test_a_place_is_on_one_node() -> None:
    def on(place: dict[str, float], **resources: float) -> int:
        return places_on(node(**resources), Demand(place=place, count=1, settings=""))

    assert on({"CPU": 3.0, "GPU": 1.0}, CPU=8, GPU=4) == 2
    assert on({"CPU": 1.0, "GPU": 1.0}, CPU=8) == 0
    assert on({"CPU": 0.1}, CPU=0.3) == 3  # in floats 2.9999999999999996
    wide = Demand(place={"CPU": 2.0}, count=1, settings="")
    assert not fits(wide, [node(CPU=1), node(CPU=1)])
    assert fits(wide, [node(CPU=1), node(CPU=2)])


def test_what_a_cluster_can_become_is_bounded_by_type_and_in_all() -> None:
    nodes = [node(CPU=4, GPU=1)]
    assert most_places(TWO_GPUS, nodes, [SMALL, LARGE], max_nodes=10) == 1 + 2 + 8
    assert most_places(TWO_GPUS, nodes, [SMALL, LARGE], max_nodes=1) == 1 + 8
    assert most_places(TWO_GPUS, nodes, [SMALL, LARGE], max_nodes=0) == 1


def test_what_cannot_be_had_says_what_would_fit() -> None:
    words = infeasible_words(TWO_GPUS, "sft", [SMALL], found=1)
    assert words == (
        "sft asks for 2 x (1 GPU, 1 CPU), and the cluster cannot grow to that (node types: l4 has "
        "1 GPU, 8 CPU, at most 2 nodes): at most 1 of 2 would fit; lower cluster.num_trainers=2 to "
        "1, or raise max_workers of the cluster"
    )
    none = infeasible_words(TWO_GPUS, "rl", [], found=0)
    assert "(node types: none): no node of it has room for one; lower" in none


@pytest.mark.parametrize(
    ("nodes", "more", "words"),
    [
        ([node(GPU=1, CPU=4)], {"starting": "1"}, "cluster has 1, 1 starting"),
        ([], {"starting": "2 nodes of l4"}, "cluster has 0, 2 nodes of l4 starting"),
        (
            [Node(resources={"GPU": 2, "CPU": 4}, free={"GPU": 1, "CPU": 3})],
            {},
            "cluster has 2, 1 free",
        ),
        ([node(GPU=2, CPU=1)], {}, "cluster has 2, with room for 1 of 2 x (1 GPU, 1 CPU)"),
        ([], {"failed": "l4: no quota"}, "cluster has 0; could not start l4: no quota"),
    ],
)
def test_what_is_waited_for_in_words(nodes: list[Node], more: dict[str, str], words: str) -> None:
    assert waiting_words(TWO_GPUS, nodes, **more) == f"waiting for 2 GPU: {words}"


def test_nodes_that_may_be_taken_back_are_not_counted_for_training() -> None:
    nodes = [node(GPU=1, CPU=4), node(SPOT, GPU=8, CPU=96)]
    assert not fits(KEEPS_OFF, nodes)
    assert fits(TWO_GPUS, nodes)
    assert waiting_words(KEEPS_OFF, nodes) == (
        "waiting for 2 GPU on on-demand nodes: cluster has 1"
    )
    # Where none are there and none can come, nothing is said of them.
    assert waiting_words(KEEPS_OFF, nodes[:1]) == "waiting for 2 GPU: cluster has 1"
    assert waiting_words(KEEPS_OFF, [], [SPOT_TYPE]).startswith("waiting for 2 GPU on on-demand")
    assert most_places(KEEPS_OFF, nodes, [SPOT_TYPE, LARGE], max_nodes=10) == 1 + 8
    coming = Outlook({"l4": 1, "l4-spot": 3}, "", [])
    assert starting_words(KEEPS_OFF, coming, [SMALL, SPOT_TYPE]) == "1"
    assert starting_words(TWO_GPUS, coming, [SMALL, SPOT_TYPE]) == "4"
    words = infeasible_words(KEEPS_OFF, "sft", [SPOT_TYPE], found=0)
    assert "asks for 2 x (1 GPU, 1 CPU) on on-demand nodes, and the cluster cannot" in words
    assert "l4-spot has 1 GPU, 8 CPU, at most 3 nodes, spot)" in words
    assert words.endswith("or let it train on spot nodes with cluster.training_nodes=any")


def test_what_is_starting_is_counted_in_devices_where_the_types_are_known() -> None:
    state = AutoscalingState()
    state.pending_instance_requests.add(ray_node_type_name="h100", count=1)
    state.pending_instances.add(ray_node_type_name="l4")
    state.pending_instances.add(ray_node_type_name="head", details="allocated :f0 (HEAD)")
    state.failed_instance_requests.add(ray_node_type_name="l4", reason="no\ncapacity")
    state.infeasible_gang_resource_requests.add(details="0a1b:PACK|PENDING")
    now = outlook_of(state)
    assert now == Outlook({"h100": 1, "l4": 1}, "l4: no capacity", ["0a1b"])
    assert starting_words(TWO_GPUS, now, [SMALL, LARGE]) == "9"
    assert starting_words(TWO_GPUS, now, None) == "1 node of h100, 1 node of l4"
    assert starting_words(TWO_GPUS, Outlook({}, "", []), None) == ""


def test_an_autoscaler_by_its_settings() -> None:
    types = {
        "head": {"resources": {"CPU": 4}, "max_workers": 0},
        "l4": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 2},
        "l4-spot": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 3, "labels": SPOT},
        "off": {"resources": {"CPU": 8}, "max_workers": 0},
    }
    settings = {"head_node_type": "head", "max_workers": 5, "available_node_types": types}
    assert autoscaler_of(settings).types == [SMALL, SPOT_TYPE]
    assert autoscaler_of(settings).max_nodes == 5
    # Machines whose resources the provider knows, and we do not.
    types["l4"] = {"max_workers": 2}
    assert autoscaler_of(settings).types is None
    assert autoscaler_of({}) is None
