"""A stage is made again when, and only when, what it is made of has changed."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_ray import dry_run, pipeline, preflight
from pear_ray.artifacts import manifest
from pear_ray.artifacts.run_dir import claim
from pear_ray.config.run import RunConfig, validate_run
from pear_ray.errors import ArtifactError, ConfigError
from pear_ray.identities import fingerprints
from pear_ray.preflight import Models
from pear_ray.records import ON_DEMAND_STAGES, STAGES
from pear_ray.telemetry.metrics_log import EventRecord, MetricRecord, MetricsLog, read_metrics

GAMES = {"games": [{"name": "chain_sum"}], "size": 4}
MODELS = Models(Path("p"), {"*": Path("b")}, "policy-1", "behavior-1")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"prompt": "1 + 2 =", "completion": "3"}\n', encoding="utf-8")
    return path


def run_config(corpus: Path, **changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "name": "t",
        "models": {"policy": "p", "behavior": "b", "max_model_len": 64},
        "corpus": {"kind": "dataset", "path": str(corpus)},
        "sft": {"optimizer": {"learning_rate": 1e-3}},
        "rl": {"problems": GAMES, "optimizer": {"learning_rate": 1e-4}, "num_steps": 1},
        "evaluate": {"problems": GAMES},
    }
    for dotted, value in changes.items():
        node = tree
        *parents, leaf = dotted.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return validate_run(tree, origin="test")


def changed(corpus: Path, *, models: Models = MODELS, **changes: Any) -> list[str]:
    before = fingerprints(run_config(corpus), MODELS)
    after = fingerprints(run_config(corpus, **changes), models)
    assert tuple(before) == (*STAGES, *ON_DEMAND_STAGES)
    return [stage for stage in STAGES if before[stage] != after[stage]]


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"models__dtype": "float32"}, "score"),  # ids are ids
        ({"models__max_model_len": 32}, "collect"),
        ({"score__rows_per_block": 8}, "score"),
        ({"sft__num_epochs": 2}, "sft"),
        ({"sft__optimizer": {"learning_rate": 2e-3}}, "sft"),
        ({"sft__weights": {"kind": "uniform"}}, "sft"),
        ({"seed": 1}, "sft"),
        ({"rl__group_size": 4}, "rl"),
        ({"rl__optimizer": {"learning_rate": 2e-4}}, "rl"),
        ({"evaluate__temperature": 0.5}, "evaluate"),
        ({"name": "u"}, "report"),
    ],
)
def test_a_change_reaches_its_stage_and_all_after_it(
    corpus: Path, changes: dict[str, Any], first: str
) -> None:
    assert changed(corpus, **changes) == list(STAGES[STAGES.index(first) :])


@pytest.mark.parametrize(
    "changes",
    [
        {"telemetry__trackers": ["tensorboard"]},
        {"telemetry__project": "other"},
        {"cluster__address": "auto"},
        {"cluster__num_samplers": 4},
        {"cluster__num_trainers": 1},
        {"cluster__wait_for_devices_s": 5.0},
        {"output_dir": "elsewhere"},
    ],
)
def test_what_changes_no_number_changes_nothing(corpus: Path, changes: dict[str, Any]) -> None:
    assert changed(corpus, **changes) == []


def test_the_corpus_files_contents_count_and_its_place_does_not(
    corpus: Path, tmp_path: Path
) -> None:
    before = fingerprints(run_config(corpus), MODELS)
    (tmp_path / "elsewhere").mkdir()
    moved = corpus.rename(tmp_path / "elsewhere" / corpus.name)
    assert fingerprints(run_config(moved), MODELS) == before
    moved.write_text('{"prompt": "1 + 2 =", "completion": "4"}\n', encoding="utf-8")
    after = fingerprints(run_config(moved), MODELS)
    assert [stage for stage in STAGES if before[stage] == after[stage]] == []


def test_models_count_where_they_are_used(corpus: Path) -> None:
    other = Models(Path("p"), {"*": Path("b")}, "policy-2", "behavior-1")
    assert changed(corpus, models=other) == list(STAGES)
    other = Models(Path("p"), {"*": Path("b")}, "policy-1", "behavior-2")
    assert changed(corpus, models=other) == list(STAGES[1:])  # a file's rows need no behavior model


def test_the_plan_passes_over_what_is_complete_and_current(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus)
    identities = fingerprints(config, MODELS)
    for stage, identity in (("collect", identities["collect"]), ("score", "another")):
        manifest.begin(tmp_path / "run" / stage, identity)
        manifest.complete(tmp_path / "run" / stage, counts={})
    manifest.begin(tmp_path / "run" / "sft", identities["sft"])  # begun, never completed
    plan = pipeline.plan(config, tmp_path / "run", MODELS)
    assert [(stage.name, stage.is_current) for stage in plan] == [
        (name, name == "collect") for name in STAGES
    ]
    made = json.loads((tmp_path / "run" / "collect" / "manifest.json").read_text(encoding="utf-8"))
    assert made["fingerprint"] == plan[0].fingerprint


def test_a_stage_on_demand_is_planned_only_when_asked_for(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus)
    plan = pipeline.plan(config, tmp_path, MODELS, only="diagnose")
    assert [stage.name for stage in plan] == ["collect", "score", "diagnose"]
    assert [stage.name for stage in pipeline.plan(config, tmp_path, MODELS, only="sft")] == [
        *STAGES
    ]


def test_a_diagnosis_hangs_on_scores_and_weights(corpus: Path) -> None:
    def diagnosis(**changes: Any) -> str:
        return fingerprints(run_config(corpus, **changes), MODELS)["diagnose"]

    assert diagnosis(sft__weights={"kind": "pear", "gamma": 0.9}) != diagnosis()
    assert diagnosis(score__rows_per_block=8) != diagnosis()
    assert diagnosis(sft__num_epochs=2) == diagnosis()


def test_readiness_hangs_on_where_rl_begins(corpus: Path, tmp_path: Path) -> None:
    def ready(**changes: Any) -> str:
        return fingerprints(run_config(corpus, **changes), MODELS)["ready"]

    assert ready(rl__num_steps=9) == ready()
    assert ready(evaluate__temperature=0.5) == ready()
    assert ready(rl__group_size=4) != ready()
    assert ready(rl__advantage="rloo") != ready()
    assert ready(ready__num_steps=1) != ready()
    assert ready(sft__num_epochs=2) != ready()
    plan = pipeline.plan(run_config(corpus), tmp_path, MODELS, only="ready")
    assert [stage.name for stage in plan] == ["collect", "score", "sft", "ready"]


def other_run(folder: Path, identities: dict[str, str], *stages: str) -> Path:
    """A run's folder in which `stages` are complete."""
    claim(folder, name=folder.name)
    for stage in stages:
        manifest.begin(folder / stage, identities[stage])
        manifest.complete(folder / stage, counts={"rows": 1})
    return folder


def test_what_another_run_holds_is_taken_where_it_is_the_same(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, sft__num_epochs=2)
    theirs = fingerprints(run_config(corpus), MODELS)  # differs from sft on
    other = other_run(tmp_path / "other", theirs, "collect", "score", "sft")
    mine = other_run(tmp_path / "mine", fingerprints(config, MODELS), "collect")
    plan = pipeline.plan(config, mine, MODELS, reuse_from=[other])
    assert [(s.name, s.is_current, s.reuse_from) for s in plan[:3]] == [
        ("collect", True, None),
        ("score", False, other),
        ("sft", False, None),
    ]
    assert [s.name for s in plan if s.is_made] == ["collect", "score"]


def test_a_run_that_shares_no_stage_is_refused(corpus: Path, tmp_path: Path) -> None:
    theirs = fingerprints(run_config(corpus, models__max_model_len=32), MODELS)
    other = other_run(tmp_path / "other", theirs, "collect", "score")
    with pytest.raises(ArtifactError, match=r"--reuse .*other: none of its complete stages"):
        pipeline.plan(run_config(corpus), tmp_path / "mine", MODELS, reuse_from=[other])


def test_a_stage_taken_over_brings_its_numbers_and_is_not_run(corpus: Path, tmp_path: Path) -> None:
    """`report` needs no Ray; were collect to run, it would want one."""
    tree = {"models__policy": "embedded:student", "models__behavior": "embedded:teacher"}
    config = run_config(corpus, output_dir=str(tmp_path), **tree)
    identities = fingerprints(config, preflight.check_models(config))
    other = other_run(tmp_path / "other", identities, "collect")
    log = MetricsLog(other, run="other", stage="collect", attempt=1)
    log.log({"collect/rows": 5.0, "collect/odd": float("nan")}, step=1, num_steps=1)
    run_dir = pipeline.run(config, only="report", reuse_from=[other])
    assert manifest.is_current(run_dir / "collect", identities["collect"])
    records = read_metrics(run_dir / "metrics.jsonl")
    numbers, taken = (r for r in records if r.stage == "collect")
    assert isinstance(numbers, MetricRecord)
    assert (numbers.run, numbers.attempt, numbers.step) == ("t", 1, 1)
    assert numbers.metrics["collect/rows"] == 5.0
    assert numbers.metrics["collect/odd"] != numbers.metrics["collect/odd"]  # still not finite
    assert isinstance(taken, EventRecord)
    assert taken.message == f"taken from {other}"
    assert manifest.is_current(run_dir / "report", identities["report"])


def test_a_dry_run_says_what_would_be_taken(corpus: Path, tmp_path: Path) -> None:
    tree: dict[str, Any] = {"models__policy": "embedded:student", "models__max_model_len": 256}
    tree["models__behavior"] = "embedded:teacher"
    config = run_config(corpus, output_dir=str(tmp_path), **tree)
    identities = fingerprints(config, preflight.check_models(config))
    other = other_run(tmp_path / "other", identities, "collect", "score")
    text = dry_run.describe(config, reuse_from=[other])
    stages = text.partition("stages\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split(maxsplit=2)[2] for line in stages] == [
        *[f"take: complete in {other}"] * 2,
        *["make"] * 4,
    ]
    only_sft = dry_run.describe(config, only="sft", reuse_from=[other])
    stages = only_sft.partition("stages\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in stages] == ["collect", "score", "sft"]
    assert not (tmp_path / "t").exists()


def test_a_band_of_pass_rates_is_told_and_is_part_of_rl(corpus: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"{n} + 1?", "answer": n + 1, "rate": n / 4} for n in range(5)]
    problems = tmp_path / "sums.jsonl"
    problems.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    settings: dict[str, Any] = {
        "models__policy": "embedded:student",
        "models__behavior": "embedded:teacher",
        "models__max_model_len": 256,
        "rl__problems": {"kind": "file", "path": str(problems)},
        "rl__rewards": {"components": [{"kind": "exact"}]},
        "rl__difficulty": {"rates": {"column": "rate"}},
    }
    config = run_config(corpus, output_dir=str(tmp_path), **settings)
    said = "3 of 5 problems kept, with pass rates from 0.1 to 0.9 (1 below, 1 above)"
    assert said in dry_run.describe(config)
    table = tmp_path / "rates.parquet"
    identities = []
    for rate in (0.5, 0.6):
        rows = [{"problem_id": f"sums/{n}", "pass_rate": rate} for n in range(1, 6)]
        pq.write_table(pa.Table.from_pylist(rows), table)
        by_table = {"rl__difficulty": {"rates": {"kind": "table", "path": str(table)}}}
        found = fingerprints(run_config(corpus, **settings | by_table), MODELS)
        identities.append(found)
    assert identities[0]["sft"] == identities[1]["sft"]
    assert identities[0]["rl"] != identities[1]["rl"]


def test_a_run_without_suites_is_what_it_was_before_there_were_any(corpus: Path) -> None:
    """Neither the key nor the defaults of suites are in the identity of what was evaluated."""
    config = run_config(corpus)
    tree = json.loads(config.model_dump_json())["evaluate"]
    assert tree.pop("suites") == []
    assert tree.pop("checkpoints") == ["base", "sft", "rl"]
    assert tree.pop("tensor_parallel_size") == 1
    assert set(tree) == {
        "problems", "num_samples", "k", "temperature", "max_tokens", "confidence", "rewards"
    }  # fmt: skip
    found = fingerprints(config, MODELS)
    engine = {"dtype": config.models.dtype, "max_model_len": config.models.max_model_len}
    assert found["evaluate"] == manifest.fingerprint(
        stage="evaluate",
        config=[tree, engine, config.seed],
        inputs={"sft": found["sft"], "rl": found["rl"]},
    )


def test_rl_without_checkpointing_is_what_it_was_and_with_it_another(corpus: Path) -> None:
    config = run_config(corpus)
    tree = config.rl.model_dump(mode="json")
    assert tree.pop("activation_checkpointing") is False
    found = fingerprints(config, MODELS)
    engine = {"dtype": config.models.dtype, "max_model_len": config.models.max_model_len}
    assert found["rl"] == manifest.fingerprint(
        stage="rl", config=[tree, engine | {"seed": 0}], inputs={"sft": found["sft"]}
    )
    again = fingerprints(run_config(corpus, rl__activation_checkpointing=True), MODELS)
    assert again["rl"] != found["rl"]
    assert again["sft"] == found["sft"]


def sampled(corpus: Path, **changes: Any) -> RunConfig:
    tree = run_config(corpus).model_dump(mode="json")
    tree["corpus"] = {"kind": "sampled", "problems": GAMES} | changes
    return validate_run(tree, origin="test")


def test_a_run_without_a_control_or_a_seed_of_its_corpus_is_what_it_was(corpus: Path) -> None:
    """Neither key is in the identities of a run that does not use it."""
    config = sampled(corpus)
    tree = json.loads(config.model_dump_json())
    assert tree["sft"]["weights"].pop("control") == "none"
    assert tree["corpus"].pop("seed") is None
    assert tree["corpus"].pop("tensor_parallel_size") == 1
    found = fingerprints(config, MODELS)
    engine = {"dtype": config.models.dtype, "max_model_len": config.models.max_model_len}
    models = {"behavior": "behavior-1", "policy": "policy-1"}
    assert found["collect"] == manifest.fingerprint(
        stage="collect", config=[tree["corpus"], engine, 0], inputs=models
    )
    assert found["sft"] == manifest.fingerprint(
        stage="sft",
        config=[tree["sft"], engine | {"seed": 0}],
        inputs={"scored": found["score"], "policy": "policy-1"},
    )
    assert found["diagnose"] == manifest.fingerprint(
        stage="diagnose",
        config=[tree["sft"]["weights"], engine],
        inputs={"scored": found["score"], "policy": "policy-1"},
    )
    control = changed(corpus, sft__weights={"kind": "pear", "control": "shuffled"})
    assert control == list(STAGES[STAGES.index("sft") :])


def test_runs_of_other_seeds_share_a_corpus_with_a_seed_of_its_own(corpus: Path) -> None:
    def collected(run_seed: int, **changes: Any) -> str:
        tree = sampled(corpus, **changes).model_dump(mode="json") | {"seed": run_seed}
        return fingerprints(validate_run(tree, origin="test"), MODELS)["collect"]

    assert collected(1) != collected(2)
    assert collected(1, seed=7) == collected(2, seed=7) == collected(7)  # sampled alike
    assert collected(1, seed=7) != collected(1, seed=8)


WEIGHTS = {"kind": "by_source", "weights": {"F": 1.0, "N": 0.0}}


@pytest.mark.parametrize(
    ("sources", "wrong"),
    [
        ({"F": 3}, "no row of N; give"),
        ({"F": 3, "N": 1, "M": 2}, "no weight for M; give"),
        ({"M": 2}, "no weight for M; no row of F, N; give"),
    ],
)
def test_weights_by_source_name_the_sources_of_the_corpus(
    corpus: Path, tmp_path: Path, sources: dict[str, int], wrong: str
) -> None:
    """Before anything starts where the corpus is there, and again when it has been made."""
    config = run_config(corpus, sft__weights=WEIGHTS)
    identity = fingerprints(config, MODELS)["collect"]
    manifest.begin(tmp_path / "run" / "collect", identity)
    manifest.complete(tmp_path / "run" / "collect", counts={}, details={"sources": sources})
    collect = pipeline.plan(config, tmp_path / "run", MODELS)[0]
    with pytest.raises(
        ConfigError, match=f"the sources of .*jsonl .*run/collect/corpus. are .*{wrong}"
    ):
        pipeline.check_sources(config, tmp_path / "run", collect, MODELS)


def test_sources_that_all_have_a_weight_are_fine(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, sft__weights=WEIGHTS)
    unmade = pipeline.plan(config, tmp_path / "run", MODELS)[0]
    pipeline.check_sources(config, tmp_path / "run", unmade, MODELS)  # nobody knows them yet
    manifest.begin(tmp_path / "run" / "collect", unmade.fingerprint)
    manifest.complete(
        tmp_path / "run" / "collect", counts={}, details={"sources": {"N": 9, "F": 3}}
    )
    collect = pipeline.plan(config, tmp_path / "run", MODELS)[0]
    pipeline.check_sources(config, tmp_path / "run", collect, MODELS)


def test_the_sources_of_a_corpus_to_be_sampled_are_known_by_its_models(
    corpus: Path, tmp_path: Path
) -> None:
    tree = sampled(corpus).model_dump(mode="json")
    tree["sft"]["weights"] = WEIGHTS
    config = validate_run(tree, origin="test")
    collect = pipeline.plan(config, tmp_path, MODELS)[0]
    with pytest.raises(
        ConfigError, match=r"the sources of models\.behavior are b: no weight for b"
    ):
        pipeline.check_sources(config, tmp_path, collect, MODELS)
    both = Models(Path("p"), {"F": Path("b"), "N": Path("c")}, "policy-1", "behavior-2")
    pipeline.check_sources(config, tmp_path, collect, both)


def test_a_suite_of_a_file_is_known_by_its_content(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "1 + 1 =", "answer": "2"}\n', encoding="utf-8")
    suite = {
        "name": "own",
        "problems": {"kind": "file", "path": str(path)},
        "rewards": {"components": [{"kind": "exact"}]},
    }
    assert changed(corpus, evaluate__suites=[suite]) == ["evaluate", "report"]
    before = fingerprints(run_config(corpus, evaluate__suites=[suite]), MODELS)
    path.write_text('{"prompt": "1 + 2 =", "answer": "3"}\n', encoding="utf-8")
    after = fingerprints(run_config(corpus, evaluate__suites=[suite]), MODELS)
    assert before["evaluate"] != after["evaluate"]
    assert before["rl"] == after["rl"]
