"""`key=value` reaches every field, from left to right, and says what it could not do."""

from pathlib import Path

import pytest

from pear_ray.config.run import load_run
from pear_ray.errors import ConfigError


def test_values_are_read_as_yaml(run_file: Path) -> None:
    config = load_run(
        run_file,
        [
            "sft.num_epochs=2",
            "sft.optimizer.learning_rate=3e-4",
            "telemetry.trackers=[tensorboard, wandb]",
            "cluster.address=auto",
            "evaluate.k=[1, 4]",
        ],
    )
    assert config.sft.num_epochs == 2
    assert config.sft.optimizer.learning_rate == 3e-4
    assert config.telemetry.trackers == ["tensorboard", "wandb"]
    assert config.cluster.address == "auto"
    assert config.evaluate.k == [1, 4]


def test_the_last_one_wins_and_the_rest_stays(run_file: Path) -> None:
    config = load_run(run_file, ["seed=1", "rl.group_size=4", "seed=2"])
    assert (config.seed, config.rl.group_size, config.rl.num_steps) == (2, 4, 3)


def test_a_section_without_a_line_in_the_file_can_be_reached(run_file: Path) -> None:
    assert load_run(run_file, ["score.audit_rows=0"]).score.audit_rows == 0


def test_list_items_are_counted_from_zero(run_file: Path) -> None:
    config = load_run(
        run_file,
        ["rl.problems.games.1.name=base_conversion", "rl.problems.games.0.params.max_terms=3"],
    )
    first, second = config.rl.problems.games
    assert (first.name, first.params) == ("chain_sum", {"max_terms": 3})
    assert second.name == "base_conversion"


def test_a_whole_choice_can_be_replaced(run_file: Path) -> None:
    config = load_run(run_file, ["sft.weights={kind: uniform}"])
    assert config.sft.weights.kind == "uniform"


def test_a_value_may_hold_an_equals_sign(run_file: Path) -> None:
    assert load_run(run_file, ["models.policy=/models/a=b"]).models.policy == "/models/a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft.num_epochs", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("rl.problems.games.2.name=x", "'2' is not an index into a list of 2"),
        ("rl.problems.games.first.name=x", "'first' is not an index into a list of 2"),
        ("rl.problems.games.-1={name: x}", "'-1' is not an index into a list of 2"),
        ("name.x=1", "'name' is a value, not a section"),
        ("name.x.y=1", "is a value, not a section"),
        ("sft.weights={kind: uniform", "not valid YAML"),
    ],
)
def test_what_cannot_be_applied(run_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(run_file, [override])
    assert repr(override) in str(caught.value)
    assert message in str(caught.value)
