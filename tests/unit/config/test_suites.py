"""Evaluation on several suites: what each inherits, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from pear_ray.config.evaluate import EvaluateConfig, distinct_rewards, suites_of
from pear_ray.config.rewards import MathVerifier
from pear_ray.config.run import RunConfig, load_run
from pear_ray.errors import ConfigError

GAMES = {"games": [{"name": "chain_sum"}], "size": 4}
FILE = {"kind": "file", "path": "own.jsonl"}
RUN = """\
name: suites
models: {policy: p, behavior: b}
corpus: {kind: dataset, path: c.jsonl}
sft: {optimizer: {learning_rate: 1e-3}}
rl:
  problems: {games: [{name: chain_sum}], size: 4}
  optimizer: {learning_rate: 1e-4}
  num_steps: 1
"""


def run(tmp_path: Path, *overrides: str) -> RunConfig:
    path = tmp_path / "suites.yaml"
    path.write_text(RUN, encoding="utf-8")
    return load_run(path, overrides)


def suites(**section: Any) -> list[Any]:
    return suites_of(EvaluateConfig.model_validate(section))


def test_the_single_form_is_the_suite_main() -> None:
    (one,) = suites(problems=GAMES, num_samples=16, k=[1, 16], temperature=0.7)
    assert (one.key, one.name, one.num_samples, one.k) == ("evaluate", "main", 16, (1, 16))
    assert (one.temperature, one.max_tokens, one.confidence) == (0.7, 128, 0.95)


def test_a_suite_inherits_what_it_does_not_say() -> None:
    main, own, hub = suites(
        problems=GAMES,
        num_samples=16,
        max_tokens=64,
        rewards={"num_processes": 3},
        suites=[
            {"name": "own", "problems": FILE, "rewards": {"components": [{"kind": "exact"}]}},
            {
                "name": "hub",
                "problems": {"kind": "hub", "name": "gsm8k"},
                "num_samples": 4,
                "k": [4],
            },
        ],
    )
    assert [each.key for each in (main, own, hub)] == [
        "evaluate",
        "evaluate.suites.0",
        "evaluate.suites.1",
    ]
    assert (own.num_samples, own.max_tokens, own.k) == (16, 64, (1, 8))
    assert (hub.num_samples, hub.k, hub.temperature) == (4, (4,), 1.0)
    # A set of the hub is mathematics where nothing else is said; processes are the section's.
    assert hub.rewards.components == [MathVerifier(kind="math")]
    assert hub.rewards.num_processes == 3


def test_suites_that_are_verified_alike_share_their_processes() -> None:
    section = {
        "suites": [{"name": name, "problems": GAMES} for name in "ab"]
        + [{"name": "c", "problems": {"kind": "hub", "name": "aime-2024"}}]
    }
    evaluate = EvaluateConfig.model_validate(section)
    assert [each.components[0].kind for each in distinct_rewards(evaluate)] == ["game", "math"]


HUB = "{name: h, problems: {kind: hub, name: gsm8k}}"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluate={}", "evaluate: nothing to evaluate on; give `problems`, or `suites`"),
        (f"evaluate.suites=[{HUB}, {HUB}]", "evaluate: two suites are called h (`problems` is"),
        (
            "evaluate={suites: [{name: h, problems: {kind: hub, name: gsm8k}, num_samples: 4}]}",
            "evaluate.suites.0.k=8 needs at least that many samples, but evaluate.suites.0.num_sam",
        ),
        (
            "evaluate={suites: [{name: own, problems: {kind: file, path: x.jsonl}}]}",
            "name another, e.g. evaluate.suites.0.rewards.components=[{kind: exact}]",
        ),
        (
            "evaluate={problems: {kind: hub, name: gsm8k}}",
            "name another, e.g. evaluate.rewards.components=[{kind: math}]",
        ),
        (
            "evaluate={suites: [{name: h, problems: {kind: hub, name: gsm9k}}]}",
            "'gsm9k' is no known set (gsm8k, math-500, aime-2024, aime-2025) and names no dataset",
        ),
        ("evaluate={problems: {kind: web, name: x}}", "is `games`, `file` or `hub`"),
        (
            "evaluate={suites: [{name: a/b, problems: {kind: hub, name: gsm8k}}]}",
            "evaluate.suites.0.name: String should match pattern",
        ),
    ],
)
def test_suites_that_cannot_be(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        run(tmp_path, override)
    assert words in str(refusal.value)
