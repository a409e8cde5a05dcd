"""A long run of the demo's RL through Ray Train, for benchmarks/rl.py: memory, times, gaps."""

import statistics
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from rl_measures import PROBLEMS, SOAK_STEPS

EARLY, WINDOW = 50, 100  # steps
LOOK_S = 0.5
DEMO = Path(__file__).parents[1] / "jobs" / "runs" / "demo.yaml"


def soak(folder: str) -> dict[str, float]:
    """Memory of the worker early and late, in bytes; steps' times and gaps."""
    from pear_ray.config.run import validate_run
    from pear_ray.distributed.rl_loop import rl_loop
    from pear_ray.distributed.session import ray_session
    from pear_ray.distributed.train_group import run_train_group
    from pear_ray.telemetry.metrics_log import latest_by_step, read_metrics

    run_dir = Path(folder) / "soak"
    (run_dir / "rl").mkdir(parents=True)
    tree = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    tree["rl"] |= {
        "num_steps": SOAK_STEPS,
        "prompts_per_step": 8,
        "max_tokens": 64,
        "problems": PROBLEMS,
        # YAML 1.1 takes 1e-4 for text.
        "optimizer": {"learning_rate": 1e-4},
    }
    tree["sft"]["optimizer"] = {"learning_rate": 1e-3}
    config = validate_run(tree, origin="benchmark")
    job = {
        "config": config,
        "run_dir": run_dir,
        "attempt": 1,
        "model": (Path(folder) / "model").resolve(),
    }
    file = run_dir / "metrics.jsonl"
    sizes: dict[int, int] = {}
    done = threading.Event()
    watcher = threading.Thread(target=watch, args=(file, sizes, done), daemon=True)
    watcher.start()
    with ray_session(config.cluster):
        run_train_group(rl_loop, job, cluster=config.cluster, stage_dir=run_dir / "rl")
    done.set()
    watcher.join()
    steps = [each.metrics for each in latest_by_step(read_metrics(file), "rl") if each.step]
    if len(steps) != SOAK_STEPS:
        raise SystemExit(f"{SOAK_STEPS} steps wanted, {len(steps)} found")
    times = [each["time/step_s"] for each in steps]
    return {
        "early": sizes[min(step for step in sizes if step >= EARLY)],
        "late": sizes[max(sizes)],
        "early_s": statistics.median(times[EARLY : EARLY + WINDOW]),
        "late_s": statistics.median(times[-WINDOW:]),
        "gap": max(each["rl/sync_gap"] for each in steps),
        "mean_gap": max(each["rl/mismatch/mean_gap"] for each in steps),
    }


def watch(file: Path, sizes: dict[int, int], done: threading.Event) -> None:
    """Note the size of the largest process below this one, the worker, by the step it has done."""
    while not done.is_set():
        time.sleep(LOOK_S)
        if file.exists():
            step = file.read_bytes().count(b'"step"')
            if found := [size for size in map(resident, below()) if size]:
                sizes.setdefault(step, max(found))


def below() -> list[psutil.Process]:
    """All processes that this one has started, and theirs."""
    return psutil.Process().children(recursive=True)


def resident(process: Any) -> int:
    """Resident bytes; 0 of one that has ended."""
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
