"""A run folder as a whole run leaves it, with numbers that could be real."""

import json
import math
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pear_ray.artifacts import tables
from pear_ray.artifacts.manifest import MANIFEST_FILE
from pear_ray.config.run import dump_run, validate_run
from pear_ray.telemetry.metrics_log import MetricsLog

SFT_STEPS, RL_STEPS, PROBLEMS, SAMPLES = 48, 60, 24, 8
START = 1_780_000_000.0
GAME = {"name": "chain_sum"}
CONFIG = {
    "name": "synthetic",
    "models": {"policy": "embedded:student", "behavior": "embedded:teacher"},
    "corpus": {"problems": {"games": [GAME], "size": 400}, "max_tokens": 96},
    "sft": {"optimizer": {"learning_rate": 1e-4}},
    "rl": {
        "problems": {"games": [GAME], "size": 400, "seed": 1},
        "optimizer": {"learning_rate": 1e-5},
        "num_steps": RL_STEPS,
        "max_tokens": 96,
    },
    "evaluate": {"problems": {"games": [GAME], "size": PROBLEMS, "seed": 2}},
}
SCORES = {
    "base": {"pass_at_1": (0.081, 0.062, 0.1), "pass_at_8": (0.322, 0.268, 0.38)},
    "sft": {"pass_at_1": (0.214, 0.18, 0.249), "pass_at_8": (0.58, 0.522, 0.64)},
    "rl": {"pass_at_1": (0.55, 0.508, 0.592), "pass_at_8": (0.82, 0.776, 0.868)},
}


def make_run(run_dir: Path, *, scores=SCORES, config=CONFIG, sources=()) -> Path:
    """Fill `run_dir` with every input of a report."""
    chance = random.Random(0)
    run_dir.mkdir(parents=True, exist_ok=True)
    tree = json.loads(json.dumps(config))
    tree["corpus"].setdefault("kind", "sampled")
    (run_dir / "config.yaml").write_text(dump_run(validate_run(tree, origin="test")))
    for stage, seconds, counts in (
        ("collect", 48, {"examples": 600, "tokens": 24_310}),
        ("score", 31, {"examples": 600, "tokens": 24_310}),
        ("sft", 75, {"steps": SFT_STEPS, "tokens": 48_620}),
        ("rl", 262, {"steps": RL_STEPS, "rollouts": 7680}),
        ("evaluate", 64, {"completions": 3 * PROBLEMS * SAMPLES}),
    ):
        make_manifest(run_dir / stage, seconds, counts)
    make_corpus(run_dir, chance)
    make_metrics(run_dir, chance, sources)
    make_weights(run_dir / "sft", chance)
    make_evaluation(run_dir / "evaluate", chance, scores)
    return run_dir


def make_manifest(stage_dir, seconds, counts):
    stage_dir.mkdir(exist_ok=True)
    manifest = {
        "stage": stage_dir.name,
        "fingerprint": f"{hash(stage_dir.name) & 0xFFFFFFFF:020x}",
        "started": START,
        "finished": START + seconds,
        "counts": counts,
        "versions": {"python": "3.11.9", "ray": "2.49.0", "torch": "2.8.0", "vllm": "0.11.0"},
        "details": {},
    }
    (stage_dir / MANIFEST_FILE).write_text(json.dumps(manifest))


def make_corpus(run_dir, chance):
    corpus, scored = [], []
    for row in range(600):
        prompt, length = 18, min(96, int(chance.lognormvariate(3.6, 0.4)))
        ids = [chance.randrange(4, 96) for _ in range(prompt + length)]
        mask = [False] * prompt + [True] * length
        logprobs = [-chance.expovariate(6) for _ in ids]
        common = {
            "example_id": f"e{row}",
            "source": "teacher",
            "is_negative": False,
            "token_ids": ids,
            "loss_mask": mask,
        }
        problem_id = f"chain_sum/0/{row}"
        corpus.append({**common, "problem_id": problem_id, "given_logprobs": logprobs})
        scored.append({**common, "behavior_logprobs": logprobs})
    (run_dir / "collect" / "corpus").mkdir(parents=True)
    path = run_dir / "collect" / "corpus" / "part-000000.parquet"
    tables.write_rows(path, corpus, tables.CORPUS)
    (run_dir / "score" / "scored").mkdir(exist_ok=True)
    for block in range(0, 600, 64):
        path = run_dir / "score" / "scored" / f"block-{block:05d}.parquet"
        tables.write_rows(path, scored[block : block + 64], tables.SCORED)


def make_metrics(run_dir, chance, sources):
    def log(stage, attempt=1):
        return MetricsLog(run_dir, run="synthetic", stage=stage, attempt=attempt)

    for step in range(1, 13):
        values = {"collect/tokens_per_s": chance.gauss(2100, 80)}
        values["collect/verified_fraction"] = 0.83 + chance.gauss(0, 0.02) / step
        log("collect").log(values, step=step, num_steps=12)
        log("score").log({"score/tokens_per_s": chance.gauss(5200, 200)}, step=step, num_steps=12)
    for step in range(1, SFT_STEPS + 1):
        values = sft_metrics(step, chance)
        for place, source in enumerate(sources):
            values |= source_metrics(step, source, 1 / 2 ** (place + 1))
        log("sft").log(values, step=step, num_steps=SFT_STEPS)
    for step in range(1, 26):
        log("rl").log(rl_metrics(step, chance), step=step, num_steps=RL_STEPS)
    log("rl").event("warning", "mismatch gap 0.0121 at step 17 is above rl.mismatch_alert=0.01")
    for step in range(21, RL_STEPS + 1):  # killed at 25, resumed from the checkpoint at 20
        log("rl", attempt=2).log(rl_metrics(step, chance), step=step, num_steps=RL_STEPS)


def sft_metrics(step, chance):
    share = step / SFT_STEPS
    nll = 0.9 * math.exp(-3 * share) + 0.25 + chance.gauss(0, 0.02)
    return {
        "sft/weighted_loss": 0.8 * nll,
        "sft/nll": nll,
        "sft/ess_fraction": 0.55 + 0.3 * share + chance.gauss(0, 0.02),
        "sft/weight_mass_last_tenth": 0.19 - 0.07 * share + chance.gauss(0, 0.01),
        "sft/log_ratio_clip_low_fraction": 0.42 - 0.2 * share + chance.gauss(0, 0.02),
        "sft/log_ratio_clip_high_fraction": 0.07 + 0.02 * share + chance.gauss(0, 0.005),
        "sft/log_weight_floor_fraction": 0.0,
        "sft/log_weight_ceiling_fraction": 0.0,
        "sft/grad_norm": 2.2 * math.exp(-3 * share) + 0.4 + abs(chance.gauss(0, 0.1)),
        "sft/tokens_per_s": chance.gauss(700, 30),
    }


def source_metrics(step, source, share):
    """The last one is not in the last step."""
    tokens = 0 if step == SFT_STEPS and share < 0.2 else round(2000 * share)
    values = {"num_tokens": tokens, "token_share": 0.0, "weight_share": 0.0}
    if tokens:
        values |= {
            "token_share": share,
            "weight_share": share * (1 + share) / 2,
            "nll": 1.25 - 0.5 * step / SFT_STEPS,
            "weight/mean": 0.5,
            "ess_fraction": share,
            "log_ratio/mean": -0.4,
            "log_ratio_clip_low_fraction": 0.625,
            "log_ratio_clip_high_fraction": 0.0,
            "log_weight_floor_fraction": 0.031,
        }
    return {f"sft/source/{source}/{name}": value for name, value in values.items()}


def rl_metrics(step, chance):
    share = step / RL_STEPS
    sample, train = chance.gauss(2.1, 0.2), chance.gauss(1.7, 0.1)
    reward = 0.2 + 0.4 * (1 - math.exp(-3 * share)) + chance.gauss(0, 0.04)
    length = 38 + 14 * share + chance.gauss(0, 1.5)
    return {
        "rl/reward/mean": reward,
        "rl/reward/std": math.sqrt(reward * (1 - reward)),
        "rl/reward/game/mean": reward,
        "rl/correct_fraction": reward,
        "rl/advantage/mean_abs": 0.6 - 0.1 * share + chance.gauss(0, 0.02),
        "rl/advantage/std": 0.8 - 0.1 * share + chance.gauss(0, 0.02),
        "rl/entropy": 0.6 * math.exp(-1.5 * share) + chance.gauss(0, 0.015),
        "rl/completion_length/mean": length,
        "rl/completion_length/min": round(length / 2),
        "rl/completion_length/max": 80.0,
        "rl/truncated_fraction": 0.03 + 0.01 * share,
        "rl/degenerate_group_fraction": 0.45 - 0.2 * math.sin(3 * share) + chance.gauss(0, 0.03),
        "rl/clip_fraction": 0.0,
        "rl/clip_fraction/low": 0.0,
        "rl/clip_fraction/high": 0.0,
        "rl/ratio/max": 1.0,
        "rl/ratio/min": 1.0,
        "rl/errored_fraction": 0.0,
        "rl/mismatch/mean_gap": 3e-7 * math.exp(chance.gauss(0, 0.2)),
        "rl/mismatch/max_gap": 6e-6 * math.exp(chance.gauss(0, 0.4)),
        "rl/mismatch/ess_fraction": 1 - 1e-12,
        "rl/correction/bounded_fraction": 0.0,
        "rl/correction/masked_fraction": 0.0,
        "rl/sync_gap": 0.0 if step % 9 == 0 else 8e-7 * math.exp(chance.gauss(0, 0.5)),
        "rl/grad_norm": 0.6 + abs(chance.gauss(0, 0.2)),
        "rl/tokens_per_s": chance.gauss(1250, 60),
        "rl/tokens_per_s/sample": chance.gauss(2500, 60),
        "rl/tokens_per_s/train": chance.gauss(3100, 60),
        "memory/sample_gib": 2.1,
        "memory/train_gib": 2.11,
        "time/sample_s": sample,
        "time/reward_s": 0.12,
        "time/train_s": train,
        "time/sync_s": 0.09,
        "time/step_s": sample + train + 0.12 + 0.09 + 0.15,
    }


def make_weights(sft_dir, chance):
    rows = []
    for step in range(4, SFT_STEPS + 1, 4):
        for example in range(6):
            length = chance.randrange(20, 90)
            total = 0.0
            for left in range(length):
                ratio = chance.gauss(-0.05 + 0.001 * step, 0.2)
                rows.append((step, f"e{example}", left, ratio, 0.999**left * math.exp(total)))
                total += min(0.3, max(-0.08, ratio))
    names = tables.WEIGHT_SAMPLES.names
    dicts = [dict(zip(names, row, strict=True)) for row in rows]
    tables.write_rows(sft_dir / "weight_samples.parquet", dicts, tables.WEIGHT_SAMPLES)


def make_evaluation(evaluate_dir, chance, scores):
    checkpoints = []
    for version, (name, passes) in enumerate(scores.items()):
        metrics = {
            k: dict(zip(("value", "low", "high"), v, strict=True)) for k, v in passes.items()
        }
        metrics["mean_length"] = {"value": 38.0 + 7 * version, "low": 37.0, "high": 54.0}
        metrics["truncated_fraction"] = {"value": 0.031, "low": 0.02, "high": 0.044}
        metrics["errored_fraction"] = {"value": 0.0, "low": 0.0, "high": 0.0}
        checkpoints.append({"checkpoint": name, "policy_version": version, "metrics": metrics})
    results = {
        "num_problems": PROBLEMS,
        "num_samples": SAMPLES,
        "temperature": 1.0,
        "max_tokens": 96,
        "confidence": 0.95,
        "checkpoints": checkpoints,
    }
    (evaluate_dir / "results.json").write_text(json.dumps(results))
    rows = [
        sample_row(chance, name, problem, index, scores[name]["pass_at_1"][0])
        for name in scores
        for problem in range(PROBLEMS)
        for index in range(SAMPLES)
    ]
    table = pa.Table.from_pylist(rows, schema=tables.EVALUATION_SAMPLES)
    pq.write_table(table, evaluate_dir / "samples.parquet")


def sample_row(chance, checkpoint, problem, index, skill):
    numbers = [7 + problem, 31, 4 * problem + 3]
    answer = sum(numbers) if chance.random() < skill else sum(numbers) + chance.randrange(1, 20)
    first = numbers[0] + numbers[1]
    return {
        "suite": "main",
        "checkpoint": checkpoint,
        "problem_id": f"chain_sum/2/{problem}",
        "task": "chain_sum",
        "question": f"State the final answer: {numbers[0]} + {numbers[1]} + {numbers[2]} =",
        "sample_index": index,
        "completion": f"<b>{numbers[0]} + {numbers[1]}</b> = {first}, {first} + {numbers[2]} = "
        f"{answer}\n<answer>{answer}</answer>",
        "finish_reason": "stop",
        "reward_status": "ok" if answer == sum(numbers) else "failed",
        "reward_value": float(answer == sum(numbers)),
        "reward_components": [("game", float(answer == sum(numbers)))],
        "answer": str(answer),
        "num_tokens": 40,
        "logprob_sum": -4.0,
    }
