"""What benchmarks/plan.py calls in processes of their own: their peaks of resident memory."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from processes import ROOT, free_address, memory_of

SETTLE_S = 10.0


def make_model(folder: str, num_layers: int = 8, vocab_size: int = 32_000) -> dict[str, float]:
    """A random Llama with a hidden size of 512, grouped keys and a tied head."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from pear_ray.embedded.paths import embedded_path

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_path("student")).save_pretrained(folder)
    return {}


def warm_up() -> None:
    """One tiny step, so that the maths libraries are loaded before the base is read."""
    import torch

    layer = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(4, 64)).logsumexp(-1).sum().backward()
    optimizer.step()


def peak_of_training(
    model: str, rows: int, width: int, setup: dict[str, Any], rank: int = 0, address: str = ""
) -> dict[str, float]:
    """Peak above the imports of loading a model and two steps of two microbatches each.

    Args:
        model: Its folder.
        rows: Rows of a microbatch.
        width: Tokens of its longest row.
        setup: What `make_trainer` is told, with the backend as a run file has it; `num_ranks`; and
            `num_candidates`, as many as each token is compared on.
        rank: Of `num_ranks`.
        address: Where they meet; one of its own where there is but one.
    """
    import torch.distributed as dist

    import pear_ray.engines.backends

    if setup.get("lora"):
        import pear_ray.engines.lora  # noqa: F401 - a process's libraries are no part of its peak
    if setup.get("backend", {}).get("kind") == "deepspeed":
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}  # it refuses to start without
    dist.init_process_group(
        "gloo",
        init_method=address or free_address(),
        rank=rank,
        world_size=setup.get("num_ranks", 1),
    )
    warm_up()
    base = memory_of("VmRSS")
    step, _ = make_step(model, rows, width, **{k: v for k, v in setup.items() if k != "num_ranks"})
    for _ in range(2):
        step()
    peak = memory_of("VmHWM")
    dist.barrier()
    dist.destroy_process_group()
    return {"above_base": peak - base}


def make_step(
    model: str,
    rows: int,
    width: int,
    *,
    backend: dict[str, Any] | None = None,
    num_candidates: int = 0,
    **setup: Any,
) -> tuple[Callable[[], None], Any]:
    """A function that does one step of two microbatches, and the policy that it trains."""
    import torch

    from pear_ray.config.sft import SftConfig
    from pear_ray.engines.backends import make_trainer
    from pear_ray.engines.batches import Row, collate

    torch.set_num_threads(1)
    trainer = make_trainer(
        Path(model),
        SftConfig.model_validate(
            {"optimizer": {"learning_rate": 1e-4}, "backend": backend or {"kind": "fsdp"}} | setup
        ),
        num_steps=10,
        device="cpu",
        dtype="float32",
        seed=0,
    )
    vocab = trainer.module.causal_lm.config.vocab_size
    # One row is shorter: then attention pads, and keeps what it copies.
    lengths = [*[width] * (rows - 1), width - 1]

    def row(length: int) -> Row:
        ids = [(7 * place) % vocab for place in range(length)]
        # A vocabulary may be smaller: -1 is a candidate that it does not have.
        each = [n if n < vocab else -1 for n in range(num_candidates)] * (length - 1)
        return Row(ids, [False] + [True] * (length - 1), {}, (each, [-1.0] * len(each)))

    def step() -> None:
        for number in range(2):
            batch = collate(
                [row(length) for length in lengths],
                pad_id=0,
                names=(),
                device=torch.device("cpu"),
                num_candidates=num_candidates,
            )
            with trainer.microbatch(last=number == 1):
                found = trainer.policy(batch, temperature=1.0)
                loss = found["candidates"].mean(1) if num_candidates else found
                trainer.backward(-loss.sum())
        trainer.step(2.0 * rows * width)

    return step, trainer.module


def peak_of_scoring(model: str, dtype: str, chunk: int) -> dict[str, float]:
    """Peak of an engine that scores two long rows."""
    set_engine_environment()
    engine = make_engine(model, dtype, chunk=chunk, takes_weights=False)
    ids = [(7 * place) % 32_000 for place in range(2048)]
    for _ in range(2):
        engine.score([ids])
    return {"peak": memory_of("VmHWM")}


def peak_of_rl(model: str) -> dict[str, float]:
    """Peak of two rounds of sampling, training and a weight sync."""
    import torch.distributed as dist

    set_engine_environment()
    import pear_ray.distributed.rl_loop  # noqa: F401 - what a worker of rl has loaded
    from pear_ray.engines.vllm.spec import Sampling

    engine = make_engine(model, "float32", chunk=None, takes_weights=True)
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=free_address(), rank=0, world_size=1)
    step, policy = make_step(model, 4, 512)
    sender = engine.weight_sender(policy)
    for seed in range(2):
        sampling = Sampling(num_samples=4, temperature=1.0, max_tokens=16, seed=seed)
        engine.generate([list(range(1, 65))] * 4, [sampling] * 4)
        step()
        sender.publish_weights()
    return {"peak": memory_of("VmHWM")}


def set_engine_environment() -> None:
    """What a worker's process is told before vLLM is imported."""
    from pear_ray.engines.environment import engine_environment

    os.environ.update(engine_environment(device="cpu", num_threads=1, kv_cache_gib=1))


def make_engine(model: str, dtype: str, *, chunk: int | None, takes_weights: bool) -> Any:
    """An engine with a KV cache of 1 GiB."""
    from pear_ray.engines.vllm.engine import VllmEngine
    from pear_ray.engines.vllm.spec import EngineSpec

    spec = EngineSpec(
        model=model,
        dtype=dtype,
        max_model_len=min(2048, read_positions(model)),
        chunk_tokens=chunk,
    )
    return VllmEngine(spec, takes_weights=takes_weights)


def read_positions(model: str) -> int:
    """Longest sequence of the model, less the token more that scoring asks for."""
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    return config["max_position_embeddings"] - 1


def imported(kind: str) -> dict[str, float]:
    """Resident memory of a process of this kind with no model, or an engine with a tiny one."""
    if kind == "verifier":
        from pear_ray.config.rewards import RewardConfig
        from pear_ray.tasks.reward_pool import RewardPool

        pool = RewardPool(RewardConfig(num_processes=1))
        time.sleep(SETTLE_S)
        [verifier] = psutil.Process().children(recursive=True)
        found = verifier.memory_info().rss
        pool.close()
        return {"bytes": found}
    if kind in ("sft", "deepspeed"):
        # With its process group and two steps of a tiny model: some is loaded at first use.
        from pear_ray.embedded.paths import embedded_path

        backend = {"kind": "deepspeed"} if kind == "deepspeed" else {"kind": "ddp"}
        peak_of_training(str(embedded_path("student")), 1, 16, {"backend": backend})
        return {"bytes": memory_of("VmRSS")}
    set_engine_environment()
    if kind == "rl":
        import pear_ray.distributed.rl_loop  # noqa: F401 - for what it loads
    from pear_ray.embedded.paths import embedded_path

    # Starting an engine and its first pass import as much again; the student itself is tiny.
    student = str(embedded_path("student"))
    engine = make_engine(student, "float32", chunk=None, takes_weights=False)
    engine.score([list(range(16))])
    return {"bytes": memory_of("VmRSS")}


def idle_ray() -> dict[str, float]:
    """The driver with its stages imported, and all processes of an idle local Ray: sum of PSS."""
    from pear_ray.config.run import load_run
    from pear_ray.distributed.session import ray_session
    from pear_ray.stages import collect, evaluate, rl, score, sft  # noqa: F401 - what a run loads

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    config = load_run(ROOT / "jobs" / "runs" / "demo.yaml")
    with ray_session(config.cluster):
        time.sleep(SETTLE_S)
        driver = psutil.Process()
        family = [driver, *driver.children(recursive=True)]
        return {"bytes": sum(each.memory_full_info().pss for each in family)}
