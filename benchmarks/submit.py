"""What a submitted job costs beside its stages: its start, the gaps between stages, its marks.

On a head of this machine with token authentication, as `pear submit` meets it on a cluster.
"""

import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))
sys.path.insert(0, str(Path(__file__).parent))
from ray_head import Head, ray_head
from record import Figure, write_parts

from pear_ray.telemetry.metrics_log import EventKind, EventRecord, read_metrics

ROOT = Path(__file__).parents[1]
RUN_FILE = "jobs/runs/suffix.yaml"
SMALL = ("rl.num_steps=2", "evaluate.num_samples=8", "sft.num_epochs=1")
STARTS = 3
START_GOAL_S = 20.0
RUN_S = 600.0  # what the overhead is to be small beside
OVERHEAD_GOAL = 0.03
MARKED_STEPS = 400
SMALL_STEP_MS = 50.0  # of SFT on the embedded student: the shortest there is
MARKS_GOAL = 0.01


def start() -> list[Figure]:
    """From the command to the first stage's line, and what a whole run spends between stages."""
    with tempfile.TemporaryDirectory() as folder, ray_head() as head:
        head.environment["PYTHONPATH"] = str(ROOT)
        seconds = [first_line_s(head, Path(folder), number) for number in range(STARTS)]
        overhead_s, whole_s = whole_run(head, Path(folder))
    median = statistics.median(seconds)
    spread = f"median of {STARTS}, {min(seconds):.1f} to {max(seconds):.1f}"
    return [
        Figure(
            name=f"start: `pear submit` to the first stage's line ({spread})",
            value=median,
            unit="s",
            goal=f"under {START_GOAL_S:.0f} s",
            holds=median < START_GOAL_S,
        ),
        Figure(
            name=f"start: outside of stages, in a submitted run of {whole_s:.0f} s",
            value=overhead_s,
            unit="s",
            reference=f"a run of {RUN_S:.0f} s",
            ratio=overhead_s / RUN_S,
            goal=f"under {OVERHEAD_GOAL:.0%}",
            holds=overhead_s / RUN_S < OVERHEAD_GOAL,
        ),
    ]


def first_line_s(head: Head, folder: Path, number: int) -> float:
    """Of a job that is stopped then."""
    began = time.monotonic()
    name = f"start{number}"
    client = head.start("submit", RUN_FILE, f"output_dir={folder}", f"name={name}", "--follow")
    text = ""
    for line in client.stdout or ():
        text += line
        if re.search("collect started", line):
            break
    else:
        raise SystemExit(f"the job ended before its first stage: {text}")
    seconds = time.monotonic() - began
    head.run_all(["stop", name])
    client.communicate()
    return seconds


def whole_run(head: Head, folder: Path) -> tuple[float, float]:
    """Seconds of a job outside of its stages, and of all of it."""
    client = head.start("submit", RUN_FILE, f"output_dir={folder}", *SMALL, "--follow")
    text = client.communicate()[0]
    if client.returncode:
        raise SystemExit(f"the run failed: {text[-3000:]}")
    whole_s = job_seconds(text)
    return whole_s - stage_seconds(folder / "suffix"), whole_s


def job_seconds(text: str) -> float:
    """How long the job took, as `pear submit` says at its end."""
    took = re.search(r"done after (?:(\d+) min )?(\d+) s", text)
    if took is None:
        raise SystemExit(f"no end in {text[-1000:]}")
    return 60.0 * int(took[1] or 0) + int(took[2])


def stage_seconds(run_dir: Path) -> float:
    """Of all stages together."""
    began: dict[str, float] = {}
    total = 0.0
    for record in read_metrics(run_dir / "metrics.jsonl"):
        if not isinstance(record, EventRecord):
            continue
        if record.event is EventKind.STAGE_STARTED:
            began[record.stage] = record.time
        elif record.event is EventKind.STAGE_FINISHED:
            total += record.time - began[record.stage]
    return total


def marks() -> list[Figure]:
    """What the driver spends on the job page's view of a step: its mark, and the word of it."""
    import ray

    from pear_ray.distributed.job_page import job_page
    from pear_ray.telemetry.follow import ProgressState
    from pear_ray.telemetry.metrics_log import MetricRecord

    ray.init("local", include_dashboard=False, log_to_driver=False, num_cpus=1)
    state = ProgressState()
    with job_page("bench") as page:
        state.fold(MetricRecord(0.0, "bench", "rl", 1, 1, 1, {}))
        page.show(state)
        time.sleep(2)
        began, cpu = time.perf_counter(), time.process_time()
        for step in range(1, MARKED_STEPS + 1):
            state.fold(MetricRecord(float(step), "bench", "sft", 1, step, MARKED_STEPS, {}))
            page.show(state)
        passed = 1000 * (time.perf_counter() - began) / MARKED_STEPS
        spent = 1000 * (time.process_time() - cpu) / MARKED_STEPS
    ray.shutdown()
    return [
        Figure(name="marks: a step's mark, in the driver", value=passed, unit="ms"),
        Figure(
            name="marks: the same, CPU",
            value=spent,
            unit="ms",
            reference=f"a step of {SMALL_STEP_MS:.0f} ms",
            ratio=spent / SMALL_STEP_MS,
            goal=f"under {MARKS_GOAL:.0%}",
            holds=spent / SMALL_STEP_MS < MARKS_GOAL,
        ),
    ]


if __name__ == "__main__":
    write_parts("submit", {"start": start, "marks": marks})
