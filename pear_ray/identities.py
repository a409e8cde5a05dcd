"""What every stage's artifact is made of: its own config, and the identities of what it reads."""

import json
from typing import Any

from pear_ray.artifacts import manifest, replay
from pear_ray.config.corpus import DatasetCorpus, sampling_seed
from pear_ray.config.evaluate import CHECKPOINTS, suites_of
from pear_ray.config.run import RunConfig
from pear_ray.corpus.files import corpus_fingerprint
from pear_ray.preflight import Models
from pear_ray.tasks.difficulty import rates_content
from pear_ray.tasks.problem_sets import content_of


def fingerprints(config: RunConfig, models: Models) -> dict[str, str]:
    """Identity of every stage's artifact: its own config, and the identities of what it reads."""
    tree = _without_newer_keys(config)
    engine = {"dtype": config.models.dtype, "max_model_len": config.models.max_model_len}
    # Not the number of trainers: rows, seeds and the sums of a step are the same with any, and a
    # stage that was stopped goes on with another.
    group = engine | {"seed": config.seed}
    found: dict[str, str] = {}

    def add(stage: str, settings: Any, **inputs: str) -> None:
        found[stage] = manifest.fingerprint(stage=stage, config=settings, inputs=inputs)

    if isinstance(config.corpus, DatasetCorpus):
        settings = {name: value for name, value in tree["corpus"].items() if name != "path"}
        add(
            "collect",
            [settings, config.models.max_model_len],
            rows=corpus_fingerprint(config.corpus),
            policy=models.policy_fingerprint,
            aligned=models.behavior_fingerprint if config.models.align == "bytes" else "",
        )
    else:
        add(
            "collect",
            [tree["corpus"], engine, sampling_seed(config.corpus, run_seed=config.seed)],
            **content_of(config.corpus.problems),
            behavior=models.behavior_fingerprint,
            policy=models.policy_fingerprint,
        )
    add(
        "score",
        [tree["score"], engine, config.models.align],
        corpus=found["collect"],
        behavior=models.behavior_fingerprint,
    )
    add("sft", [tree["sft"], group], scored=found["score"], policy=models.policy_fingerprint)
    problems = content_of(config.rl.problems) | rates_content(config.rl)
    add("rl", [tree["rl"], group], sft=found["sft"], **problems)
    suites = _suite_contents(config)
    settings = [tree["evaluate"], engine, config.seed]
    add("evaluate", settings, sft=found["sft"], rl=found["rl"], **suites)
    add("report", tree["name"], **found)
    add(
        "diagnose",
        [tree["sft"]["weights"], engine],
        scored=found["score"],
        policy=models.policy_fingerprint,
    )
    ready = [tree["ready"], replay.starting_settings(config), group]
    add("ready", ready, sft=found["sft"], policy=models.policy_fingerprint, **problems)
    return found


def _without_newer_keys(config: RunConfig) -> dict[str, Any]:
    """A run's settings less the keys that came later, where it does not use them.

    Such a run is what it was before there were any.
    """
    tree = json.loads(config.model_dump_json()) | {"rl": replay.rl_settings(config)}
    if not tree["evaluate"]["suites"]:
        del tree["evaluate"]["suites"]
    if tree["evaluate"]["checkpoints"] == [*CHECKPOINTS]:
        del tree["evaluate"]["checkpoints"]
    if tree["sft"]["weights"].get("control") == "none":
        del tree["sft"]["weights"]["control"]
    for section in ("corpus", "evaluate"):
        if tree[section].get("tensor_parallel_size") == 1:
            del tree[section]["tensor_parallel_size"]
    tree["corpus"].pop("seed", None)  # who samples with which seed is told apart by the seed itself
    return tree


def _suite_contents(config: RunConfig) -> dict[str, str]:
    """What the identity of the evaluation says of its problems' content."""
    return {
        key if suite.key == "evaluate" else f"{key} of {suite.name}": content
        for suite in suites_of(config.evaluate)
        for key, content in content_of(suite.problems).items()
    }
