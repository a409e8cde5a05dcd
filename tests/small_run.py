"""A run of every stage that needs no file: its config is what tests of a cluster are about."""

from typing import Any

from pear_ray.config.run import RunConfig, validate_run

GAMES = {"games": [{"name": "chain_sum"}], "size": 4}


def small_run(sections: dict[str, Any] | None = None, **cluster: object) -> RunConfig:
    """The run with `sections` instead of its own, and `cluster`."""
    tree = {
        "name": "t",
        "models": {"policy": "embedded:student", "behavior": "embedded:teacher"},
        "corpus": {"kind": "dataset", "path": "unused"},
        "sft": {"optimizer": {"learning_rate": 1e-3}},
        "rl": {"problems": GAMES, "optimizer": {"learning_rate": 1e-4}, "num_steps": 1},
        "evaluate": {"problems": GAMES},
        "cluster": cluster,
    }
    return validate_run(tree | (sections or {}), origin="test")
