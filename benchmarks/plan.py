"""What `pear plan` predicts beside what processes were measured to take.

`python benchmarks/plan.py` does all parts (about 15 minutes on two cores); with the name of one
(`process`, `sft`, `backends`, `score`, `rl`) only that one, leaving the others' figures as they
are. With `--table` it measures nothing, and prints what was measured as Markdown.

A peak is measured twice: with freed blocks given back to the system at once, which is what
the plan predicts, and with glibc's heap as it comes, which keeps blocks of less than 32 MiB.
"""

import functools
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

sys.path.insert(0, str(Path(__file__).parent))
from processes import free_address, in_process
from record import RESULTS, Figure, write_parts

from pear_ray.config.backends import BackendConfig
from pear_ray.config.lora import LoraConfig
from pear_ray.embedded.paths import embedded_path
from pear_ray.memory.activations import Microbatch
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
)
from pear_ray.memory.slack import engine_slack, trainer_slack
from pear_ray.memory.trainer_plan import TrainerPlan
from pear_ray.memory.training import trainer_moments, trainer_state
from pear_ray.memory.turns import gathered_for_sync

MIB, GIB = 2**20, 2**30
MOST_OFF = 0.15
HEAP = ", glibc's heap"
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(MIB)}  # blocks of 1 MiB and more are mapped on their own

# With so few tokens as there are in the part `backends`, tensors are smaller than that.
ALL_RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(64 * 2**10)}

# On the 35M Llama, two ranks but for the last.
BACKENDS: dict[str, dict[str, Any]] = {
    "FSDP2": {"num_ranks": 2},
    "FSDP2, shard_over=1": {"num_ranks": 2, "backend": {"kind": "fsdp", "shard_over": 1}},
    "FSDP2 with ema_decay": {"num_ranks": 2, "ema_decay": 0.9},
    "DDP": {"num_ranks": 2, "backend": {"kind": "ddp"}},
    **{
        f"ZeRO-{stage}" + (f", offload={offload}" if offload != "none" else ""): {
            "num_ranks": 2,
            "backend": {"kind": "deepspeed", "zero_stage": stage, "offload": offload},
        }
        for stage, offload in (
            (1, "none"),
            (2, "none"),
            (2, "optimizer"),
            (3, "none"),
            (3, "all"),
        )
    },
    "FSDP2, LoRA of rank 16": {"num_ranks": 2, "lora": {"rank": 16}},
    "ZeRO-2, LoRA of rank 16": {
        "num_ranks": 2,
        "lora": {"rank": 16},
        "backend": {"kind": "deepspeed", "zero_stage": 2},
    },
    "FSDP2, one rank, 512 candidates": {"num_ranks": 1, "num_candidates": 512},
}


def main() -> None:
    """Measure what is asked for, and write the figures; or print them as a table."""
    if "--table" in sys.argv:
        print(table(json.loads((RESULTS / "plan.json").read_text(encoding="utf-8"))))
        return
    with tempfile.TemporaryDirectory() as folder:
        found_by("make_model", folder)
        parts = (process, sft, backends, score, rl)
        write_parts("plan", {part.__name__: functools.partial(part, folder) for part in parts})


def process(_: str) -> list[Figure]:
    """What the constants of memory/phases.py stand for."""
    kinds = ("sft", "deepspeed", "engine", "rl", "verifier")
    found = {kind: base_bytes(kind) for kind in kinds}
    found["ray"] = found_by("idle_ray")["bytes"]
    bounds = {
        "a trainer's process with its libraries": ("sft", PROCESS_BYTES["sft"]),
        "a trainer's process with DeepSpeed": ("deepspeed", PROCESS_BYTES["deepspeed"]),
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
    student, llama = str(embedded_path("student")), (folder, 4, 512)
    checkpointing, lora = {"activation_checkpointing": True}, {"lora": {"rank": 16}}
    cases: list[tuple[str, tuple[str, int, int], dict[str, Any]]] = [
        ("embedded student, 8,192-token microbatches", (student, 32, 256), {}),
        ("35M Llama, 2,048-token microbatches", llama, {}),
        ("35M Llama, the same with checkpointing", llama, checkpointing),
        ("35M Llama, the same with LoRA of rank 16", llama, lora),
    ]
    figures = []
    for name, sizes, setup in cases:
        plan = trainer_plan(*sizes, **setup)
        predicted = step_bytes(plan)
        returned = found_by("peak_of_training", *sizes, setup, environ=RETURNED)
        figures.append(compared(f"sft: {name}", predicted, returned["above_base"]))
        if not setup:
            heap = found_by("peak_of_training", *sizes, setup)["above_base"]
            slack = trainer_slack(plan)
            figures.append(heap_figure(f"sft: {name}", predicted, heap, slack_bytes=slack))
    return [*figures, large_blocks(folder)]


def backends(folder: str) -> list[Figure]:
    """Microbatches so small that what a backend keeps and reduces is most of the peak.

    Above the same steps on the embedded student, less its own plan: the libraries of process
    groups, and much of DeepSpeed, are loaded as they are first used.
    """
    student = str(embedded_path("student"))
    figures = []
    for name, setup in BACKENDS.items():
        peaks = []
        for model in (student, folder):
            plan = trainer_plan(model, 2, 128, **setup)
            predicted = step_bytes(plan)
            peaks.append((predicted, peak_of_ranks(model, setup)))
        (of_student, base), (predicted, peak) = peaks
        figures.append(compared(f"backends: {name}", predicted, peak - base + of_student))
    return figures


def peak_of_ranks(model: str, setup: dict[str, Any]) -> float:
    """The peak of the rank that takes most, above its imports."""
    num_ranks, address = setup["num_ranks"], free_address()

    def peak(rank: int) -> float:
        arguments = (model, 2, 128, setup, rank, address)
        return found_by("peak_of_training", *arguments, environ=ALL_RETURNED)["above_base"]

    with ThreadPoolExecutor(num_ranks) as pool:
        return max(pool.map(peak, range(num_ranks)))


def large_blocks(folder: str) -> Figure:
    """Activations of 34 MiB each, of which the heap keeps none."""
    two_layers = f"{folder}/two-layers"
    found_by("make_model", two_layers, 2, 8_000)
    plan = trainer_plan(two_layers, 34, 512)
    predicted = step_bytes(plan)
    measured = found_by("peak_of_training", two_layers, 34, 512, {})["above_base"]
    name = "sft: Llama of two such layers, 17,408-token microbatches"
    return heap_figure(name, predicted, measured, slack_bytes=trainer_slack(plan))


def score(folder: str) -> list[Figure]:
    """An engine that scores rows of 2,048 tokens; the KV cache's GiB is left out of both sides."""
    figures, base = [], base_bytes("engine")
    for dtype, chunk in (("float32", 512), ("float32", 2048), ("bfloat16", 512)):
        plan = engine_plan(folder, dtype, chunk=chunk, sequences=1)
        moments = beside(engine_scoring(plan), engine_resident(plan))
        predicted = max(each.num_bytes for each in moments) - GIB
        name = f"score: 35M Llama in {dtype}, score.chunk_tokens={chunk}, without its KV cache"
        for environ in (RETURNED, {}):
            peak = found_by("peak_of_scoring", folder, dtype, chunk, environ=environ)["peak"]
            measured = peak - base - GIB
            figures.append(
                compared(name, predicted, measured)
                if environ
                else heap_figure(name, predicted, measured, slack_bytes=engine_slack(plan, moments))
            )
    return figures


def rl(folder: str) -> list[Figure]:
    """Trainer and engine in one process: sample, train, sync; without the KV cache."""
    plan = trainer_plan(folder, 4, 512)
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
    base = base_bytes("rl")
    returned = found_by("peak_of_rl", folder, environ=RETURNED)["peak"] - base - GIB
    heap = found_by("peak_of_rl", folder)["peak"] - base - GIB
    return [
        compared(name, predicted, returned),
        heap_figure(name, predicted, heap, slack_bytes=slack_bytes),
    ]


def found_by(
    task: str, *arguments: Any, environ: dict[str, str] | None = None, timeout_s: float = 110
) -> dict[str, float]:
    """What a function of plan_measures.py finds in a process of its own."""
    return in_process(f"plan_measures.{task}", *arguments, environ=environ, timeout_s=timeout_s)


def base_bytes(kind: str) -> float:
    """Resident memory of a process of this kind, without the engine of a tiny model in it."""
    found = found_by("imported", kind)["bytes"]
    if kind not in ("engine", "rl"):
        return found
    student = engine_plan(str(embedded_path("student")), "float32", chunk=None, sequences=1)
    return found - sum(item.num_bytes for item in engine_resident(student))


def table(rows: list[dict[str, Any]]) -> str:
    """Predicted and measured peaks as Markdown; what a heap kept stands beside its own row."""
    lines = [
        "| MiB | predicted | measured | predicted / measured | measured as it comes |",
        "|---|---|---|---|---|",
    ]
    peaks = {row["name"]: row for row in rows if row["ratio"]}
    for name in dict.fromkeys(name.removesuffix(HEAP) for name in peaks):
        own, heap = peaks.get(name), peaks.get(name + HEAP)
        given = own or heap or {}
        predicted = str(given["reference"]).rpartition(": ")[2].removesuffix(" MiB")
        cells = [
            name,
            predicted,
            f"{own['value']:,.0f}" if own else "",
            f"{own['ratio']:.2f}" if own else "",
            f"{heap['value']:,.0f}" if heap else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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
        name=name + HEAP,
        value=measured / MIB,
        unit="MiB",
        reference=f"predicted over measured; predicted: {predicted / MIB:,.0f} MiB",
        ratio=predicted / measured,
        goal=f"at most {slack_bytes / MIB:,.0f} MiB, the plan's slack, above predicted",
        holds=measured <= predicted + slack_bytes,
    )


def trainer_plan(model: str, rows: int, width: int, **setup: Any) -> TrainerPlan:
    """What plan_measures.py trains with `setup`: two microbatches of `rows` rows in a step.

    Some are larger than the trainer would make them on CPU, for activations to be seen.
    """
    lora, backend = setup.get("lora"), setup.get("backend", {"kind": "fsdp"})
    return TrainerPlan(
        shape=read_shape(Path(model)),
        num_trainers=setup.get("num_ranks", 1),
        batch=Microbatch(num_tokens=rows * width, setting=""),
        backend=TypeAdapter(BackendConfig).validate_python(backend),
        keeps_average="ema_decay" in setup,
        num_candidates=setup.get("num_candidates", 0),
        lora=LoraConfig.model_validate(lora) if lora else None,
        device="cpu",
        dtype="float32",
        checkpointing=setup.get("activation_checkpointing", False),
    )


def step_bytes(plan: TrainerPlan) -> int:
    """The planned peak of loading and steps; plan_measures.py exports nothing."""
    return max(each.num_bytes for each in trainer_moments(plan) if each.name != "the export")


def engine_plan(model: str, dtype: str, *, chunk: int | None, sequences: int) -> EnginePlan:
    """The engines of plan_measures.py."""
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


if __name__ == "__main__":
    main()
