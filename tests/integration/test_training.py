"""The training loops with real engines and models, driven step by step in one process."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pear_ray.artifacts.tables import SCORED, SCORED_TOP, WEIGHT_SAMPLES, read_table, write_rows
from pear_ray.config.run import RunConfig, validate_run
from pear_ray.distributed.sft_loop import COMPARED_ROWS, SftWorker, TrainJob
from pear_ray.distributed.sft_rows import num_training_rows, training_rows
from pear_ray.embedded.paths import embedded_path
from pear_ray.engines.hf_scorer import reference_logprobs
from pear_ray.engines.vllm import weights as transfer
from pear_ray.errors import TrainingError, WeightSyncError

GAME = {"name": "chain_sum", "params": {"min_terms": 2, "max_terms": 3, "max_digits": 1}}


def run_config(tmp_path: Path, **sft: Any) -> RunConfig:
    spans = sft.get("weights", {}).get("level") == "span"
    return validate_run(
        {
            "name": "test",
            "output_dir": str(tmp_path),
            "models": {
                "policy": "embedded:student",
                "behavior": "embedded:teacher",
                "align": "bytes" if spans else "refuse",
                "dtype": "float32",
                "max_model_len": 160,
            },
            "corpus": {"kind": "dataset", "path": "unused"},
            "score": {"top_k": 4 if "forward_kl" in str(sft) else 0},
            "sft": {"optimizer": {"learning_rate": 1e-3}, "global_batch_size": 8} | sft,
            "rl": {
                "problems": {"games": [GAME], "size": 16, "seed": 2},
                "optimizer": {"learning_rate": 1e-4, "warmup_fraction": 0.0},
                "num_steps": 4,
                "prompts_per_step": 4,
                "group_size": 8,
                "max_tokens": 64,
            },
            "evaluate": {"problems": {"games": [GAME], "size": 8, "seed": 3}},
            "cluster": {"num_trainers": 1},
        },
        origin="test",
    )


def job(config: RunConfig, tmp_path: Path, stage: str) -> TrainJob:
    (tmp_path / stage).mkdir(exist_ok=True)
    return TrainJob(config=config, run_dir=tmp_path, attempt=1, model=embedded_path("student"))


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """Sixteen rows of digits with made-up behavior log-probs, in the run folder `tmp_path`."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(16):
        length = 12 + 2 * (number % 5)
        ids = torch.randint(5, 60, (length,), generator=generator).tolist()
        rows.append(
            {
                "example_id": f"row-{number:02d}",
                "source": "test",
                "is_negative": False,
                "token_ids": ids,
                "loss_mask": [False] * 4 + [True] * (length - 4),
                "behavior_logprobs": (-torch.rand(length, generator=generator) * 5).tolist(),
            }
        )
    folder = tmp_path / "score" / "scored"
    folder.mkdir(parents=True)
    write_rows(folder / "rows.parquet", rows, SCORED)
    return tmp_path


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


@pytest.fixture
def start_grpo(
    process_group: None, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """What starts real GRPO workers that borrow the shared engine rather than start their own."""
    from pear_ray.distributed import rl_loop

    monkeypatch.setattr(rl_loop, "VllmEngine", lambda spec, takes_weights: engine)
    workers = []

    def start(**rl: Any) -> Any:
        tree = run_config(tmp_path).model_dump(mode="json")
        tree["rl"] |= rl
        worker = rl_loop.GrpoWorker(job(validate_run(tree, origin="test"), tmp_path, "rl"))
        workers.append(worker)
        worker.publish_weights()
        return worker

    yield start
    for worker in workers:
        worker.pool.close()


@pytest.fixture
def grpo(start_grpo: Any) -> Any:
    """One with the test's defaults."""
    return start_grpo()


def make_groups(worker: Any, step: int = 0) -> Any:
    return worker.rollouts.reward(worker.rollouts.sample(step), policy_version=0)


def test_a_grpo_step_learns_and_stays_in_step_with_the_engine(grpo: Any) -> None:
    metrics = grpo.step(0)
    assert metrics["rl/mismatch/max_gap"] < 1e-4
    assert metrics["rl/sync_gap"] < 1e-5
    assert metrics["rl/ratio/max"] == pytest.approx(1.0, abs=1e-3)  # on policy
    assert metrics["rl/grad_norm"] > 0
    assert 0 < metrics["rl/reward/mean"] < 1
    assert grpo.trainer.step_count == 1


def test_the_update_raises_what_was_rewarded(grpo: Any) -> None:
    """After one step, log-probs weighted by advantage have risen on the step's own rollouts."""
    groups = make_groups(grpo)
    batches = [each.batch for each in grpo.minibatches(groups)[0]]

    def objective() -> float:
        with torch.no_grad():
            logprobs = [grpo.trainer.policy(batch, temperature=1.0) for batch in batches]
        pairs = zip(logprobs, batches, strict=True)
        return float(sum((each * batch.aligned["advantages"]).sum() for each, batch in pairs))

    before = objective()
    grpo.train(groups)
    assert objective() > before


def test_a_resumed_step_samples_the_same(grpo: Any) -> None:
    first, again = grpo.rollouts.sample(3), grpo.rollouts.sample(3)
    assert [[one.token_ids for one in each.completions] for each in first] == [
        [one.token_ids for one in each.completions] for each in again
    ]


def test_nothing_is_corrected_while_nothing_is_learnt(start_grpo: Any) -> None:
    """Three steps that leave the weights alone, at another temperature, with two updates each."""
    optimizer = {"learning_rate": 1e-30, "warmup_fraction": 0.0}
    worker = start_grpo(temperature=0.7, updates_per_batch=2, optimizer=optimizer)
    before = {name: value.clone() for name, value in parameters_of(worker)}
    for step in range(3):
        metrics = worker.step(step)
        # To the bit: the pass before the first update sees what the updates see.
        assert metrics["rl/ratio/max"] == metrics["rl/ratio/min"] == 1.0
        assert metrics["rl/clip_fraction"] == 0.0
        assert metrics["rl/mismatch/max_gap"] < 1e-4
        assert metrics["rl/correction/masked_fraction"] == 0.0
        assert metrics["rl/correction/bounded_fraction"] == 0.0
        assert metrics["rl/correction/weight/mean"] == pytest.approx(1.0, abs=1e-5)
        assert metrics["rl/correction/ess_fraction"] == pytest.approx(1.0, abs=1e-6)
        assert metrics["rl/grad_norm"] > 0
    assert all(torch.equal(before[name], value) for name, value in parameters_of(worker))


def parameters_of(worker: Any) -> list[tuple[str, torch.Tensor]]:
    worker.trainer.module.reshard()  # the root stays gathered after a forward pass
    named = worker.trainer.module.named_parameters()
    return [(name, parameter.detach().full_tensor()) for name, parameter in named]


def test_two_updates_of_a_batch_move_the_weights_twice(
    start_grpo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each on its own half of the groups; the second's ratio is against before the first."""
    worker = start_grpo(updates_per_batch=2)
    seen = [parameters_of(worker)]
    step_once = worker.trainer.step

    def step(denominator: float) -> Any:
        result = step_once(denominator)
        seen.append([(name, value.clone()) for name, value in parameters_of(worker)])
        return result

    monkeypatch.setattr(worker.trainer, "step", step)
    metrics = worker.step(0)
    assert worker.trainer.step_count == 2
    assert len(seen) == 3
    for one, other in itertools.pairwise(seen):
        pairs = zip(one, other, strict=True)
        assert any(not torch.equal(a, b) for (_, a), (_, b) in pairs)
    assert metrics["rl/sync_gap"] < 1e-5  # the engine has the weights of the second
    assert metrics["rl/mismatch/max_gap"] < 1e-4  # measured before the first
    assert metrics["rl/ratio/max"] > 1.0
    assert metrics["rl/ratio/min"] < 1.0
    again = worker.step(1)
    assert again["rl/mismatch/max_gap"] < 1e-4


@pytest.mark.parametrize("reduction", ["token_mean", "seq_mean", "dr_grpo"])
def test_microbatches_do_not_change_an_rl_update(start_grpo: Any, reduction: str) -> None:
    """All terms on: the same rollouts in one microbatch and in many give one gradient."""
    found = []
    for microbatch_tokens in (8192, 100):
        worker = start_grpo(
            reduction=reduction,
            microbatch_tokens=microbatch_tokens,
            updates_per_batch=2,
            advantage="reinforce_pp",
            loss={"kind": "gspo", "clip_low": 0.1, "clip_high": 0.1},
            kl={"coefficient": 0.1, "estimator": "k1", "placement": "reward"},
            entropy_coefficient=0.01,
            overlong={"buffer_tokens": 32, "mask_truncated": True},
            mismatch_correction={"level": "geometric", "mode": "mask"},
        )
        groups = make_groups(worker)
        batches = worker.minibatches(groups)
        sums, _ = worker.train(groups)
        found.append((len(batches[0]), sums))
    (few, whole), (many, cut) = found
    assert many > few
    for name in ("loss", "grad_norm", "kl", "entropy", "trained_tokens", "numerator"):
        assert whole[name] == pytest.approx(cut[name], rel=1e-3, abs=1e-6), name


def test_a_reference_pulls_the_policy_back(start_grpo: Any) -> None:
    """At the start there is no KL and no gradient of it; after a push away it has both."""
    worker = start_grpo(kl={"coefficient": 1.0, "estimator": "k2"}, entropy_coefficient=0.1)
    metrics = worker.step(0)
    assert metrics["rl/kl"] == 0.0
    # Exact entropy and the mean surprise of the same tokens estimate the same thing.
    assert metrics["rl/entropy/exact"] == pytest.approx(metrics["rl/entropy"], rel=0.2)
    worker.trainer.module.reshard()
    with torch.no_grad():
        for parameter in worker.trainer.module.parameters():
            parameter.mul_(1.02)
    groups = make_groups(worker)
    equal = [
        type(group)(
            [
                type(one)(**{**_fields(one), "reward": group.rollouts[0].reward})
                for one in group.rollouts
            ]
        )
        for group in groups
    ]
    worker.config = worker.config.model_copy(update={"entropy_coefficient": 0.0})
    far, _ = worker.train(equal)  # no advantage: nothing but the KL has a gradient
    assert far["kl"] > 0
    assert far["grad_norm"] > 0
    for _ in range(3):
        near, _ = worker.train(equal)
    assert near["kl"] < far["kl"]


def test_a_planted_stale_weight_fails_the_same_step(
    grpo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tied embedding left stale in the engine: the step that made it so fails."""
    monkeypatch.setattr(transfer, "repack_tied_head", lambda model: None)
    with pytest.raises(WeightSyncError, match="step 1, rank 0"):
        grpo.step(0)


def test_errored_rewards_stop_the_run(grpo: Any) -> None:
    from pear_ray.errors import RewardError
    from pear_ray.records import Reward, RewardStatus

    groups = make_groups(grpo)
    errored = Reward(RewardStatus.ERRORED, 0.0, "planted")
    broken = [type(one)(**{**_fields(one), "reward": errored}) for one in groups[0].rollouts]
    with pytest.raises(RewardError, match="planted"):
        grpo.rollouts.check_rewards([type(groups[0])(broken), *groups[1:]])


def _fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__slots__}
