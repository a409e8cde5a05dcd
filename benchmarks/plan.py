"""What `pear plan` predicts beside what processes were measured to take.

`python benchmarks/plan.py` does all parts (about 10 minutes on two cores); with the name of one
(`process`, `sft`, `score`, `rl`) only that one, leaving the others' figures as they are.

A peak is measured twice: with freed blocks given back to the system at once, which is what
the plan predicts, and with glibc's heap as it comes, which keeps blocks of less than 32 MiB.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, Figure, write_figures

from pear_ray.memory.activations import largest_microbatch
from pear_ray.memory.engine import (
    EnginePlan,
    engine_reload,
    engine_resident,
    engine_sampling,
    engine_scoring,
)
from pear_ray.memory.items import Moment, beside, moment
from pear_ray.memory.model_shape import read_shape
from pear_ray.memory.phases import (
    DRIVER_AND_RAY_BYTES,
    PROCESS_BYTES,
    VERIFIER_BYTES,
    engine_slack,
    gathered_for_sync,
    trainer_slack,
)
from pear_ray.memory.training import TrainerPlan, trainer_moments, trainer_state

ROOT = Path(__file__).parents[1]
MIB, GIB = 2**20, 2**30
MOST_OFF = 0.15
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(MIB)}  # blocks of 1 MiB and more are mapped on their own
SETTLE_S = 10.0


def main() -> None:
    """Measure what is asked for, and write the figures."""
    parts: dict[str, Callable[[str], list[Figure]]] = {
        "process": process,
        "sft": sft,
        "score": score,
        "rl": rl,
    }
    wanted = [name for name in parts if name in sys.argv[1:]] or list(parts)
    file = RESULTS / "plan.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    kept = [row for row in kept if not any(row["name"].startswith(f"{name}: ") for name in wanted)]
    with tempfile.TemporaryDirectory() as folder:
        if wanted != ["process"]:
            in_process("make_model", folder)
        figures = [figure for name in wanted for figure in parts[name](folder)]
    write_figures("plan", figures, kept=kept)


def process(_: str) -> list[Figure]:
    """What the constants of memory/phases.py stand for."""
    kinds = ("sft", "engine", "rl", "verifier")
    found = {kind: in_process("imported", kind)["bytes"] for kind in kinds}
    found["ray"] = in_process("idle_ray")["bytes"]
    bounds = {
        "a trainer's process with its libraries": ("sft", PROCESS_BYTES["sft"]),
        "an engine's process with its libraries": ("engine", PROCESS_BYTES["engine"]),
        "a process of rl with its libraries": ("rl", PROCESS_BYTES["rl"]),
        "a verifier process": ("verifier", VERIFIER_BYTES),
        "driver, Ray and dashboard, idle (sum of PSS)": ("ray", DRIVER_AND_RAY_BYTES),
    }
    return [
        Figure(
            name=f"process: {name}",
            value=found[key] / MIB,
            unit="MiB",
            goal=f"at most the plan's {bound // MIB} MiB",
            holds=found[key] <= bound,
        )
        for name, (key, bound) in bounds.items()
    ]


def sft(folder: str) -> list[Figure]:
    """Two optimizer steps of two microbatches each, one rank, gloo."""
    from pear_ray.embedded.paths import embedded_path

    student = str(embedded_path("student"))
    cases = [
        ("embedded student, 8,192-token microbatches", student, 32, 256, False),
        ("35M Llama, 2,048-token microbatches", folder, 4, 512, False),
        ("35M Llama, the same with checkpointing", folder, 4, 512, True),
    ]
    figures = []
    for name, model, rows, width, checkpointing in cases:
        plan = trainer_plan(model, rows, width, checkpointing=checkpointing)
        predicted = max(each.num_bytes for each in trainer_moments(plan))
        arguments = (model, rows, width, checkpointing)
        returned = in_process("peak_of_training", *arguments, environ=RETURNED)
        figures.append(compared(f"sft: {name}", predicted, returned["above_base"]))
        if not checkpointing:
            heap = in_process("peak_of_training", *arguments)
            figures.append(
                heap_figure(
                    f"sft: {name}", predicted, heap["above_base"], slack_bytes=trainer_slack(plan)
                )
            )
    return [*figures, large_blocks(folder)]


def large_blocks(folder: str) -> Figure:
    """Activations of 34 MiB each, of which the heap keeps none."""
    two_layers = f"{folder}/two-layers"
    in_process("make_model", two_layers, 2, 8_000)
    plan = trainer_plan(two_layers, 34, 512, checkpointing=False)
    predicted = max(each.num_bytes for each in trainer_moments(plan))
    measured = in_process("peak_of_training", two_layers, 34, 512, False)["above_base"]  # noqa: FBT003
    name = "sft: Llama of two such layers, 17,408-token microbatches"
    return heap_figure(name, predicted, measured, slack_bytes=trainer_slack(plan))


def score(folder: str) -> list[Figure]:
    """An engine that scores rows of 2,048 tokens; the KV cache's GiB is left out of both sides."""
    figures, base = [], in_process("imported", "engine")["bytes"]
    for dtype, chunk in (("float32", 512), ("float32", 2048), ("bfloat16", 512)):
        plan = engine_plan(folder, dtype, chunk=chunk, sequences=1)
        moments = beside(engine_scoring(plan), engine_resident(plan))
        predicted = max(each.num_bytes for each in moments) - GIB
        name = f"score: 35M Llama in {dtype}, score.chunk_tokens={chunk}, without its KV cache"
        for environ in (RETURNED, {}):
            peak = in_process("peak_of_scoring", folder, dtype, chunk, environ=environ)["peak"]
            measured = peak - base - GIB
            figures.append(
                compared(name, predicted, measured)
                if environ
                else heap_figure(name, predicted, measured, slack_bytes=engine_slack(plan, moments))
            )
    return figures


def rl(folder: str) -> list[Figure]:
    """Trainer and engine in one process: sample, train, sync; without the KV cache."""
    plan = trainer_plan(folder, 4, 512, checkpointing=False)
    engine = engine_plan(folder, "float32", chunk=None, sequences=16)
    between = trainer_state(plan, gradients=False)
    moments: list[Moment] = [
        *trainer_moments(plan),
        moment("sync", between, gathered_for_sync(plan), engine_reload(engine)),
        *beside(engine_sampling(engine), between),
    ]
    both = beside(moments, engine_resident(engine))
    predicted = max(each.num_bytes for each in both) - GIB
    slack_bytes = trainer_slack(plan) + engine_slack(
        engine, beside(engine_sampling(engine), engine_resident(engine))
    )
    name = "rl: 35M Llama, trainer and engine, without its KV cache"
    base = in_process("imported", "rl")["bytes"]
    returned = in_process("peak_of_rl", folder, environ=RETURNED)["peak"] - base - GIB
    heap = in_process("peak_of_rl", folder)["peak"] - base - GIB
    return [
        compared(name, predicted, returned),
        heap_figure(name, predicted, heap, slack_bytes=slack_bytes),
    ]


def compared(name: str, predicted: float, measured: float) -> Figure:
    """A peak above the imports, with the share of it that was predicted."""
    ratio = predicted / measured
    return Figure(
        name=name,
        value=measured / MIB,
        unit="MiB",
        reference=f"predicted over measured; predicted: {predicted / MIB:,.0f} MiB",
        ratio=ratio,
        goal=f"predicted within {MOST_OFF:.0%} of measured",
        holds=abs(ratio - 1) <= MOST_OFF,
    )


def heap_figure(name: str, predicted: float, measured: float, *, slack_bytes: int) -> Figure:
    """How much more than the tensors a process takes whose heap keeps freed blocks."""
    return Figure(
        name=f"{name}, glibc's heap",
        value=measured / MIB,
        unit="MiB",
        reference=f"predicted over measured; predicted: {predicted / MIB:,.0f} MiB",
        ratio=predicted / measured,
        goal=f"at most {slack_bytes / MIB:,.0f} MiB, the plan's slack, above predicted",
        holds=measured <= predicted + slack_bytes,
    )


def trainer_plan(model: str, rows: int, width: int, *, checkpointing: bool) -> TrainerPlan:
    """What the training functions below do: two microbatches of `rows` rows in a step."""
    batch = largest_microbatch(
        microbatch_tokens=rows * width, max_model_len=width, num_rows=2 * rows, setting=""
    )
    return TrainerPlan(
        shape=read_shape(Path(model)),
        num_trainers=1,
        batch=batch,
        device="cpu",
        dtype="float32",
        checkpointing=checkpointing,
    )


def engine_plan(model: str, dtype: str, *, chunk: int | None, sequences: int) -> EnginePlan:
    """The engines below."""
    return EnginePlan(
        shape=read_shape(Path(model)),
        dtype=dtype,
        device="cpu",
        max_model_len=2048,
        kv_cache_gib=1,
        gpu_memory_fraction=1.0,
        device_bytes=None,
        chunk_tokens=chunk,
        num_sequences=sequences,
    )


def in_process(
    task: str, *arguments: Any, environ: dict[str, str] | None = None, timeout_s: float = 110
) -> dict[str, float]:
    """Run one of the functions below in a process of its own; what it found."""
    call = f"import plan, json; print(json.dumps(plan.{task}(*{arguments!r})))"
    given = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", call],
        cwd=Path(__file__).parent,
        env=os.environ | given | (environ or {}),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=timeout_s,
    )
    return json.loads(done.stdout.splitlines()[-1])


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


def memory_of(field: str) -> int:
    """A field of this process's status, in bytes: `VmRSS`, or `VmHWM` for its peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    [found] = [line for line in lines if line.startswith(f"{field}:")]
    return int(found.split()[1]) * 1024


def warm_up() -> None:
    """One tiny step, so that the maths libraries are loaded before the base is read."""
    import torch

    layer = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(4, 64)).logsumexp(-1).sum().backward()
    optimizer.step()


def peak_of_training(model: str, rows: int, width: int, checkpointing: bool) -> dict[str, float]:  # noqa: FBT001
    """Peak above the imports of loading a model and two steps of two microbatches each."""
    import torch.distributed as dist

    import pear_ray.distributed.sft_loop  # noqa: F401 - what a trainer's process has loaded

    dist.init_process_group("gloo", init_method=free_address(), rank=0, world_size=1)
    warm_up()
    base = memory_of("VmRSS")
    step = make_step(model, rows, width, checkpointing=checkpointing)
    for _ in range(2):
        step()
    peak = memory_of("VmHWM")
    dist.destroy_process_group()
    return {"above_base": peak - base}


def make_step(
    model: str, rows: int, width: int, *, checkpointing: bool = False
) -> Callable[[], None]:
    """A trainer on `model`, as a function that does one step of two padded microbatches."""
    import torch

    from pear_ray.config.sections import OptimizerConfig
    from pear_ray.engines.batches import Row, collate
    from pear_ray.engines.policy import load_policy, shard
    from pear_ray.engines.trainer import Trainer

    torch.set_num_threads(1)
    policy = load_policy(Path(model))
    if checkpointing:
        policy.causal_lm.gradient_checkpointing_enable()
        policy.train()
    trainer = Trainer(
        shard(policy, device="cpu", dtype="float32"),
        OptimizerConfig(learning_rate=1e-4),
        num_steps=10,
    )
    vocab = policy.causal_lm.config.vocab_size
    # One row is shorter: padding is what makes a mask.
    lengths = [*[width] * (rows - 1), width - 1]
    ids = [[(7 * place) % vocab for place in range(length)] for length in lengths]

    def step() -> None:
        for _ in range(2):
            batch = collate(
                [Row(each, [True] * len(each), {}) for each in ids],
                pad_id=0,
                names=(),
                device=torch.device("cpu"),
            )
            trainer.backward(-trainer.policy(batch, temperature=1.0).sum())
        trainer.step(2.0 * rows * width)

    make_step.policy = trainer.policy  # type: ignore[attr-defined] - for the sync of `rl`
    return step


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
    step = make_step(model, 4, 512)
    sender = engine.weight_sender(make_step.policy)  # type: ignore[attr-defined]
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
    """Resident memory of a process of this kind without a model of any size."""
    if kind == "verifier":
        from pear_ray.config.problems import RewardConfig
        from pear_ray.tasks.reward_pool import RewardPool

        pool = RewardPool(RewardConfig(num_processes=1))
        time.sleep(SETTLE_S)
        [verifier] = psutil.Process().children(recursive=True)
        found = verifier.memory_info().rss
        pool.close()
        return {"bytes": found}
    if kind == "sft":
        import pear_ray.distributed.sft_loop

        warm_up()
        return {"bytes": memory_of("VmRSS")}
    set_engine_environment()
    if kind == "rl":
        import pear_ray.distributed.rl_loop  # noqa: F401 - for what it loads
    from pear_ray.embedded.paths import embedded_path

    # Starting an engine and its first pass import as much again; the student itself is tiny.
    student = str(embedded_path("student"))
    engine = make_engine(student, "float32", chunk=None, takes_weights=False)
    engine.score([list(range(16))])
    held = engine_resident(engine_plan(student, "float32", chunk=None, sequences=1))
    return {"bytes": memory_of("VmRSS") - sum(item.num_bytes for item in held)}


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


def free_address() -> str:
    """Where a process group of one meets."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


if __name__ == "__main__":
    main()
