"""What each rank does in test_rl_tensor_parallel.py: steps of GRPO, with an engine each or one."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from training_runs import parameters_of, run_config

from pear_ray.config.run import validate_run
from pear_ray.embedded.paths import embedded_path
from pear_ray.engines.environment import engine_environment
from pear_ray.engines.vllm.spec import Sampling

NUM_RANKS = 2
PROMPTS = [[5 + n, 7, 11, 13] for n in range(8)]
SAMPLING = [Sampling(num_samples=2, temperature=1.0, max_tokens=16, seed=n) for n in range(8)]


def make_model(folder: Path, *, seed: int = 0) -> None:
    """Random weights with four heads, which two devices can share, and the student's tokenizer."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=192,
        vocab_size=272,
        tie_word_embeddings=True,
        eos_token_id=257,
        pad_token_id=256,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_path("student")).save_pretrained(folder)


def run_rank(rank: int, folder: Path, port: int, tensor_parallel_size: int) -> None:
    """Two steps and an evaluation; every rank writes what it found."""
    os.environ |= engine_environment(device="cpu", num_threads=1, kv_cache_gib=1) | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(NUM_RANKS),
        "LOCAL_WORLD_SIZE": str(NUM_RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    from pear_ray.distributed.rl_loop import GrpoWorker
    from pear_ray.distributed.rl_self_test import check_start
    from pear_ray.distributed.sft_loop import TrainJob

    run_dir = folder / f"size-{tensor_parallel_size}"
    (run_dir / "rl").mkdir(parents=True, exist_ok=True)
    dist.barrier()
    worker = GrpoWorker(
        TrainJob(
            config=_config(run_dir, tensor_parallel_size),
            run_dir=run_dir,
            attempt=1,
            model=folder / "model",
        )
    )
    answers = worker.engine.generate(PROMPTS, SAMPLING)  # of the weights it was started on
    worker.publish_weights()
    found = [check_start(worker, dtype="float32") | worker._pass_at_k(0)]
    found += [worker.step(step) | worker._pass_at_k(step + 1) for step in range(2)]
    worker.pool.close()
    worker.evaluation.close()
    [norm] = [each for name, each in parameters_of(worker) if name.endswith("model.norm.weight")]
    completions = [
        {"token_ids": one.token_ids, "logprobs": one.behavior_logprobs}
        for group in answers
        for one in group
    ]
    found_here = {"metrics": found, "norm": norm.tolist(), "completions": completions}
    text = json.dumps(found_here)
    (run_dir / f"rank-{rank}.json").write_text(text, encoding="utf-8")
    dist.barrier()
    os._exit(0)  # vLLM's groups and ours cannot be taken down in every order


def _config(run_dir: Path, tensor_parallel_size: int) -> Any:
    tree = run_config(run_dir).model_dump(mode="json")
    tree["cluster"]["num_trainers"] = NUM_RANKS
    tree["rl"] |= {
        "tensor_parallel_size": tensor_parallel_size,
        "activation_checkpointing": tensor_parallel_size > 1,  # which changes nothing
        "max_tokens": 16,
        "overlong": {"max_truncated_fraction": 1.0},  # random weights never end a completion
        "rewards": {"components": [{"kind": "regex", "compare": "match", "pattern": "[0-4]"}]},
        "pass_at_k": {"every": 1},
    }
    tree["evaluate"] |= {"max_tokens": 8, "num_samples": 4, "k": [1, 4]}
    tree["evaluate"]["rewards"] = tree["rl"]["rewards"]
    return validate_run(tree, origin="test")
