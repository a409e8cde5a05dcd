"""What benchmarks/rl.py calls in processes of their own: our GRPO steps, and what both sides share.

Every completion has COMPLETION_TOKENS on both sides: engines are told to go on past the end token.
"""

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from processes import memory_of
from sft_measures import make_model, one_process

PROMPTS, GROUP, COMPLETION_TOKENS = 8, 8, 64
MAX_MODEL_LEN = 192
LEARNING_RATE = 1e-4
WARM_UP = 3  # steps before the clock
TIMED = {"0.3M": 20, "7M": 8}
STEADY_STEPS, SOAK_STEPS = 200, 500
PHASES = ("sample", "reward", "train", "sync")
GAME = {
    "name": "chain_sum",
    "params": {"min_terms": 5, "max_terms": 8, "min_digits": 1, "max_digits": 1},
}
PROBLEMS = {"games": [GAME], "size": 2000, "seed": 2}


def prepare(shape: str, folder: Path) -> None:
    """The model of `shape` in `folder`/model: the embedded student, or a random one."""
    from pear_ray.embedded.paths import embedded_path

    if shape == "0.3M":
        (folder / "model").symlink_to(embedded_path("student"))
    else:
        make_model(shape, folder)


def share_of_digits(text: str) -> float:
    """The reward on both sides: cheap, and different within a group."""
    return sum(letter.isdigit() for letter in text) / COMPLETION_TOKENS


def reward(problem: Any, completion: str) -> float:  # noqa: ARG001 - how verifiers are called
    """`share_of_digits` as a verifier of ours."""
    return share_of_digits(completion)


def cpu_s() -> float:
    """User and system seconds of this process and of all that it has started."""
    children = 0.0
    for child in psutil.Process().children(recursive=True):
        times = child.cpu_times()
        children += times.user + times.system
    return time.process_time() + children


class Meter:
    """CPU and wall time of each step, and the pace of the machine right after it."""

    def __init__(self) -> None:
        self._begins: list[tuple[float, float]] = []
        self._spent: list[tuple[float, float]] = []
        self._paces: list[float] = []

    def mark(self) -> None:
        """A step begins where the last one ended; call it once before the first."""
        now = (cpu_s(), time.perf_counter())
        if self._begins:
            cpu, wall = self._begins[-1]
            self._spent.append((now[0] - cpu, now[1] - wall))
        self._paces.append(min(fixed_work() for _ in range(2)))
        self._begins.append((cpu_s(), time.perf_counter()))

    def per_step(self) -> dict[str, Any]:
        """Mean CPU and wall seconds of the steps after WARM_UP, and those of each.

        `work` is the median of their CPU time as multiples of fixed work: minutes later the same
        step takes this machine a tenth more or less.
        """
        spent, paces = np.array(self._spent)[WARM_UP:], np.array(self._paces)[1 + WARM_UP :]
        return {
            "work": float(np.median(spent[:, 0] / paces)),
            "cpu_s": float(spent[:, 0].mean()),
            "wall_s": float(spent[:, 1].mean()),
            "cpu_s_of_each": spent[:, 0].tolist(),
            "wall_s_of_each": spent[:, 1].tolist(),
        }


def fingerprint(parameters: Any) -> float:
    """A number that changes when any weight does."""
    import torch

    with torch.no_grad():
        return float(sum(each.double().abs().sum() for each in parameters))


def grpo_worker(folder: str, num_steps: int, **changes: Any) -> Any:
    """One worker of the colocated group with its own engine, in this process."""
    from pear_ray.config.run import validate_run
    from pear_ray.distributed.rl_loop import GrpoWorker
    from pear_ray.distributed.sft_loop import TrainJob
    from pear_ray.engines.vllm import engine

    # Rollouts end where the model ends them; equal token counts on both sides want otherwise.
    engine.SamplingParams = functools.partial(engine.SamplingParams, ignore_eos=True)
    run_dir = Path(folder) / "run"
    (run_dir / "rl").mkdir(parents=True, exist_ok=True)
    config = validate_run(
        {
            "name": "benchmark",
            "models": {
                "policy": "unused",
                "behavior": "unused",
                "dtype": "float32",
                "max_model_len": MAX_MODEL_LEN,
            },
            "corpus": {"kind": "dataset", "path": "unused"},
            "sft": {"optimizer": {"learning_rate": LEARNING_RATE}},
            "rl": {
                "problems": PROBLEMS,
                "optimizer": {"learning_rate": LEARNING_RATE, "warmup_fraction": 0.0},
                "num_steps": num_steps,
                "prompts_per_step": PROMPTS,
                "group_size": GROUP,
                "max_tokens": COMPLETION_TOKENS,
                "overlong": {"max_truncated_fraction": 1.0},  # nothing ends before them
                "rewards": {"components": [{"kind": "function", "function": "rl_measures:reward"}]},
            }
            | changes,
            "evaluate": {"problems": {**PROBLEMS, "seed": 3}},
            "cluster": {"num_trainers": 1},
        },
        origin="benchmark",
    )
    model = (Path(folder) / "model").resolve()
    return GrpoWorker(TrainJob(config=config, run_dir=run_dir, attempt=1, model=model))


def drive(worker: Any, num_steps: int, after: Callable[[dict[str, float]], None]) -> None:
    """Steps as the loop does them, each logged."""
    worker.publish_weights()
    for step in range(num_steps):
        metrics = worker.step(step)
        worker.log.log(metrics, step=step + 1, num_steps=num_steps)
        after(metrics)


def step_of_ours(folder: str, shape: str) -> dict[str, Any]:
    """What a step costs us, and what shows that it did its work."""
    one_process()
    num_steps = WARM_UP + TIMED[shape]
    worker = grpo_worker(folder, num_steps)
    worker.pool.wait_until_ready()  # loading verifiers is no part of a step
    meter, seen = Meter(), []

    def after(metrics: dict[str, float]) -> None:
        meter.mark()
        seen.append(metrics)

    before = fingerprint(worker.trainer.module.parameters())
    meter.mark()
    drive(worker, num_steps, after)
    worker.pool.close()
    moved = fingerprint(worker.trainer.module.parameters()) - before
    return (
        meter.per_step()
        | {"phases": phase_shares(seen[WARM_UP:])}
        | checked(
            tokens=[each["rl/completion_length/mean"] * PROMPTS * GROUP for each in seen],
            losses=[each["rl/loss"] for each in seen],
            norms=[each["rl/grad_norm"] for each in seen],
            gaps=[each["rl/mismatch/mean_gap"] for each in seen],
            moved=moved,
        )
    )


def phase_shares(steps: list[dict[str, float]]) -> dict[str, float]:
    """Share of each phase in the steps' wall time."""
    whole = sum(each["time/step_s"] for each in steps)
    return {name: sum(each[f"time/{name}_s"] for each in steps) / whole for name in PHASES}


def steady_steps(folder: str) -> dict[str, float]:
    """How CPU time and memory of a step change over STEADY_STEPS, after a tenth more to warm up.

    The slope is Theil and Sen's, the median over all pairs of steps, times the number of steps, as
    a share of the median step. Where others use the machine its pace changes by more than that:
    `scaled` is the same with each step as a multiple of fixed work done right after it.
    """
    one_process()
    warm = STEADY_STEPS // 10
    worker = grpo_worker(folder, warm + STEADY_STEPS)
    worker.pool.wait_until_ready()
    spent, yardsticks, sizes, gaps = [], [], [], []
    began = cpu_s()

    def after(metrics: dict[str, float]) -> None:
        nonlocal began
        spent.append(cpu_s() - began)
        yardsticks.append(fixed_work())
        began = cpu_s()
        sizes.append(memory_of("VmRSS"))
        gaps.append(metrics["rl/sync_gap"])

    drive(worker, warm + STEADY_STEPS, after)
    worker.pool.close()
    steps, work = np.array(spent[warm:]), np.array(yardsticks[warm:])
    return {
        "cpu_s": float(np.median(steps)),
        "slope": change(steps),
        "scaled": change(steps / work),
        "grown": sizes[-1] - sizes[warm - 1],
        "gap": max(gaps),
    }


def change(values: np.ndarray) -> float:
    """What a robust line through them gains from end to end, as a share of the median."""
    first, second = np.triu_indices(len(values), 1)
    slope = np.median((values[second] - values[first]) / (second - first))
    return float(slope * len(values) / np.median(values))


def fixed_work() -> float:
    """CPU seconds of some Python and some small tensors, as a step is made of."""
    import torch

    began = time.process_time()
    total = 0
    for number in range(400_000):
        total += number & 7
    values = torch.ones(256, 256)
    for _ in range(200):
        values = (values @ values).clamp_(max=1.0)
    return time.process_time() - began


def checked(
    *,
    tokens: list[float],
    losses: list[float],
    norms: list[float],
    gaps: list[float],
    moved: float,
) -> dict[str, Any]:
    """Of a side's steps: all tokens there, losses finite, gradients, weights that moved.

    Raises:
        SystemExit: They are not, and there is nothing to compare.
    """
    wanted = PROMPTS * GROUP * COMPLETION_TOKENS
    if {round(each) for each in tokens} != {wanted}:
        raise SystemExit(f"{wanted} completion tokens wanted at every step, found {tokens}")
    if not all(map(math.isfinite, losses)) or not min(norms) > 0 or not moved:
        raise SystemExit(f"no training: losses {losses}, gradient norms {norms}, moved {moved}")
    return {"losses": losses, "norms": norms, "gap": max(gaps, default=0.0)}
