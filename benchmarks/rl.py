"""RL: what a GRPO step costs beside TRL's, where its time goes, and whether it stays that way.

`python benchmarks/rl.py` does all of it (about 40 minutes on two cores); with the name of a part
(`trl`, `steady`, `soak`, `ahead`) only that one, leaving the others' figures as they are.
"""

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from processes import in_process
from record import Figure, write_parts
from rl_measures import COMPLETION_TOKENS, GROUP, PROMPTS, SOAK_STEPS, STEADY_STEPS, prepare
from sft import TRL, install_trl

GOAL_SYNC, GOAL_MIB, GOAL_SLOPE = 0.05, 50, 0.02
GOAL_GAP = 1e-4  # nats, float32: rl.max_sync_gap's default
# What of TRL's CPU time ours may be: with vLLM colocated, with transformers' generation.
GOALS = {"0.3M": {"vllm": 0.67, "transformers": 1.0}, "7M": {"vllm": 0.67, "transformers": 0.67}}
SAID = {
    "vllm": "vLLM colocated, sampler correction",
    "transformers": "transformers' generation",
    "vllm, uncorrected": "vLLM colocated, no sampler correction",
}
MIB = 2**20


def main() -> None:
    """Measure what is asked for, and write the figures."""
    write_parts("rl", {"trl": trl, "steady": steady, "soak": soak, "ahead": ahead})


def trl() -> list[Figure]:
    """CPU seconds of a step, and of TRL's before and after: same model, tokens, threads, AdamW."""
    install_trl()
    return [figure for shape in GOALS for figure in beside_trl(shape)]


def beside_trl(shape: str) -> list[Figure]:
    """Our step on a model of `shape` beside TRL's kinds, both in multiples of fixed work."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(shape, Path(folder))

        def theirs(how: str) -> dict[str, Any]:
            return in_worker("rl_trl.step_of_trl", folder, shape, how)

        before = {how: theirs(how) for how in SAID}  # on both sides: a machine's pace drifts
        ours = in_worker("rl_measures.step_of_ours", folder, shape)
        after = {how: theirs(how) for how in GOALS[shape]}
    split = ", ".join(f"{name} {share:.0%}" for name, share in ours["phases"].items())
    figures = []
    for how, said in SAID.items():
        sides = [each[how] for each in (before, after) if how in each]
        ratio = ours["work"] / statistics.mean(each["work"] for each in sides)
        goal = GOALS[shape].get(how)
        figures.append(
            Figure(
                name=f"trl: {shape} model, GRPO step of {PROMPTS} x {GROUP} x "
                f"{COMPLETION_TOKENS} tokens, one thread ({split})",
                value=ours["cpu_s"],
                unit="CPU-s",
                reference=f"TRL {TRL[0].partition('==')[2]} GRPOTrainer, {said}: "
                + " before and ".join(f"{each['cpu_s']:.3f}" for each in sides)
                + (" CPU-s after" if len(sides) > 1 else " CPU-s before")
                + "; in multiples of fixed work after each step "
                + ", ".join(f"{each['work']:.2f}" for each in sides)
                + f", ours {ours['work']:.2f}",
                ratio=ratio,
                goal=f"at most {goal:g}" if goal else None,
                holds=ratio <= goal if goal else None,
            )
        )
    sync = ours["phases"]["sync"]
    figures.append(
        limit(f"trl: {shape} model, weight sync and canary, share of a step", sync, "", GOAL_SYNC)
    )
    return figures


def steady() -> list[Figure]:
    """Whether steps stay as they are, on the 0.3M model in one process."""
    with tempfile.TemporaryDirectory() as folder:
        prepare("0.3M", Path(folder))
        found = in_worker("rl_measures.steady_steps", folder)
    return [
        Figure(
            name=f"steady: change of a step's CPU time over {STEADY_STEPS} steps, by a robust "
            "line, each step measured in fixed work done after it",
            value=found["scaled"],
            unit=f"of {found['cpu_s']:.3f} CPU-s",
            reference=f"CPU time as it is, with the machine's pace: {found['slope']:+.3f}",
            goal=f"at most {GOAL_SLOPE:g} up or down",
            holds=abs(found["scaled"]) <= GOAL_SLOPE,
        ),
        limit("steady: memory gained over them", found["grown"] / MIB, "MiB", GOAL_MIB),
        limit("steady: canary gap, worst step", found["gap"], "nats", GOAL_GAP),
    ]


def soak() -> list[Figure]:
    """The demo's RL stage, longer, through Ray Train with its checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        prepare("0.3M", Path(folder))
        found = in_worker("rl_soak.soak", folder)
    return [
        limit(
            f"soak: {SOAK_STEPS} steps of the demo through Ray Train, worker's memory at step 50 "
            f"({found['early'] / MIB:.0f} MiB) to the last ({found['late'] / MIB:.0f} MiB)",
            (found["late"] - found["early"]) / MIB,
            "MiB",
            GOAL_MIB,
        ),
        limit("soak: canary gap, worst step", found["gap"], "nats", GOAL_GAP),
        limit("soak: sampler-trainer gap, mean, worst step", found["mean_gap"], "nats", GOAL_GAP),
        Figure(
            name="soak: wall seconds of a step, median of the last 100",
            value=found["late_s"],
            unit="s",
            reference=f"steps 50 to 150: {found['early_s']:.3f} s",
            ratio=found["late_s"] / found["early_s"],
        ),
    ]


def ahead() -> list[Figure]:
    """What sampling a step ahead saves where verifiers are slow: wall time, of both in turn."""
    with tempfile.TemporaryDirectory() as folder:
        prepare("7M", Path(folder))
        task = "rl_ahead.steps_with_a_slow_verifier"
        without, with_it = (in_worker(task, folder, number) for number in (0, 1))
    phases = ("sample", "reward", "train", "sync")
    split = [", ".join(f"{name} {of[name]:.2f}" for name in phases) for of in (with_it, without)]
    return [
        Figure(
            name="ahead: 7M model, wall time of a step with a verifier that takes "
            f"{without['reward']:.2f} s for it, rl.rollouts_ahead=1 ({split[0]}; a gap of "
            f"{with_it['gap']:.2g} nats at a lag of {with_it['lag']:g})",
            value=with_it["step"],
            unit="s",
            reference=f"rollouts_ahead=0: {without['step']:.2f} s ({split[1]})",
            ratio=with_it["step"] / without["step"],
        )
    ]


def limit(name: str, value: float, unit: str, goal: float) -> Figure:
    """A figure that should be at most `goal`."""
    return Figure(name=name, value=value, unit=unit, goal=f"at most {goal:g}", holds=value <= goal)


def in_worker(task: str, *arguments: Any) -> Any:
    """Call a function of a module here in a process with a training worker's environment."""
    from pear_ray.engines.environment import engine_environment

    environ = engine_environment(device="cpu", num_threads=1, kv_cache_gib=1)
    return in_process(task, *arguments, environ=environ)


if __name__ == "__main__":
    main()
