"""Ray's own reader takes the shipped launcher files, as `ray up` would; it contacts no cloud."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

CLUSTER = Path(__file__).parents[2] / "cluster"


def prepared(tree: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(tree))
    validate_config(config)
    return config


@pytest.mark.parametrize("name", ["aws", "gcp", "azure", "on-prem"])
def test_ray_takes_it(name: str) -> None:
    tree = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text(encoding="utf-8"))
    config = prepared(tree)
    # What Ray would fill in itself installs another Ray, and listens everywhere.
    assert config["head_setup_commands"] == config["worker_setup_commands"] == []
    assert config["head_start_ray_commands"] == tree["head_start_ray_commands"]
    assert config["idle_timeout_minutes"] == 10
    assert config["metadata"] == tree["metadata"]
    types = config["available_node_types"]
    assert types[config["head_node_type"]].get("max_workers", 0) <= tree["max_workers"]
    if name != "on-prem":
        assert set(types) == set(tree["available_node_types"])
    with pytest.raises(Exception, match="max_worker_s"):
        prepared(tree | {"max_worker_s": 1})
