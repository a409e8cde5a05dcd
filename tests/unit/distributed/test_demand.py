"""What a stage asks for, whether a cluster has room for it, and what is said if not."""

import pytest
from ray.core.generated.autoscaler_pb2 import AutoscalingState

from pear_ray.config.run import RunConfig, validate_run
from pear_ray.distributed.autoscaler import (
    Outlook,
    autoscaler_of,
    outlook_of,
    starting_words,
)
from pear_ray.distributed.demand import (
    Demand,
    NodeType,
    fits,
    infeasible_words,
    most_places,
    places_on,
    stage_demand,
    waiting_words,
)

GAMES = {"games": [{"name": "chain_sum"}], "size": 4}
TWO_GPUS = Demand(place={"CPU": 1.0, "GPU": 1.0}, count=2, settings="cluster.num_trainers=2")
SMALL = NodeType(name="l4", resources={"CPU": 8, "GPU": 1}, max_nodes=2)
LARGE = NodeType(name="h100", resources={"CPU": 96, "GPU": 8}, max_nodes=1)


def run_config(*, corpus: dict[str, object] | None = None, **cluster: object) -> RunConfig:
    return validate_run(
        {
            "name": "t",
            "models": {"policy": "embedded:student", "behavior": "embedded:teacher"},
            "corpus": corpus or {"kind": "dataset", "path": "unused"},
            "score": {"tensor_parallel_size": 2},
            "sft": {"optimizer": {"learning_rate": 1e-3}},
            "rl": {"problems": GAMES, "optimizer": {"learning_rate": 1e-4}, "num_steps": 1},
            "evaluate": {"problems": GAMES},
            "cluster": cluster,
        },
        origin="test",
    )


def test_each_stage_asks_for_its_own_places() -> None:
    config = run_config(num_trainers=4, num_samplers=8, min_samplers=3, device="cuda")
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
    assert asked["score"].settings == "cluster.min_samplers=3"
    assert stage_demand(config, "collect") is None
    assert stage_demand(config, "report") is None
    wide = config.evaluate.model_copy(update={"tensor_parallel_size": 4})
    asked = stage_demand(config.model_copy(update={"evaluate": wide}), "evaluate")
    assert (asked.place, asked.count) == ({"CPU": 4.0, "GPU": 4.0}, 3)
    sampled = run_config(corpus={"kind": "sampled", "problems": GAMES}, num_samplers=5)
    assert stage_demand(sampled, "collect").count == 5


def test_a_place_is_on_one_node() -> None:
    assert places_on({"CPU": 8, "GPU": 4}, {"CPU": 3.0, "GPU": 1.0}) == 2
    assert places_on({"CPU": 8}, {"CPU": 1.0, "GPU": 1.0}) == 0
    assert places_on({"CPU": 0.3}, {"CPU": 0.1}) == 3  # in floats 2.9999999999999996
    wide = Demand(place={"CPU": 2.0}, count=1, settings="")
    assert not fits(wide, [{"CPU": 1}, {"CPU": 1}])
    assert fits(wide, [{"CPU": 1}, {"CPU": 2}])


def test_what_a_cluster_can_become_is_bounded_by_type_and_in_all() -> None:
    nodes = [{"CPU": 4.0, "GPU": 1.0}]
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
    ("nodes", "free", "more", "words"),
    [
        ([{"GPU": 1.0, "CPU": 4.0}], 1.0, {"starting": "1"}, "cluster has 1, 1 starting"),
        ([], 0.0, {"starting": "2 nodes of l4"}, "cluster has 0, 2 nodes of l4 starting"),
        ([{"GPU": 2.0, "CPU": 4.0}], 1.0, {}, "cluster has 2, 1 free"),
        (
            [{"GPU": 2.0, "CPU": 1.0}],
            2.0,
            {},
            "cluster has 2, with room for 1 of 2 x (1 GPU, 1 CPU)",
        ),
        ([], 0.0, {"failed": "l4: no quota"}, "cluster has 0; could not start l4: no quota"),
    ],
)
def test_what_is_waited_for_in_words(
    nodes: list[dict[str, float]], free: float, more: dict[str, str], words: str
) -> None:
    assert waiting_words(TWO_GPUS, nodes, free=free, **more) == f"waiting for 2 GPU: {words}"


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
        "off": {"resources": {"CPU": 8}, "max_workers": 0},
    }
    settings = {"head_node_type": "head", "max_workers": 5, "available_node_types": types}
    assert autoscaler_of(settings).types == [SMALL]
    assert autoscaler_of(settings).max_nodes == 5
    # Machines whose resources the provider knows, and we do not.
    types["l4"] = {"max_workers": 2}
    assert autoscaler_of(settings).types is None
    assert autoscaler_of({}) is None
