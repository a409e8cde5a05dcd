"""What benchmarks/gpu.py calls in fresh processes: one GPU, a model of Qwen3-0.6B's shape."""

import gc
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

DEVICE = "cuda"
GIB = 2**30
SHAPE = {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151_936,
}
ROW_TOKENS, ROWS_PER_STEP = 8192, 4
WARM, TIMED = 2, 4  # steps
PROMPT_TOKENS = 128
PROMPTS, SAMPLES, COMPLETION_TOKENS = 32, 8, 512
SCORED_ROWS, SCORED_TOKENS = 64, 1024
VARIANTS: dict[str, dict[str, Any]] = {  # what `rl` of a GRPO step's run says beside the rest
    "op by op": {},
    "compiled": {"compile": True},
    "AdamW's state on the host": {"colocation": {"offload": "optimizer"}},
    "LoRA, merged": {"lora": {"rank": 16}},
    "LoRA, adapter": {"lora": {"rank": 16, "sync": "adapter"}},  # another engine: it comes last
}


def make_model(folder: str) -> dict[str, float]:
    """A random model with the embedded tokenizer, in bfloat16; its parameters, the head's once."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from pear_ray.embedded.paths import embedded_path

    config = Qwen3Config(
        **SHAPE,
        max_position_embeddings=16_384,
        tie_word_embeddings=True,
        eos_token_id=257,
        pad_token_id=256,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config).bfloat16()
    model.save_pretrained(Path(folder) / "model")
    AutoTokenizer.from_pretrained(embedded_path("student")).save_pretrained(Path(folder) / "model")
    return {"parameters": sum(each.numel() for each in model.parameters())}


def tflops() -> float:
    """Of an 8192 x 8192 x 8192 bfloat16 product of random numbers."""
    import torch

    left, right = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    seconds = [timed(lambda: left @ right) for _ in range(20)]
    return 2 * 8192**3 / float(np.median(seconds[5:])) / 1e12


def sft(folder: str, kind: str, activations: str, layers: str = "op by op") -> dict[str, float]:
    """Pace and peak memory of SFT steps through our own worker; of its first step the seconds."""
    import torch

    from pear_ray.artifacts.tables import SCORED, write_rows
    from pear_ray.distributed.sft_loop import SftWorker, TrainJob

    one_process()
    run_dir = Path(folder) / f"sft-{kind}-{activations}-{layers}"
    (run_dir / "score" / "scored").mkdir(parents=True)
    (run_dir / "sft").mkdir()
    generator = np.random.default_rng(0)
    steps = WARM + TIMED
    rows = [
        {
            "example_id": f"row-{number:04d}",
            "source": "benchmark",
            "is_negative": False,
            "token_ids": generator.integers(5, 250, size=ROW_TOKENS).tolist(),
            "loss_mask": [False] + [True] * (ROW_TOKENS - 1),
            "behavior_logprobs": (-3 * generator.random(ROW_TOKENS)).tolist(),
        }
        for number in range(steps * ROWS_PER_STEP)
    ]
    write_rows(run_dir / "score" / "scored" / "rows.parquet", rows, SCORED)
    config = run_config(
        kind,
        checkpointing=activations == "checkpointing",
        compiled=layers == "compiled",
    )
    worker = SftWorker(TrainJob(config=config, run_dir=run_dir, attempt=1, model=model_of(folder)))
    first_s = timed(lambda: worker.step(0))
    for step in range(1, WARM):
        worker.step(step)
    torch.cuda.reset_peak_memory_stats()
    spent = timed(lambda: [worker.step(WARM + step) for step in range(TIMED)])
    pace = TIMED * ROWS_PER_STEP * ROW_TOKENS / spent
    return {
        "tokens_per_s": pace,
        "tflops": pace * flops_per_token() / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "first_step_s": first_s,
    }


def engine(folder: str, kind: str) -> dict[str, float]:
    """Start, pace of sampling and scoring, and the turns on a device shared with a trainer."""
    import torch

    from pear_ray.config.sections import OptimizerConfig
    from pear_ray.engines import weights
    from pear_ray.engines.native_trainer import NativeTrainer
    from pear_ray.engines.policy import load_policy, shard
    from pear_ray.engines.vllm.engine import VllmEngine
    from pear_ray.engines.vllm.spec import EngineSpec, Sampling

    one_process()
    spec = EngineSpec(
        model=str(model_of(folder)),
        dtype="bfloat16",
        max_model_len=2048,
        device="cuda",
        gpu_memory_fraction=0.6,
        eager=kind == "eager",
        sleeps=True,
    )
    found = {}
    began = time.perf_counter()
    engine = VllmEngine(spec, takes_weights=True)
    found["start_s"] = time.perf_counter() - began
    generator = np.random.default_rng(0)
    prompts = generator.integers(5, 250, size=(PROMPTS, PROMPT_TOKENS)).tolist()
    sampling = [
        Sampling(num_samples=SAMPLES, temperature=1.0, max_tokens=COMPLETION_TOKENS, seed=number)
        for number in range(PROMPTS)
    ]
    engine.generate(prompts[:4], sampling[:4])
    began = time.perf_counter()
    groups = engine.generate(prompts, sampling)
    tokens = sum(len(one.token_ids) for group in groups for one in group)
    found["sampled_tokens_per_s"] = tokens / (time.perf_counter() - began)
    rows = generator.integers(5, 250, size=(SCORED_ROWS, SCORED_TOKENS)).tolist()
    engine.score(rows[:8])
    found["scored_tokens_per_s"] = len(rows) * SCORED_TOKENS / timed(lambda: engine.score(rows))
    policy = shard(load_policy(model_of(folder)), device="cuda", dtype="bfloat16")
    NativeTrainer(policy, OptimizerConfig(learning_rate=1e-4), num_steps=1)
    sender = engine.weight_sender(policy)
    canary = weights.canary_batch(SHAPE["vocab_size"], device=torch.device("cuda"))
    taken = [found | turn(engine, sender, policy, canary) for _ in range(4)]
    return {name: float(np.median([each[name] for each in taken[1:]])) for name in taken[0]}


def turn(engine: Any, sender: Any, policy: Any, canary: Any) -> dict[str, float]:
    """Seconds of each part of a hand-over to the engine and back, and the gap after it."""
    import torch

    from pear_ray.distributed.train_worker import memory_in_use
    from pear_ray.engines import weights

    device = torch.device("cuda")
    before = memory_in_use(device)
    found = {"sleep_s": timed(engine.sleep)}
    torch.cuda.empty_cache()
    found["freed_gib"] = (before - memory_in_use(device)) / GIB
    found["wake_weights_s"] = timed(lambda: engine.wake("weights"))
    found["sync_s"] = timed(sender.publish_weights)
    found["wake_cache_s"] = timed(lambda: engine.wake("kv_cache"))
    gaps = []
    found["canary_s"] = timed(
        lambda: gaps.append(
            weights.canary_gap(engine, weights.canary_logprobs(policy, canary), canary)
        )
    )
    return found | {"canary_gap": gaps[0]}


def rl(folder: str, kind: str, *variants: str) -> dict[str, dict[str, float]]:
    """Metrics of a GRPO step, the median of three, of each of VARIANTS on one engine of `kind`."""
    import torch

    from pear_ray.distributed.in_process import become_host, close_rewards
    from pear_ray.distributed.rl_loop import GrpoWorker
    from pear_ray.distributed.sft_loop import TrainJob

    become_host(DEVICE)
    run_dir = Path(folder) / "rl-run"
    (run_dir / "rl").mkdir(parents=True, exist_ok=True)
    problems = run_dir / "problems.jsonl"
    lines = [json.dumps({"prompt": question, "answer": 0}) for question in questions()]
    problems.write_text("\n".join(lines), encoding="utf-8")
    found = {}
    for variant in variants:
        config = run_config(
            "uniform", problems=problems, eager=kind == "eager", rl=VARIANTS[variant]
        )
        job = TrainJob(config=config, run_dir=run_dir, attempt=1, model=model_of(folder))
        worker = GrpoWorker(job)
        try:
            worker.publish_weights()
            steps = [worker.step(step) for step in range(4)]
        finally:
            worker.watchdog.close()
            close_rewards(worker.pool)
        wanted = {name for name in steps[0] if isinstance(steps[0][name], int | float)}
        found[variant] = {
            name: float(np.median([step[name] for step in steps[1:]])) for name in sorted(wanted)
        } | {"first_step_s": steps[0]["time/step_s"]}
        print(variant, json.dumps(found[variant]), file=sys.stderr, flush=True)
        del worker
        gc.collect()
        torch.cuda.empty_cache()
    return found


def questions() -> list[str]:
    """Prompts of RL."""
    return [f"question {number}" for number in range(PROMPTS)]


def coin(problem: Any, completion: str) -> bool:  # noqa: ARG001 - a verifier's arguments
    """A reward without meaning and without cost: whether a hash of the text is even."""
    return hashlib.sha256(completion.encode()).digest()[0] % 2 == 0


def run_config(
    kind: str,
    *,
    checkpointing: bool = False,
    compiled: bool = False,
    problems: Path | None = None,
    eager: bool = True,
    rl: dict[str, Any] | None = None,
) -> Any:
    """A run on the model, on one GPU."""
    from pear_ray.config.run import validate_run

    source = {"kind": "file", "path": str(problems)} if problems else None
    game = source or {"games": [{"name": "chain_sum"}], "size": 8}
    rewards = {"components": [{"kind": "function", "function": "gpu_measures:coin"}]}
    optimizer = {"learning_rate": 1e-5, "warmup_fraction": 0.0}
    return validate_run(
        {
            "name": kind,
            "models": {
                "policy": "unused",
                "behavior": "unused",
                "dtype": "bfloat16",
                "max_model_len": 2048,
            },
            "corpus": {"kind": "dataset", "path": "unused"},
            "sft": {
                "optimizer": optimizer,
                "weights": {"kind": kind},
                "global_batch_size": ROWS_PER_STEP,
                "microbatch_tokens": ROW_TOKENS,
                "activation_checkpointing": checkpointing,
                "compile": compiled,
            },
            "rl": {
                "problems": game,
                "optimizer": optimizer,
                "num_steps": 4,
                "prompts_per_step": PROMPTS,
                "group_size": SAMPLES,
                "max_tokens": COMPLETION_TOKENS,
                "overlong": {"max_truncated_fraction": 1.0},  # random weights end nothing
                "microbatch_tokens": 16_384,
            }
            | ({"rewards": rewards} if problems else {})
            | (rl or {}),
            "evaluate": {"problems": game} | ({"rewards": rewards} if problems else {}),
            "cluster": {
                "device": DEVICE,
                "num_trainers": 1,
                "num_samplers": 1,
                "gpu_memory_fraction": 0.6,
                "enforce_eager": eager,
            },
        },
        origin="benchmark",
    )


def flops_per_token() -> float:
    """Of a training step: six per weight and token, and causal attention's at full length."""
    hidden, layers = SHAPE["hidden_size"], SHAPE["num_hidden_layers"]
    width = SHAPE["num_attention_heads"] * SHAPE["head_dim"]
    kv_width = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    layer = 2 * hidden * (width + kv_width) + 3 * hidden * SHAPE["intermediate_size"]
    weights = layers * layer + hidden * SHAPE["vocab_size"]
    return 6.0 * weights + 6.0 * layers * width * ROW_TOKENS


def model_of(folder: str) -> Path:
    """Where `make_model` puts it."""
    return Path(folder) / "model"


def timed(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes, what it left running on the GPU included."""
    import torch

    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def one_process() -> None:
    """A process group of this process alone, on the first GPU, outside Ray."""
    import ray.train.torch
    import torch

    # Our loops ask Ray Train for their device, which knows none outside a worker of its own.
    ray.train.torch.get_device = lambda: torch.device("cuda", 0)
    torch.cuda.set_device(0)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl", init_method="tcp://127.0.0.1:0", rank=0, world_size=1
    )
