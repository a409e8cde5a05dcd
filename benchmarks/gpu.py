"""One GPU, a model of Qwen3-0.6B's shape: SFT's pace, the engine's, a GRPO step and its turns.

`python benchmarks/gpu.py` does all of it (more than 10 minutes on an H100); with the name of a part
(`sft`, `compiled`, `engine`, `rl`, `trl`) only that one, leaving the others' figures as they are.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from gpu_measures import VARIANTS
from processes import in_process
from record import Figure, write_parts
from sft import TRL, install_trl

from pear_ray.engines.environment import engine_environment

PRIME_RL = 26_000  # tokens/s: prime-rl's BENCHMARKS for Qwen3-0.6B, one H100, 8192, checkpointing
PRIME_RL_GIB = 31.7
GOAL_OVERHEAD, GOAL_SYNC = 0.98, 0.05
TIMEOUT_S = 480.0


def main() -> None:
    """Measure what is asked for, and write the figures."""
    with tempfile.TemporaryDirectory() as folder:
        on_gpu("make_model", folder)
        parts = {"sft": sft, "compiled": compiled, "engine": engine, "rl": rl, "trl": trl}
        write_parts("gpu", {name: bind(part, folder) for name, part in parts.items()})


def bind(part: Any, folder: str) -> Any:
    """`part` of the model in `folder`."""
    return lambda: part(folder)


def sft(folder: str) -> list[Figure]:
    """Tokens per second and memory, PEAR and uniform, with and without checkpointing."""
    ceiling = on_gpu("tflops")
    figures = [
        Figure(name="sft: this GPU's own product of 8192^3", value=ceiling, unit="TFLOP/s"),
    ]
    pear = on_gpu("sft", folder, "pear", "checkpointing")
    uniform = on_gpu("sft", folder, "uniform", "checkpointing")
    whole = on_gpu("sft", folder, "pear", "kept")
    for name, found in (("checkpointing", pear), ("everything kept", whole)):
        figures += [
            Figure(
                name=f"sft: PEAR, rows of 8192, {name}",
                value=found["tokens_per_s"],
                unit="tokens/s",
                reference=f"prime-rl on one H100, checkpointing: {PRIME_RL:,} (its BENCHMARKS)",
                ratio=found["tokens_per_s"] / PRIME_RL,
            ),
            Figure(
                name=f"sft: share of this GPU's own product, {name}",
                value=found["tflops"] / ceiling,
                unit="",
            ),
            Figure(
                name=f"sft: peak memory, {name}",
                value=found["peak_gib"],
                unit="GiB",
                reference=f"prime-rl: {PRIME_RL_GIB} GiB",
                ratio=found["peak_gib"] / PRIME_RL_GIB,
            ),
        ]
    ratio = pear["tokens_per_s"] / uniform["tokens_per_s"]
    return [
        *figures,
        Figure(
            name="sft: PEAR beside uniform, checkpointing",
            value=pear["tokens_per_s"],
            unit="tokens/s",
            reference=f"our uniform SFT: {uniform['tokens_per_s']:,.0f} tokens/s",
            ratio=ratio,
            goal=f"at least {GOAL_OVERHEAD:g}",
            holds=ratio >= GOAL_OVERHEAD,
        ),
    ]


def compiled(folder: str) -> list[Figure]:
    """Pace and memory with `sft.compile` and without, with and without checkpointing."""
    figures = []
    for name, activations in (("everything kept", "kept"), ("checkpointing", "checkpointing")):
        plain = on_gpu("sft", folder, "pear", activations)
        found = on_gpu("sft", folder, "pear", activations, "compiled")
        figures += [
            Figure(
                name=f"compiled: PEAR, rows of 8192, {name}",
                value=found["tokens_per_s"],
                unit="tokens/s",
                reference=f"op by op: {plain['tokens_per_s']:,.0f}; prime-rl's is {PRIME_RL:,}",
                ratio=found["tokens_per_s"] / plain["tokens_per_s"],
            ),
            Figure(
                name=f"compiled: peak memory, {name}",
                value=found["peak_gib"],
                unit="GiB",
                reference=f"op by op: {plain['peak_gib']:.1f} GiB",
                ratio=found["peak_gib"] / plain["peak_gib"],
            ),
            Figure(
                name=f"compiled: first step, {name}",
                value=found["first_step_s"],
                unit="s",
                reference=f"op by op: {plain['first_step_s']:.1f} s",
                ratio=found["first_step_s"] / plain["first_step_s"],
            ),
        ]
    return figures


def engine(folder: str) -> list[Figure]:
    """Sampling, scoring, sleeping and waking, eager and compiled."""
    units = {"_per_s": "tokens/s", "_s": "s", "_gib": "GiB", "_gap": "nats"}
    figures = []
    for kind in ("eager", "compiled"):
        for name, value in on_gpu("engine", folder, kind).items():
            unit = next(unit for end, unit in units.items() if name.endswith(end))
            figures.append(Figure(name=f"engine: {kind}, {name}", value=value, unit=unit))
    return figures


def rl(folder: str) -> list[Figure]:
    """Phases, memory and mismatch of a GRPO step, the policy op by op; what else costs beside."""
    return rl_figures(on_gpu("rl", folder, "compiled", *VARIANTS))


def rl_figures(found: dict[str, dict[str, float]]) -> list[Figure]:
    """Of what `gpu_measures.rl` says of each variant."""
    plain = found["op by op"]
    share = plain["time/sync_s"] / plain["time/step_s"]
    figures = [
        Figure(name=f"rl: {name}", value=value, unit="s" if name.startswith("time/") else "")
        for name, value in plain.items()
        if name.startswith(("time/", "memory/", "rl/mismatch", "rl/tokens", "rl/sync", "rl/comp"))
    ]
    figures += [
        Figure(
            name="rl: weight sync's share of a step, wake and canary included",
            value=share,
            unit="",
            goal=f"under {GOAL_SYNC:g}",
            holds=share < GOAL_SYNC,
        ),
    ]
    for variant, metrics in found.items():
        if variant == "op by op":
            continue
        for name in ("time/step_s", "time/train_s", "time/sync_s", "first_step_s"):
            figures.append(
                Figure(
                    name=f"rl: {variant}, {name}",
                    value=metrics[name],
                    unit="s",
                    reference=f"op by op: {plain[name]:.2f} s",
                    ratio=metrics[name] / plain[name],
                )
            )
        gap = "rl/mismatch/mean_gap"
        figures.append(
            Figure(
                name=f"rl: {variant}, {gap}",
                value=metrics[gap],
                unit="nats",
                reference=f"op by op: {plain[gap]:.2g}",
            )
        )
    return figures


def trl(folder: str) -> list[Figure]:
    """Our step beside that of TRL's GRPOTrainer with vLLM colocated."""
    install_trl()
    ours = on_gpu("rl", folder, "compiled", "op by op", "compiled")
    theirs = on_gpu("trl", folder, module="gpu_trl")
    said = f"{TRL[0]} GRPOTrainer, vLLM colocated: {theirs['step_s']:.2f} s"
    return [
        Figure(
            name=f"trl: GRPO step, policy {variant}",
            value=ours[variant]["time/step_s"],
            unit="s",
            reference=said,
            ratio=ours[variant]["time/step_s"] / theirs["step_s"],
        )
        for variant in ours
    ]


def on_gpu(function: str, *arguments: Any, module: str = "gpu_measures") -> Any:
    """What that function returns, from a fresh process."""
    environ = engine_environment(device="cuda", num_threads=4, kv_cache_gib=1)
    return in_process(f"{module}.{function}", *arguments, environ=environ, timeout_s=TIMEOUT_S)


if __name__ == "__main__":
    main()
