"""How fast a device computes and reads its memory: published figures, or a short measurement."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

PROBE_LIMIT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU as its data sheet has it.

    Attributes:
        name: What it is.
        flops_per_s: Of dense matrix products, by dtype. Float32 is that of the plain units: PyTorch
            does not use TF32 unless told to.
        bytes_per_s: Of its memory.
        memory_bytes: Its memory, in the sheet's decimal GB.
        source: Where the figures are from.
    """

    name: str
    flops_per_s: Mapping[str, float]
    bytes_per_s: float
    memory_bytes: int
    source: str


# Data sheets give products in bfloat16 "with sparsity" for H100, H200 and L4: half of it is dense.
DEVICES = {
    "h100": Device(
        name="H100 SXM",
        flops_per_s={"bfloat16": 989e12, "float32": 67e12},
        bytes_per_s=3.35e12,
        memory_bytes=80 * 10**9,
        source="NVIDIA H100 Tensor Core GPU data sheet",
    ),
    "h200": Device(
        name="H200 SXM",
        flops_per_s={"bfloat16": 989e12, "float32": 67e12},
        bytes_per_s=4.8e12,
        memory_bytes=141 * 10**9,
        source="NVIDIA H200 Tensor Core GPU data sheet",
    ),
    "a100": Device(
        name="A100 SXM, 80 GB",
        flops_per_s={"bfloat16": 312e12, "float32": 19.5e12},
        bytes_per_s=2.039e12,
        memory_bytes=80 * 10**9,
        source="NVIDIA A100 Tensor Core GPU data sheet",
    ),
    "l4": Device(
        name="L4",
        flops_per_s={"bfloat16": 121e12, "float32": 30.3e12},
        bytes_per_s=0.3e12,
        memory_bytes=24 * 10**9,
        source="NVIDIA L4 Tensor Core GPU data sheet",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What one worker is taken to reach.

    Attributes:
        flops_per_s: Of matrix products at their best.
        bytes_per_s: Of its memory at its best.
        training_share: Of `flops_per_s`, reached by a training step.
        prefill_share: Of `flops_per_s`, reached by passes over given tokens.
        decoding_share: Of `bytes_per_s`, reached while tokens are sampled. Assumed.
        words: Where the first two are from.
    """

    flops_per_s: float
    bytes_per_s: float
    training_share: float
    prefill_share: float
    decoding_share: float
    words: str


def pace_of_gpu(device: Device, dtype: str) -> Pace:
    """A GPU's pace, with the shares that one H100 reached (benchmarks/results/gpu.json).

    Those are of a model of 0.6B parameters; larger ones reach more. Decoding's is assumed.
    """
    flops = device.flops_per_s[dtype]
    return Pace(
        flops_per_s=flops,
        bytes_per_s=device.bytes_per_s,
        training_share=0.14,
        prefill_share=0.28,
        decoding_share=0.6,
        words=f"{device.name}: {flops / 1e12:g} TFLOP/s in {dtype}, "
        f"{device.bytes_per_s / 1e12:g} TB/s ({device.source})",
    )


def pace_of_this_machine(num_threads: int) -> Pace:
    """This CPU's pace on so many threads, measured in a process of its own (under a second).

    The share that training reaches is what benchmarks/sft.py found on models of 7M and 135M
    parameters (0.50 and 0.40).
    """
    done = subprocess.run(
        [sys.executable, "-m", "pear_ray.memory.probe"],
        env=os.environ | {"OPENBLAS_NUM_THREADS": str(num_threads)},
        capture_output=True,
        text=True,
        check=True,
        timeout=PROBE_LIMIT_S,
    )
    found = json.loads(done.stdout)
    return Pace(
        flops_per_s=found["flops_per_s"],
        bytes_per_s=found["bytes_per_s"],
        training_share=0.4,
        prefill_share=0.4,
        decoding_share=0.6,
        words=f"this machine, {num_threads} thread{'s' if num_threads > 1 else ''} a worker: "
        f"{found['flops_per_s'] / 1e9:.0f} GFLOP/s in float32, "
        f"{found['bytes_per_s'] / 1e9:.1f} GB/s, as just measured",
    )
