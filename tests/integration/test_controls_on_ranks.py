"""Controls of a step of the real loop: what tokens weigh, on one rank and on two; and no SFT."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import control_ranks
import pytest
import torch
from safetensors.torch import load_file
from spawned_ranks import WAYS, found_by_way
from training_runs import job, run_config

from pear_ray.artifacts import manifest
from pear_ray.artifacts.tables import SCORED, WEIGHT_SAMPLES, read_table, write_rows
from pear_ray.config.run import validate_run
from pear_ray.distributed.sft_loop import SftWorker
from pear_ray.embedded.paths import embedded_path
from pear_ray.engines.handover.files import check_files
from pear_ray.engines.handover.record import read_record
from pear_ray.stages import sft


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics of the step by way and arm."""
    return found_by_way(control_ranks.run_rank, tmp_path_factory.mktemp("controls"))


@pytest.mark.parametrize("arm", control_ranks.ARMS)
def test_neither_microbatches_nor_ranks_change_a_control(
    found: dict[str, dict[str, dict[str, float]]], arm: str
) -> None:
    for way in WAYS:
        assert found[way][arm] == pytest.approx(found["at once"][arm], rel=1e-4), way


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_control_is_another_objective_than_its_arm(
    found: dict[str, dict[str, dict[str, float]]], level: str
) -> None:
    own = found["at once"][f"none {level}"]
    for control in ("shuffled", "position_profile", "likelihood_only"):
        arm = found["at once"][f"{control} {level}"]
        assert arm["sft/nll"] == pytest.approx(own["sft/nll"], rel=1e-6)  # of the same tokens
        for name in ("sft/weighted_loss", "sft/grad_norm"):  # they agree to 1e-7 where equal
            assert arm[name] != pytest.approx(own[name], rel=1e-5), (control, name)
    if level == "token":  # the tokens' weights are the arm's, each given once
        shuffled = found["at once"]["shuffled token"]
        for name in ("sft/weight/mean", "sft/ess_fraction"):
            assert shuffled[name] == pytest.approx(own[name], rel=1e-5)
    profile = found["at once"][f"position_profile {level}"]
    assert profile["sft/weight/mean"] == pytest.approx(own["sft/weight/mean"], rel=1e-5)


def used(scored: Path, **weights: Any) -> dict[tuple[str, int], float]:
    """What each token of the first step weighed, by example and tokens left, as was trained."""
    settings = {"weights": {"kind": "pear"} | weights, "microbatch_tokens": 24}
    SftWorker(job(run_config(scored, **settings), scored, "sft")).step(0)
    rows = read_table(scored / "sft" / "weight_samples" / "step-000001.parquet", WEIGHT_SAMPLES)
    return {(row["example_id"], row["tokens_left"]): row["weight"] for row in rows.to_pylist()}


def test_shuffled_weights_are_the_arms_own_elsewhere(process_group: None, scored: Path) -> None:
    own, shuffled = used(scored), used(scored, control="shuffled")
    assert own.keys() == shuffled.keys()
    assert sorted(own.values()) == sorted(shuffled.values())
    moved = sum(own[token] != shuffled[token] for token in own)
    assert moved > 0.9 * len(own)  # the last tokens' weights are 1, and many are given to another
    by_row, by_other_row = (
        {example: weight for (example, _), weight in each.items()}
        for each in (
            used(scored, level="sequence"),
            used(scored, level="sequence", control="shuffled"),
        )
    )
    assert sorted(by_row.values()) == sorted(by_other_row.values())
    kept = [example for example in by_row if by_row[example] == by_other_row[example]]
    assert len(kept) < len(by_row) / 2  # sequences whose every ratio is clipped can weigh the same


def test_a_position_profile_is_the_steps_mean_at_each_distance_from_the_end(
    process_group: None, scored: Path
) -> None:
    own, profile = used(scored), used(scored, control="position_profile")
    at = defaultdict(list)
    for (_, tokens_left), weight in own.items():
        at[tokens_left].append(weight)
    means = {token: sum(at[token[1]]) / len(at[token[1]]) for token in own}
    assert profile == pytest.approx(means, rel=1e-6)
    assert profile != pytest.approx(own, rel=1e-3)


def test_weights_by_source_leave_the_others_out(process_group: None, scored: Path) -> None:
    """The gradient of the oracle is that of its own rows alone, where weights are divided by."""
    file = scored / "score" / "scored" / "rows.parquet"
    rows = read_table(file, SCORED).to_pylist()
    for number, row in enumerate(rows):
        row["source"] = "FN"[number % 2]
    write_rows(file, rows, SCORED)
    oracle = {"kind": "by_source", "weights": {"F": 2.0, "N": 0.0}}
    settings: dict[str, Any] = {"reduction": "weight_norm", "global_batch_size": 16}
    config = run_config(scored, weights=oracle, **settings)
    by_source = SftWorker(job(config, scored, "sft")).step(0)
    write_rows(file, [row for row in rows if row["source"] == "F"], SCORED)
    config = run_config(scored, weights={"kind": "uniform"}, **settings)
    alone = SftWorker(job(config, scored, "sft")).step(0)
    for name in ("sft/weighted_loss", "sft/grad_norm"):
        assert by_source[name] == pytest.approx(alone[name], rel=1e-5)
    assert by_source["sft/source/N/weight/mean"] == 0.0
    assert by_source["sft/source/F/weight_share"] == 1.0


@pytest.mark.parametrize("export", [pytest.param("live", marks=pytest.mark.slow), "ema"])
def test_no_sft_hands_on_the_base_bit_for_bit(local_ray: None, scored: Path, export: str) -> None:
    """The stage on two ranks, and its checkpoint through the gate."""
    tree = run_config(scored).model_dump(mode="json")
    tree["sft"] |= {"num_epochs": 0, "export": export, "ema_decay": 0.5}
    tree["sft"]["objective"] = {"kind": "psft"}  # whose scores nobody needs
    tree["cluster"] |= {"num_trainers": 2, "cpus_per_worker": 0.5}
    config = validate_run(tree, origin="test")
    rows = read_table(scored / "score" / "scored", SCORED).to_pylist()
    for stage in ("score", "sft"):
        manifest.begin(scored / stage, stage)
    (scored / "score" / "scored").mkdir()
    write_rows(scored / "score" / "scored" / "rows.parquet", rows, SCORED)
    manifest.complete(scored / "score", counts={"rows": 16, "tokens": 256})
    made = sft.run(config, scored, attempt=1)
    assert made.counts == {"steps": 0, "rows": 0, "tokens": 0}
    base = load_file(embedded_path("student") / "model.safetensors")
    model = scored / "sft" / "model"
    exported = load_file(model / "model.safetensors")
    assert exported.keys() == base.keys()
    for name, tensor in base.items():
        assert exported[name].dtype == tensor.dtype
        assert torch.equal(exported[name], tensor)
    assert read_record(model) is not None
    check_files(model, embedded_path("student"))
    assert len(read_table(scored / "sft" / "weight_samples.parquet", WEIGHT_SAMPLES)) == 0
