"""A run file that holds what has no default."""

from pathlib import Path

import pytest

MINIMAL = """\
name: tiny
models: {policy: models/base, behavior: models/teacher}
corpus: {kind: dataset, path: corpus.jsonl}
sft: {optimizer: {learning_rate: 1e-5}}
rl:
  problems: {games: [{name: chain_sum}, {name: countdown}], size: 10}
  optimizer: {learning_rate: 1e-6}
  num_steps: 3
evaluate: {problems: {games: [{name: chain_sum}], size: 10}}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path
