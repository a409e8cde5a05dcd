"""The resolved config written beside a run reads back to the same run."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.config.run import RunConfig, dump_run, load_run, read_tree, validate_run
from pear_ray.config.yaml12 import parse

FILES = sorted((Path(__file__).parents[3] / "jobs" / "runs").glob("*.yaml"))
SHIPPED = [path for path in FILES if "base" not in read_tree(path)]  # the others are studies


def reread(config: RunConfig) -> RunConfig:
    return validate_run(parse(dump_run(config)), origin="dump")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_runs(path: Path) -> None:
    config = load_run(path)
    assert reread(config) == config


@pytest.mark.parametrize("word", ["on", "null", "1e-5", "007", "a: b", "#x", " ", "é\n", "~"])
def test_strings_stay_strings(run_file: Path, word: str) -> None:
    config = load_run(run_file)
    models = config.models.model_copy(update={"policy": word})
    changed = config.model_copy(update={"models": models})
    assert reread(changed) == changed
    # PyYAML by its 1.1 rules, as other tools read the file, agrees.
    assert yaml.safe_load(dump_run(changed))["models"]["policy"] == word


@settings(deadline=None)  # a busy machine is no failure
@given(rate=st.floats(min_value=1e-300, max_value=1e300, allow_nan=False))
def test_floats_stay_exact(rate: float) -> None:
    tree = parse(
        f"""
        name: tiny
        models: {{policy: a, behavior: b}}
        corpus: {{kind: dataset, path: c}}
        sft: {{optimizer: {{learning_rate: {rate!r}}}}}
        rl:
          problems: {{games: [{{name: x}}], size: 1}}
          optimizer: {{learning_rate: 1}}
          num_steps: 1
        evaluate: {{problems: {{games: [{{name: x}}], size: 1}}}}
        """
    )
    config = validate_run(tree, origin="test")
    assert config.sft.optimizer.learning_rate == rate
    assert reread(config) == config


def test_the_dump_holds_defaults_too(run_file: Path) -> None:
    tree = parse(dump_run(load_run(run_file)))
    assert tree["sft"]["weights"] == {
        "kind": "pear",
        "level": "token",
        "gamma": 0.999,
        "block_size": 4,
        "log_ratio_clip_low": -0.08,
        "log_ratio_clip_high": 0.3,
        "log_weight_clip_low": -10.0,
        "log_weight_clip_high": 5.0,
        "ratio_policy": "live",
        "rescale": "none",
        "control": "none",
    }
    assert tree["cluster"]["address"] is None
