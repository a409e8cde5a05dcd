"""A stage waits for devices that others have, and gives up where the cluster has too few."""

import threading
import time

import pytest
from ray.util.placement_group import placement_group, remove_placement_group
from small_run import small_run

from pear_ray.distributed.waiting import devices_for, require_feasible
from pear_ray.errors import CapacityError

FREED_AFTER_S = 6.0


def test_what_others_have_is_waited_for_with_words(local_ray: None) -> None:
    taken = placement_group([{"CPU": 1}])
    assert taken.wait(30)
    threading.Timer(FREED_AFTER_S, remove_placement_group, [taken]).start()
    began, said = time.monotonic(), []
    with devices_for(
        small_run(wait_for_devices_s=0.0),  # a limit only for what the cluster does not have
        "sft",
        say=lambda kind, words: said.append(f"{kind}: {words}"),
    ):
        assert time.monotonic() - began > FREED_AFTER_S - 1
    assert said[0] == "waiting: waiting for 2 CPU: cluster has 2, 1 free"
    assert said[-1].startswith("waited: the devices are there, after ")
    # Its own placement group is given back: the devices are free for the stage.
    whole = placement_group([{"CPU": 1}, {"CPU": 1}])
    assert whole.wait(10)
    remove_placement_group(whole)


def test_a_cluster_that_does_not_grow_is_not_waited_for_for_ever(local_ray: None) -> None:
    config = small_run(num_trainers=4)
    with pytest.raises(CapacityError, match=r"^asked for 4 CPU, the cluster has 2: lower"):
        require_feasible(config, ["collect", "sft"])
    require_feasible(config, ["score"])
    patient = small_run(num_trainers=4, wait_for_devices_s=1.0)
    require_feasible(patient, ["sft"])
    said: list[str] = []
    with (
        pytest.raises(CapacityError, match=r"lower cluster\.num_trainers=4, give the cluster more"),
        devices_for(patient, "sft", say=lambda kind, words: said.append(words)),
    ):
        pass
    assert said == ["waiting for 4 CPU: cluster has 2"]
