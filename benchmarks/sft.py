"""SFT: what PEAR costs beside plain SFT, our pace beside TRL's, FLOPs, and the head's memory.

`python benchmarks/sft.py` does all of it (about 20 minutes on two cores); with the name of a part
(`pear`, `trl`, `mfu`, `head`) only that one, leaving the others' figures as they are.
TRL is no dependency of ours: it is installed, without its dependencies, into benchmarks/.trl.
"""

import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from processes import in_process
from record import Figure, write_parts
from sft_measures import HEAD_SIZES, TRL_FOLDER, make_model

TRL = ["trl==1.16.0", "accelerate==1.15.0"]
GOAL_OVERHEAD, GOAL_MEMORY, GOAL_SMALL, GOAL_LARGE = 0.98, 1.03, 1.5, 1.0
GOALS = {"0.3M": GOAL_SMALL, "7M": GOAL_SMALL, "135M": GOAL_LARGE}
GOAL_HEAD_GIB = 1.2
APART = 1e-4  # logits of a document in a pack and alone: float32 sums in another order
GIB = 2**30


def main() -> None:
    """Measure what is asked for, and write the figures."""
    write_parts("sft", {"pear": pear, "trl": trl, "mfu": mfu, "head": head})


def pear() -> list[Figure]:
    """Tokens per CPU-second and peak memory of PEAR beside plain SFT, on the 7M model."""
    with tempfile.TemporaryDirectory() as folder:
        make_model("7M", Path(folder))
        both = in_worker("paces_of_both", folder, "7M")
        peaks = {kind: in_worker("peak_of", folder, "7M", kind) for kind in ("uniform", "pear")}
    ratio = both["pear"] / both["uniform"]
    memory = peaks["pear"]["mib"] / peaks["uniform"]["mib"]
    return [
        Figure(
            name="pear: live token weights, 7M model, steps of both by turns",
            value=both["pear"],
            unit="tokens/CPU-s",
            reference=f"our uniform SFT: {both['uniform']:,.0f} tokens/CPU-s",
            ratio=ratio,
            goal=f"at least {GOAL_OVERHEAD:g}",
            holds=ratio >= GOAL_OVERHEAD,
        ),
        Figure(
            name="pear: peak memory of the process",
            value=peaks["pear"]["mib"],
            unit="MiB",
            reference=f"our uniform SFT: {peaks['uniform']['mib']:,.0f} MiB",
            ratio=memory,
            goal=f"at most {GOAL_MEMORY:g}",
            holds=memory <= GOAL_MEMORY,
        ),
    ]


def trl() -> list[Figure]:
    """Real tokens per CPU-second beside TRL's SFTTrainer: same rows, threads, AdamW.

    Padded in the same microbatches, and packed without padding, as TRL recommends.
    """
    install_trl()
    return [figure for shape in GOALS for figure in beside_trl(shape)]


def install_trl() -> None:
    """TRL without its dependencies into a folder of its own, where it is not there yet."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
    if not TRL_FOLDER.exists():
        subprocess.run([*install, str(TRL_FOLDER), *TRL], check=True)


def beside_trl(shape: str) -> list[Figure]:
    """Our pace on a model of `shape`, with TRL's padded and packed before and after."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(shape, Path(folder))

        def theirs() -> list[dict[str, Any]]:
            return [in_worker("pace_of_trl", folder, shape, packed) for packed in (False, True)]

        before = theirs()  # on both sides: a shared machine's pace drifts
        ours = in_worker("pace_of_ours", folder, shape)["tokens_per_cpu_s"]
        after = theirs()
    figures = []
    for how, first, second in zip(("padded", "packed"), before, after, strict=True):
        paces = [each["tokens_per_cpu_s"] for each in (first, second)]
        said = how if how == "padded" else described(first)
        ratio = 2 * ours / sum(paces)
        goal = GOALS[shape] if how == "padded" else None
        figures.append(
            Figure(
                name=f"trl: {shape} model, PEAR, rows end to end; TRL {how}",
                value=ours,
                unit="tokens/CPU-s",
                reference=f"TRL {TRL[0].partition('==')[2]} SFTTrainer, plain SFT, {said}: "
                f"{paces[0]:,.0f} before and {paces[1]:,.0f} tokens/CPU-s after",
                ratio=ratio,
                goal=f"at least {goal:g}" if goal else None,
                holds=ratio >= goal if goal else None,
            )
        )
    return figures


def described(packed: dict[str, Any]) -> str:
    """TRL's packing as it was found to be."""
    apart = (
        "kept apart" if packed["mixing"] <= APART else "NOT kept apart (each reads those before it)"
    )
    return (
        f"packed (bfd, {packed['steps_per_epoch']:.0f} steps per epoch, {packed['attention']} "
        f"attention, documents {apart}: logits of one in its pack and alone differ by "
        f"{packed['mixing']:.1g})"
    )


def mfu() -> list[Figure]:
    """Share of the machine's matrix products' pace that our SFT step reaches, one thread."""
    figures = []
    for shape in ("7M", "135M"):
        with tempfile.TemporaryDirectory() as folder:
            make_model(shape, Path(folder))
            found = in_worker("flops_share", folder, shape)
        peak = (found["before"] + found["after"]) / 2
        figures.append(
            Figure(
                name=f"mfu: {shape} model, PEAR, float32 on one thread; FLOPs of real tokens: "
                f"6 x {found['parameters']:,.0f} x tokens "
                "+ 12 x layers x hidden x sum of squared row lengths",
                value=found["flops_per_s"] / 1e9,
                unit="GFLOP/s",
                reference="the fastest of the model's own products in float32: "
                f"{found['before'] / 1e9:.1f} GFLOP/s before and {found['after'] / 1e9:.1f} after",
                ratio=found["flops_per_s"] / peak,
            )
        )
    return figures


def head() -> list[Figure]:
    """Peak memory of chosen tokens' log-probs, forward and backward, at a large vocabulary."""
    ours, plain = in_worker("head_of_ours"), in_worker("head_of_torch")
    for name in ("sum", "gradient"):
        if not math.isclose(ours[name], plain[name], rel_tol=1e-4):
            raise SystemExit(f"head: {name} is {ours[name]} by us and {plain[name]} by torch")
    tokens, vocabulary, width = HEAD_SIZES
    above = ours["above"] / GIB
    return [
        Figure(
            name=f"head: log-probs of {tokens:,} tokens, vocabulary {vocabulary:,}, hidden {width}"
            ", forward and backward, float32: all above head, head's gradient and hidden states",
            value=above,
            unit="GiB",
            reference=f"torch's logits.float().log_softmax: {plain['above'] / GIB:.2f} GiB, "
            f"{plain['cpu_s']:.0f} CPU-s beside our {ours['cpu_s']:.0f}",
            ratio=ours["above"] / plain["above"],
            goal=f"at most {GOAL_HEAD_GIB:g} GiB",
            holds=above <= GOAL_HEAD_GIB,
        )
    ]


def in_worker(task: str, *arguments: Any) -> Any:
    """Call a function of sft_measures.py in a process with a training worker's environment."""
    from pear_ray.engines.environment import engine_environment

    environ = engine_environment(device="cpu", num_threads=1, kv_cache_gib=1)
    return in_process(f"sft_measures.{task}", *arguments, environ=environ)


if __name__ == "__main__":
    main()
