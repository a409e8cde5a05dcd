"""The SFT loop with real models, driven step by step in one process."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import job, run_config
from transformers import AutoModelForCausalLM

from pear_ray.artifacts.tables import SCORED, SCORED_TOP, WEIGHT_SAMPLES, read_table, write_rows
from pear_ray.distributed.sft_loop import COMPARED_ROWS, SftWorker
from pear_ray.distributed.sft_rows import num_training_rows, training_rows
from pear_ray.embedded.paths import embedded_path
from pear_ray.engines.hf_scorer import reference_logprobs
from pear_ray.errors import TrainingError


@pytest.mark.parametrize("reduction", ["sum", "token_mean", "seq_mean", "weight_norm"])
def test_microbatches_do_not_change_an_sft_step(
    process_group: None, scored: Path, reduction: str
) -> None:
    """One microbatch of all rows, and about one row each: same loss and gradient."""
    found = []
    for microbatch_tokens in (8192, 24):
        config = run_config(scored, reduction=reduction, microbatch_tokens=microbatch_tokens)
        worker = SftWorker(job(config, scored, "sft"))
        metrics = worker.step(0)
        # After its first step, AdamW's first moment is the clipped gradient times 1 - beta1.
        state = worker.trainer.optimizer.state
        moments = [state[p]["exp_avg"].full_tensor() for p in worker.trainer.module.parameters()]
        found.append((metrics, moments))
    (whole, whole_gradients), (cut, cut_gradients) = found
    assert whole["sft/weighted_loss"] == pytest.approx(cut["sft/weighted_loss"], rel=1e-5)
    assert whole["sft/grad_norm"] == pytest.approx(cut["sft/grad_norm"], rel=1e-4)
    for one, other in zip(whole_gradients, cut_gradients, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


OBJECTIVES = ["nll", "dft", "p_family", "iw_sft", "talr"]
OBJECTIVES += ["psft", "eaft", "asft", "sft_kl", "forward_kl"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_and_does_not_see_microbatches(
    process_group: None, scored: Path, objective: str
) -> None:
    """With PEAR weights on it and negatives beside it; on candidates of a real scoring."""
    rows = add_candidates(scored)
    kind: dict[str, Any] = {"kind": objective}
    if objective in ("asft", "sft_kl"):
        kind["reference_top_k"] = 4
    settings: dict[str, Any] = {"objective": kind, "negatives": {"scale": 0.05}}
    norms = []
    for microbatch_tokens in (8192, 24):
        config = run_config(scored, **settings, microbatch_tokens=microbatch_tokens)
        worker = SftWorker(job(config, scored, "sft"))
        metrics = worker.step(0)
        norms.append(metrics["sft/grad_norm"])
        assert metrics["sft/negatives/num_tokens"] > 0
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert norms[0] > 0
    assert len(worker.rows) == len(rows)  # the negatives too


def add_candidates(run_dir: Path) -> list[dict[str, Any]]:
    """Give the scored rows candidates, make every fourth a negative, and add the initial scores."""
    rows = read_table(run_dir / "score" / "scored", SCORED).to_pylist()
    generator = torch.Generator().manual_seed(1)
    for number, row in enumerate(rows):
        count = sum(row["loss_mask"])
        logits = torch.randn(count, 40, generator=generator)
        top = logits.log_softmax(-1).topk(4)
        row["is_negative"] = number % 4 == 3
        row["top_ids"] = (top.indices + 5).flatten().tolist()
        row["top_logprobs"] = top.values.flatten().tolist()
    write_rows(run_dir / "score" / "scored" / "rows.parquet", rows, SCORED_TOP)
    initial = run_dir / "sft" / "initial" / "scored"
    initial.mkdir(parents=True)
    write_rows(initial / "rows.parquet", rows, SCORED_TOP)
    return rows


def test_the_ratio_of_the_average(process_group: None, scored: Path) -> None:
    """Before the first step the average is the policy itself; afterwards it lags behind."""
    rows = {}
    for ratio_policy in ("live", "ema"):
        weights = {"kind": "pear", "ratio_policy": ratio_policy}
        config = run_config(scored, weights=weights, ema_decay=0.5)
        worker = SftWorker(job(config, scored, "sft"))
        rows[ratio_policy] = [worker.step(step) for step in range(2)]
    for name in ("sft/weighted_loss", "sft/grad_norm", "sft/log_ratio/mean"):
        assert rows["live"][0][name] == pytest.approx(rows["ema"][0][name], rel=1e-6)
    lag = rows["ema"][1]["sft/log_ratio/mean"] - rows["live"][1]["sft/log_ratio/mean"]
    assert lag < -1e-3  # the policy has learnt its rows; the average only half as much
    assert rows["live"][1]["sft/nll"] == pytest.approx(rows["ema"][1]["sft/nll"], rel=1e-6)


def test_a_rank_without_rows_in_a_microbatch_keeps_weights_all_the_same(
    process_group: None, scored: Path
) -> None:
    """The first step's weights are kept for the report; another rank may have more microbatches."""
    worker = SftWorker(job(run_config(scored), scored, "sft"))
    mine = worker._microbatches(worker._my_rows(0))
    worker._accumulate([*mine, []], keep_weights_of=0)
    kept = read_table(scored / "sft" / "weight_samples", WEIGHT_SAMPLES)
    ids = {row["example_id"] for rows in mine for row in rows}
    assert set(kept["example_id"].to_pylist()) == ids  # of every microbatch


def with_sources(run_dir: Path, *names: str) -> list[dict[str, Any]]:
    """The scored rows, of these sources by turns."""
    file = run_dir / "score" / "scored" / "rows.parquet"
    rows = read_table(file, SCORED).to_pylist()
    for number, row in enumerate(rows):
        row["source"] = names[number % len(names)]
    write_rows(file, rows, SCORED)
    return rows


def test_sources_are_logged_apart(process_group: None, scored: Path) -> None:
    """Like the step of a corpus of that source alone; no microbatch changes them."""
    whole = SftWorker(job(run_config(scored, global_batch_size=16), scored, "sft")).step(0)
    assert not any(name.startswith("sft/source/") for name in whole)
    rows = with_sources(scored, "a/b", "c")
    config = run_config(scored, global_batch_size=16, microbatch_tokens=24)
    found = SftWorker(job(config, scored, "sft")).step(0)
    assert {k: v for k, v in found.items() if "/source/" not in k} == pytest.approx(whole, rel=1e-4)
    for source in ("a/b", "c"):
        only = [row for row in rows if row["source"] == source]
        write_rows(scored / "score" / "scored" / "rows.parquet", only, SCORED)
        alone = SftWorker(job(run_config(scored), scored, "sft")).step(0)
        name = f"sft/source/{source.replace('/', '_')}"
        same = {
            metric: alone[f"sft/{metric}"]
            for metric in (
                *("num_tokens", "nll", "weight/mean", "ess_fraction", "log_ratio/mean"),
                *("log_ratio_clip_low_fraction", "log_ratio_clip_high_fraction"),
                "log_weight_floor_fraction",
            )
        }
        shares = {
            "token_share": alone["sft/num_tokens"] / whole["sft/num_tokens"],
            "weight_share": alone["sft/num_tokens"]
            * alone["sft/weight/mean"]
            / (whole["sft/num_tokens"] * whole["sft/weight/mean"]),
        }
        logged = {k.removeprefix(f"{name}/"): v for k, v in found.items() if f"{name}/" in k}
        assert logged == pytest.approx(same | shares, rel=1e-5)


def test_the_gradient_ratio_is_that_of_plain_pytorch(process_group: None, scored: Path) -> None:
    config = run_config(scored, microbatch_tokens=24)
    worker = SftWorker(job(config, scored, "sft"))
    found = worker.gradient_ratio(0)["sft/grad_norm_ratio_to_uniform"]
    rows = worker._my_rows(0)[:COMPARED_ROWS]
    norms = [_gradient_norm(rows, weighted=weighted) for weighted in (True, False)]
    assert found == pytest.approx(norms[0] / norms[1], rel=1e-4)
    assert abs(found - 1) > 0.05  # the two differ


def _gradient_norm(rows: list[dict[str, Any]], *, weighted: bool) -> float:
    """Of the weighted NLL, by transformers' logits and autograd; weights by PEAR's recursion."""
    model = AutoModelForCausalLM.from_pretrained(embedded_path("student"), dtype=torch.float32)
    num_tokens = sum(sum(row["loss_mask"]) for row in rows)
    for row in rows:
        ids = torch.tensor(row["token_ids"])
        logprobs = model(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        chosen = logprobs.gather(1, ids[1:, None])[:, 0][torch.tensor(row["loss_mask"])[1:]]
        weights = [1.0]
        behavior = torch.tensor(row["behavior_logprobs"])[torch.tensor(row["loss_mask"])]
        for ratio in (chosen.detach() - behavior).clamp(-0.08, 0.30).tolist()[:0:-1]:
            weights.insert(0, 0.999 * math.exp(ratio) * weights[0])
        losses = -chosen * torch.tensor(weights) if weighted else -chosen
        (losses.sum() / num_tokens).backward()
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))


@pytest.mark.parametrize("backend", ["fsdp", "ddp"])
def test_looking_at_the_gradient_ratio_changes_no_bit(
    process_group: None, scored: Path, backend: str
) -> None:
    """DeepSpeed's probe is in test_backends.py: it wants a process group of its own."""
    ends = []
    for looks in (True, False):
        alarms = {"gradient_ratio_every": int(looks)}
        settings: dict[str, Any] = {"backend": {"kind": backend}, "alarms": alarms}
        settings |= {"ema_decay": 0.5, "weights": {"kind": "pear", "ratio_policy": "ema"}}
        worker = SftWorker(job(run_config(scored, **settings), scored, "sft"))
        ratios = [worker.gradient_ratio(0)]
        metrics = [worker.step(0)]
        ratios.append(worker.gradient_ratio(1))
        metrics.append(worker.step(1))
        assert [len(each) for each in ratios] == [int(looks)] * 2
        ends.append((metrics, [_whole(p) for p in worker.trainer.module.parameters()]))
    (metrics, weights), (plain_metrics, plain_weights) = ends
    assert metrics == plain_metrics
    assert all(torch.equal(one, other) for one, other in zip(weights, plain_weights, strict=True))


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    found = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return found.detach().clone()


def test_the_gradient_ratio_is_looked_at_when_it_is_due(process_group: None, scored: Path) -> None:
    alarms = {"gradient_ratio_every": 2}
    rows = add_candidates(scored)
    settings: dict[str, Any] = {"alarms": alarms, "objective": "talr", "negatives": {"scale": 0.1}}
    worker = SftWorker(job(run_config(scored, **settings), scored, "sft"))
    assert [len(worker.gradient_ratio(step)) for step in range(2)] == [1, 0]
    never = {"alarms": {"gradient_ratio_every": 0}}
    assert SftWorker(job(run_config(scored, **never), scored, "sft")).gradient_ratio(0) == {}
    uniform = {"weights": {"kind": "uniform"}, "alarms": alarms}
    assert SftWorker(job(run_config(scored, **uniform), scored, "sft")).gradient_ratio(0) == {}
    for row in rows:
        row["is_negative"] = True  # nothing whose gradient could be compared
    write_rows(scored / "score" / "scored" / "rows.parquet", rows, SCORED_TOP)
    negative = {"alarms": alarms, "negatives": {"scale": 0.1}}
    assert SftWorker(job(run_config(scored, **negative), scored, "sft")).gradient_ratio(0) == {}


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_all_weights_at_the_floor(process_group: None, scored: Path, action: str) -> None:
    """A behavior policy that is sure of what the policy would never write, at sequence level."""
    file = scored / "score" / "scored" / "rows.parquet"
    rows = read_table(file, SCORED).to_pylist()
    for row in rows:
        row["behavior_logprobs"] = [0.0] * len(row["token_ids"])
    write_rows(file, rows, SCORED)
    weights = {"kind": "pear", "level": "sequence", "log_ratio_clip_low": -8.0}
    settings = {"weights": weights, "alarms": {"action": action}}
    worker = SftWorker(job(run_config(scored, **settings), scored, "sft"))
    metrics = worker.step(0)
    assert metrics["sft/weight/mean"] == pytest.approx(math.exp(-10), rel=1e-6)
    if action == "stop":
        with pytest.raises(TrainingError, match="step 1: all weights are at the floor: each of"):
            worker._watch(metrics, 1)
    else:
        worker._watch(metrics, 1)
        log = (scored / "metrics.jsonl").read_text(encoding="utf-8")
        assert log.count("all weights are at the floor") == 1


def test_the_average_is_swapped_in_once_a_step(
    process_group: None, scored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With candidates beside it, and as many rows collated as there are."""
    add_candidates(scored)
    weights = {"kind": "pear", "ratio_policy": "ema"}
    settings: dict[str, Any] = {"weights": weights, "ema_decay": 0.5, "objective": "forward_kl"}
    worker = SftWorker(job(run_config(scored, microbatch_tokens=24, **settings), scored, "sft"))
    counts = {"swaps": 0, "rows": 0}
    averaged, collator = worker.trainer.averaged, worker.collator

    def swap() -> Any:
        counts["swaps"] += 1
        return averaged()

    def collate(rows: list[dict[str, Any]]) -> Any:
        counts["rows"] += len(rows)
        return collator(rows)

    monkeypatch.setattr(worker.trainer, "averaged", swap)
    monkeypatch.setattr(worker, "collator", collate)
    assert worker.step(0)["sft/grad_norm"] > 0
    assert counts == {"swaps": 1, "rows": 8}


def test_rows_are_counted_as_they_are_read(scored: Path) -> None:
    rows = add_candidates(scored)
    for settings, count in (({}, 12), ({"negatives": {"scale": 0.1}}, len(rows))):
        config = run_config(scored, **settings).sft
        assert num_training_rows(config, scored) == count == len(training_rows(config, scored))


def test_rows_kept_out_of_training_are_looked_at(process_group: None, scored: Path) -> None:
    worker = SftWorker(job(run_config(scored, heldout_rows=4), scored, "sft"))
    assert len(worker.rows) == 12
    kept_out = set(worker.heldout["example_id"].to_pylist())
    assert len(kept_out) == 4
    assert kept_out.isdisjoint(worker.rows["example_id"].to_pylist())
    before = worker.heldout_metrics()
    by_hand = [-_logprobs(row).mean() for row in worker.heldout.to_pylist()]
    sizes = [sum(row["loss_mask"]) for row in worker.heldout.to_pylist()]
    mean = sum(a * n for a, n in zip(by_hand, sizes, strict=True)) / sum(sizes)
    assert before["sft/heldout/nll"] == pytest.approx(float(mean), rel=1e-5)
    worker.step(0)
    after = worker.heldout_metrics()
    assert after["sft/heldout/nll"] != before["sft/heldout/nll"]
    assert SftWorker(job(run_config(scored), scored, "sft")).heldout_metrics() == {}


def _logprobs(row: dict[str, Any]) -> torch.Tensor:
    """Log-probs of a row's loss tokens under the embedded student, by transformers."""
    found = torch.tensor(reference_logprobs(embedded_path("student"), [row["token_ids"]])[0])
    return found[torch.tensor(row["loss_mask"])]


def test_a_step_that_fails_names_its_rows(process_group: None, scored: Path) -> None:
    file = scored / "score" / "scored" / "rows.parquet"
    rows = read_table(file, SCORED).to_pylist()
    rows[5]["behavior_logprobs"][-1] = float("nan")
    write_rows(file, rows, SCORED)
    worker = SftWorker(job(run_config(scored, global_batch_size=16), scored, "sft"))
    with pytest.raises(TrainingError, match=r"log-ratio that is not finite.*failed-step-000001"):
        worker.step(0)
    named = json.loads((scored / "sft" / "failed-step-000001-rank-0.json").read_text())
    assert sorted(named) == sorted(row["example_id"] for row in rows)


def test_mean_one_rescaling_equals_weight_norm(process_group: None, scored: Path) -> None:
    """Token mean of weights scaled to mean 1 is the sum over the sum of weights."""
    pear = {"kind": "pear", "rescale": "batch_mean_one"}
    losses = [
        SftWorker(job(run_config(scored, **settings), scored, "sft")).step(0)["sft/weighted_loss"]
        for settings in (
            {"weights": pear, "reduction": "token_mean"},
            {"weights": {"kind": "pear"}, "reduction": "weight_norm"},
        )
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_spans_of_one_token_train_like_tokens(process_group: None, scored: Path) -> None:
    """Whatever the behavior model's tokenizer: spans that are tokens weigh as tokens do."""
    token = run_config(scored, weights={"kind": "pear", "level": "token"})
    by_token = SftWorker(job(token, scored, "sft")).step(0)
    file = scored / "score" / "scored" / "rows.parquet"
    rows = read_table(file, SCORED).to_pylist()
    for row in rows:
        count = sum(row["loss_mask"])
        row["span_ids"] = [-1] * (len(row["token_ids"]) - count) + list(range(count))
    write_rows(file, rows, SCORED)
    span = run_config(scored, weights={"kind": "pear", "level": "span"})
    by_span = SftWorker(job(span, scored, "sft")).step(0)
    assert by_span["sft/weighted_loss"] == pytest.approx(by_token["sft/weighted_loss"], rel=1e-6)
    assert by_span["sft/grad_norm"] == pytest.approx(by_token["sft/grad_norm"], rel=1e-5)
