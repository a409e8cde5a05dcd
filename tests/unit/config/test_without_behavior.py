"""A run may name no behavior model where the corpus's own log-probs are kept."""

from pathlib import Path

import pytest

from pear_ray.config.run import load_run
from pear_ray.errors import ConfigError

SAMPLED = "corpus={kind: sampled, problems: {games: [{name: chain_sum}], size: 2}}"


def test_kept_logprobs_need_no_model(run_file: Path) -> None:
    config = load_run(run_file, ["models.behavior=null", "score.given=keep"])
    assert config.models.behavior is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "models.behavior is missing, so the corpus cannot be scored"),
        ([SAMPLED], "corpus.kind=sampled wants a model that answers"),
        (["score.given=keep", "score.top_k=4"], "score.top_k and models.align=bytes want such"),
        (["score.given=keep", "models.align=bytes", "sft.weights.level=sequence"], "want such a"),
    ],
)
def test_everything_else_needs_one(run_file: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_run(run_file, ["models.behavior=null", *overrides])
