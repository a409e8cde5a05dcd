"""Scoring and RL on 8 to 512 GPUs, on paper: where time and money go, and what breaks first.

`python benchmarks/scaling.py` prints the tables of docs/scaling.md; it measures nothing and needs
no GPU. How fast a GPU computes is what one H100 did with 0.6B parameters (benchmarks/results/
gpu.json). Every assumption is a constant below: change one and run it again.
"""

import functools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pear_ray.clusters.instances import AWS
from pear_ray.clusters.prices import LIST_PRICES
from pear_ray.config.run import load_run
from pear_ray.memory.durations import forward_flops
from pear_ray.memory.items import GIB, Phase, Verdict
from pear_ray.memory.model_shape import ModelShape, read_shape
from pear_ray.memory.pace import DEVICES, pace_of_gpu
from pear_ray.memory.phases import Memory, ModelShapes, plan_phases

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "jobs" / "runs" / "shapes"
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
NUM_GPUS = (8, 16, 32, 64, 128, 256, 512)
GPUS_PER_NODE = 8
HOUR_S = 3600
GPU = DEVICES["h100"]
PACE = pace_of_gpu(GPU, "bfloat16")  # of it the bandwidth, and decoding's share of it
NODE = "p5.48xlarge"
DOLLARS_PER_GPU_HOUR = LIST_PRICES[NODE].on_demand / GPUS_PER_NODE

# Between nodes 3,200 Gbit/s for eight GPUs (p5.48xlarge), inside one 450 GB/s each way (NVLink 4 of
# an H100); of either 70 % is assumed to be reached. Storage: a shared file system of 3 GB/s, or an
# object store at 2 GB/s for each node. Assumed, not measured: put in what yours gives.
NETWORK_BYTES_PER_S = {"inside a node": 0.7 * 450e9, "between nodes": 0.7 * 50e9}
HOST_BYTES_PER_S = 0.7 * 64e9  # between a GPU and its host, one way (PCIe 5.0 x16)
SHARED_STORAGE_BYTES_PER_S = 3e9
OBJECT_STORE_BYTES_PER_S = 2e9
NODE_START_S = 420.0  # a GPU machine from request to `ray start`; assumed
ENGINE_START_S = (
    90.0  # with compilation and graphs; weights come on top. 12 s eager at 0.6B, measured
)
TENSOR_SYNC_S = 0.0003  # of one parameter's copy into the engine: 0.10 s for 310 tensors, measured
CANARY_S = 0.07  # measured
# Llama 3's report counts 419 unexpected interruptions in 54 days on 16,384 GPUs.
GPU_HOURS_PER_FAILURE = 16384 * 54 * 24 / 419
RESTART_S = 600.0  # a new node, processes, loading; assumed
CORPUS_BYTES_PER_TOKEN = 9  # id, mask, log-prob; as docs/planning.md counts them
TIMES_STORED = 2  # rows are in the object store on their way in and on their way out

SCORED_TOKENS = 10e9
SCORED_LENGTH = 4096
SCORING_SPAN = 2  # score and evaluate: 65 GB of weights and a cache on two GPUs
RL_STEPS = 200
SEQUENCES = 4096  # 512 prompts x 8: a rank wants a prompt, so fewer would not split over 512
PROMPT, MAX_COMPLETION = 512, 7680
SAMPLING_SPAN = 4  # rl.tensor_parallel_size
MICROBATCH_TOKENS = 8192
FORWARDS = 4  # a training step with activation checkpointing
SAVE_EVERY = 10
SLICES = 64  # in which completions end


@functools.cache
def measured(name: str) -> float:
    """A figure of benchmarks/results/gpu.json."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    return next(row["value"] for row in rows if row["name"] == name)


@functools.cache
def small() -> ModelShape:
    """What was measured: a model of Qwen3-0.6B's shape."""
    return read_shape(SHAPES / "Qwen3-0.6B")


@functools.cache
def prefill_flops_per_s() -> float:
    """That one H100 reached while scoring rows of 1,024."""
    rate = measured("engine: eager, scored_tokens_per_s")
    return rate * forward_flops(small(), 1024) / 1024


@functools.cache
def training_flops_per_s() -> float:
    """That one H100 reached in SFT on rows of 8,192, op by op, with activation checkpointing."""
    rate = measured("compiled: op by op, checkpointing")
    return rate * FORWARDS * forward_flops(small(), 8192) / 8192


@dataclass(frozen=True, slots=True)
class Split:
    """Seconds of something, by what they go into."""

    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        """All of them."""
        return sum(self.parts.values())


def scoring(shape: ModelShape, num_gpus: int) -> Split:
    """Scoring the corpus once: computing, and what comes before and after."""
    nodes = math.ceil(num_gpus / GPUS_PER_NODE)
    rows = SCORED_TOKENS / SCORED_LENGTH
    flops = rows * forward_flops(shape, SCORED_LENGTH)
    weights = 2 * shape.num_parameters
    written = SCORED_TOKENS * CORPUS_BYTES_PER_TOKEN
    return Split(
        {
            "nodes start": NODE_START_S,
            "engines start": ENGINE_START_S + nodes * weights / SHARED_STORAGE_BYTES_PER_S,
            "computing": flops / (num_gpus * prefill_flops_per_s()),
            "reading and writing rows": 2 * written / SHARED_STORAGE_BYTES_PER_S,
        }
    )


def decode_step_seconds(shape: ModelShape, *, batch: float, length: float, span: int) -> float:
    """One token of every sequence: the longer of reading weights and cache, and of computing."""
    cache = batch * length * 2 * shape.num_layers * shape.key_size
    by_bytes = 2 * (shape.num_parameters + cache) / (PACE.bytes_per_s * PACE.decoding_share)
    by_flops = 2 * shape.num_parameters * batch / prefill_flops_per_s()
    return max(by_bytes, by_flops) / span


def sampling_seconds(shape: ModelShape, num_gpus: int) -> float:
    """Completions that end evenly between nothing and the longest.

    A slice of the longest at a time: the batch shrinks, and the last ones decode nearly alone.
    """
    engines = num_gpus // SAMPLING_SPAN
    mine = SEQUENCES / engines
    seconds = mine * forward_flops(shape, PROMPT) / (SAMPLING_SPAN * prefill_flops_per_s())
    for part in range(SLICES):
        done = (part + 0.5) / SLICES
        seconds += (
            MAX_COMPLETION
            / SLICES
            * decode_step_seconds(
                shape,
                batch=mine * (1 - done),
                length=PROMPT + done * MAX_COMPLETION,
                span=SAMPLING_SPAN,
            )
        )
    return seconds


def network(num_gpus: int) -> float:
    """Bytes a second that one GPU gets from the others."""
    where = "inside a node" if num_gpus <= GPUS_PER_NODE else "between nodes"
    return NETWORK_BYTES_PER_S[where]


def training_seconds(shape: ModelShape, num_gpus: int, *, tokens: float, length: int) -> Split:
    """FSDP2 on all GPUs: computing, and what of its gathering computing does not hide."""
    microbatches = max(1, math.ceil(tokens / num_gpus / MICROBATCH_TOKENS))
    flops = FORWARDS * tokens / length * forward_flops(shape, length)
    computing = flops / (num_gpus * training_flops_per_s())
    # Parameters are gathered for forward and backward in bfloat16, gradients reduced in float32.
    moved = microbatches * (2 + 2 + 4) * shape.num_parameters * (1 - 1 / num_gpus)
    return Split(
        {
            "computing": computing,
            "waiting for gathers": max(0.0, moved / network(num_gpus) - computing),
        }
    )


def sync_seconds(shape: ModelShape, num_gpus: int, *, span: int) -> float:
    """All parameters into every engine, which keeps a share of them; and the canary."""
    gathered = 2 * shape.num_parameters * (1 - 1 / num_gpus) / network(num_gpus)
    copied = 2 * 2 * shape.num_parameters / span / (PACE.bytes_per_s * PACE.decoding_share)
    return gathered + copied + num_tensors(shape) * TENSOR_SYNC_S + CANARY_S


def num_tensors(shape: ModelShape) -> int:
    """Of a layer: seven products, the norms, and those of queries and keys."""
    each = 7 + shape.num_norms + 2 * shape.has_qk_norm
    return each * shape.num_layers + 2 + (not shape.is_tied)


def state_bytes(shape: ModelShape) -> int:
    """Of a checkpoint: weights and two moments in float32."""
    return 12 * shape.num_parameters


def offload_seconds(shape: ModelShape, num_gpus: int) -> float:
    """The moments to the GPU for the update and back, the weights away while the engine samples."""
    return 2 * (8 + 4) * shape.num_parameters / num_gpus / HOST_BYTES_PER_S


def rl_step(shape: ModelShape, num_gpus: int) -> Split:
    """One step of RL, a checkpoint's share of it included."""
    mean = MAX_COMPLETION / 2 + PROMPT
    training = training_seconds(
        shape, num_gpus, tokens=SEQUENCES * mean, length=PROMPT + MAX_COMPLETION // 2
    )
    return Split(
        {
            "sampling": sampling_seconds(shape, num_gpus),
            "training": training.parts["computing"],
            "gathers": training.parts["waiting for gathers"],
            "to the host and back": offload_seconds(shape, num_gpus),
            "weight sync": sync_seconds(shape, num_gpus, span=SAMPLING_SPAN),
            "checkpoints": state_bytes(shape) / SHARED_STORAGE_BYTES_PER_S / SAVE_EVERY,
        }
    )


def failures(num_gpus: int, step: Split) -> tuple[float, float]:
    """Failures of the whole of RL, and the share of time that they cost."""
    rate = num_gpus / GPU_HOURS_PER_FAILURE / HOUR_S
    lost = RESTART_S + SAVE_EVERY / 2 * step.seconds
    return rate * RL_STEPS * step.seconds, rate * lost


def memory(shape: ModelShape, num_gpus: int) -> list[Phase]:
    """What `pear plan` says of these stages, with the settings above."""
    sizes: dict[str, str | int] = {"cluster.num_trainers": num_gpus}
    sizes |= {"cluster.num_samplers": num_gpus // SCORING_SPAN}
    sizes |= {"rl.prompts_per_step": 512, "sft.global_batch_size": 512}
    sizes |= {"rl.tensor_parallel_size": SAMPLING_SPAN, "score.tensor_parallel_size": SCORING_SPAN}
    sizes |= {"evaluate.tensor_parallel_size": SCORING_SPAN}
    sizes |= {"rl.activation_checkpointing": "true", "rl.colocation.offload": "all"}
    config = load_run(
        ROOT / "jobs" / "runs" / "paper_math.yaml",
        [f"{key}={value}" for key, value in sizes.items()],
    )
    models = ModelShapes(policy=shape, behavior={"*": shape})
    return plan_phases(config, models, Memory(device_bytes=GPU.memory_bytes, host_bytes=0))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """As Markdown."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def small_end() -> Iterator[str]:
    """The same formulas at what was measured: 0.6B parameters on one H100.

    Scoring and training are what the FLOP/s above are from, and the sync is what the seconds for
    each tensor are from: sampling is the check.
    """
    shape, sequences, tokens = small(), 256, 512
    prompts = sequences * forward_flops(shape, 64) / prefill_flops_per_s()
    step_s = decode_step_seconds(shape, batch=sequences, length=64 + tokens / 2, span=1)
    rows = [
        (
            "sampling, 256 x 512 tokens",
            sequences * tokens / (prompts + tokens * step_s),
            measured("rl: rl/tokens_per_s/sample"),
            "{:,.0f} tokens/s",
        ),
        (
            "weight sync, alone",
            sync_seconds(shape, 1, span=1) - CANARY_S,
            measured("engine: eager, sync_s"),
            "{:.2f} s",
        ),
    ]
    yield from table(
        ("one H100, 0.6B parameters", "model", "measured", "model / measured"),
        [
            (name, words.format(model), words.format(found), f"{model / found:.2f}")
            for name, model, found, words in rows
        ],
    )


def scoring_rows(shape: ModelShape) -> Iterator[tuple[str, ...]]:
    """A line for each number of GPUs."""
    for num in NUM_GPUS:
        split = scoring(shape, num)
        hours = split.seconds / HOUR_S
        shares = [f"{part / split.seconds:.0%}" for part in split.parts.values()]
        rate = SCORED_TOKENS / SCORED_LENGTH / split.parts["computing"]
        dollars = hours * num * DOLLARS_PER_GPU_HOUR
        yield (str(num), f"{hours:.1f} h", f"{dollars:,.0f} $", *shares, f"{rate:,.0f}")


def rl_rows(shape: ModelShape) -> Iterator[tuple[str, ...]]:
    """A line for each number of GPUs."""
    for num in NUM_GPUS:
        step = rl_step(shape, num)
        failed, lost = failures(num, step)
        hours = RL_STEPS * step.seconds * (1 + lost) / HOUR_S
        parts = [f"{part:,.0f} s" if part >= 1 else f"{part:.1f} s" for part in step.parts.values()]
        yield (
            str(num),
            f"{step.seconds:,.0f} s",
            *parts,
            f"{hours:.0f} h",
            f"{hours * num * DOLLARS_PER_GPU_HOUR:,.0f} $",
            f"{failed:.2f}",
        )


def memory_rows(shape: ModelShape) -> Iterator[tuple[str, ...]]:
    """A line for each stage, at both ends, with the fewest GPUs that it fits on."""
    planned = {num: memory(shape, num) for num in NUM_GPUS}
    for place, few in enumerate(planned[NUM_GPUS[0]]):
        fitting = [num for num in NUM_GPUS if planned[num][place].verdict is Verdict.FITS]
        yield (
            few.name,
            *(
                f"{phase.peak.num_bytes / GIB:.0f} GiB, at {phase.peak.name}"
                for phase in (planned[num][place] for num in (NUM_GPUS[0], NUM_GPUS[-1]))
            ),
            f"from {fitting[0]} GPUs" if fitting else "nowhere",
        )


def host_words(shape: ModelShape) -> str:
    """What the host of a node holds at most, and where that ends."""
    host = AWS[NODE].memory_gib * GIB
    item = max(
        (item for phase in memory(shape, NUM_GPUS[0]) for item in phase.on_host),
        key=lambda item: item.num_bytes,
    )
    most = host / GPUS_PER_NODE * shape.num_parameters / item.num_bytes
    return (
        f"The host of {GPUS_PER_NODE} GPUs holds {GPUS_PER_NODE * item.num_bytes / GIB:.0f} GiB at "
        f"most ({item.name}, on every rank); {NODE} has {host / GIB:.0f}, which ends at "
        f"{most / 1e9:.0f} billion parameters."
    )


def main() -> int:
    """Print the tables; the exit code."""
    shape = read_shape(SHAPES / "Qwen3-32B")
    moved = TIMES_STORED * SCORED_TOKENS * CORPUS_BYTES_PER_TOKEN
    ends = [f"{num} GPUs" for num in (NUM_GPUS[0], NUM_GPUS[-1])]
    scored = [f"of it {name}" for name in scoring(shape, 8).parts]
    stepped = [*rl_step(shape, 8).parts]
    save_s = [
        state_bytes(shape) / (num / GPUS_PER_NODE * OBJECT_STORE_BYTES_PER_S)
        for num in (NUM_GPUS[0], NUM_GPUS[-1])
    ]
    lines = [
        *small_end(),
        *table(("stage", *ends, f"fits on {GPU.memory_bytes // 10**9} GB"), [*memory_rows(shape)]),
        host_words(shape),
        "",
        *table(("GPUs", "time", "cost", *scored, "rows/s"), [*scoring_rows(shape)]),
        *table(
            ("GPUs", "step", *stepped, f"{RL_STEPS} steps", "cost", "failures"), [*rl_rows(shape)]
        ),
        (
            f"A GPU and hour {DOLLARS_PER_GPU_HOUR:.2f} $. Through the object stores while scoring "
            f"{moved / 1e9:,.0f} GB. A checkpoint {state_bytes(shape) / 1e9:,.0f} GB: "
            f"{state_bytes(shape) / SHARED_STORAGE_BYTES_PER_S:.0f} s on the shared file system, "
            f"{save_s[0]:.0f} s ({ends[0]}) to {save_s[1]:.0f} s ({ends[1]}) on an object store."
        ),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
