"""The demo run from start to report in a fresh folder: wall time, memory, its own figures."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from record import Figure, write_figures

ROOT = Path(__file__).parents[1]
GOAL_WALL_S, GOAL_GIB, GOAL_FIRST_SCORE_S, GOAL_SYNC, GOAL_GAP = 600, 8, 60, 0.05, 1e-5


def main() -> None:
    """Run the demo and write the figures."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        peak_gib = run_and_watch(folder)
        wall_s = time.time() - began
        run_dir = Path(folder) / "demo"
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        results = json.loads((run_dir / "evaluate" / "results.json").read_text(encoding="utf-8"))
    first_s = min(r["time"] for r in records if "metrics" in r) - began
    # Step 0 is the look before training.
    steps = [r["metrics"] for r in records if r.get("step") and r["stage"] == "rl"]
    sync = sum(s["time/sync_s"] for s in steps) / sum(s["time/step_s"] for s in steps)
    mean_gap = max(s["rl/mismatch/mean_gap"] for s in steps)
    largest_gap = max(s["rl/mismatch/max_gap"] for s in steps)
    write_figures(
        "demo",
        [
            goal("demo, start to report", wall_s, "s", GOAL_WALL_S),
            goal("peak memory of all its processes (sum of PSS)", peak_gib, "GiB", GOAL_GIB),
            goal("start to first scored completions", first_s, "s", GOAL_FIRST_SCORE_S),
            goal("weight sync and canary, share of a GRPO step", sync, "fraction", GOAL_SYNC),
            goal("engine-trainer gap, mean over tokens, worst step", mean_gap, "nats", GOAL_GAP),
            goal("engine-trainer gap, worst token of any step", largest_gap, "nats", GOAL_GAP),
            *(outcome(each) for each in results["suites"][0]["checkpoints"]),
        ],
    )


def run_and_watch(folder: str) -> float:
    """Run the demo into `folder`; the peak memory of it and all its processes, in GiB."""
    command = [
        sys.executable,
        "-m",
        "pear_ray",
        "run",
        "jobs/runs/demo.yaml",
        f"output_dir={folder}",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    session = psutil.Process(process.pid)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(proportional_bytes, family(session))))
        time.sleep(2)
    if process.returncode:
        raise SystemExit(f"the demo failed with exit code {process.returncode}")
    return peak / 2**30


def family(session: psutil.Process) -> list[psutil.Process]:
    """The process and all its descendants."""
    try:
        return [session, *session.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def proportional_bytes(process: psutil.Process) -> int:
    """Memory of one process, what it shares counted by its share."""
    try:
        return process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def goal(name: str, value: float, unit: str, most: float) -> Figure:
    """A figure that should be at most `most`."""
    return Figure(
        name=name, value=value, unit=unit, goal=f"at most {most:g} {unit}", holds=value <= most
    )


def outcome(checkpoint: dict[str, Any]) -> Figure:
    """pass@1 of a checkpoint, with everything else in its name."""
    at_1, at_8 = checkpoint["metrics"]["pass_at_1"], checkpoint["metrics"]["pass_at_8"]
    spans = [f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]" for e in (at_1, at_8)]
    name = f"{checkpoint['checkpoint']}: pass@1 {spans[0]}, pass@8 {spans[1]}"
    return Figure(name=name, value=at_1["value"], unit="pass@1")


if __name__ == "__main__":
    main()
