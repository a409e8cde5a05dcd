"""A study's runs, packed two at a time, against the same runs one after another by `pear run`.

Both take the corpus and its scores from the same folder, and make SFT, RL and evaluation.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from record import Figure, write_figures

ROOT = Path(__file__).parents[1]
GOAL = 1.8
SEEDS = (1, 2, 3)
ALONE = 2  # runs that are made by `pear run`; the others would take as long
OVERRIDES = {
    "rl.save_rollouts_every": 0,
    "evaluate.checkpoints": ["sft", "rl"],
    "cluster": {"num_trainers": 1, "num_samplers": 1},
}


def main() -> None:
    """Measure both and write the figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shared = pear(folder, "study", str(study(folder, "first", arms=1, seeds=SEEDS[:1])))
        packed_s = pear(folder, "study", str(study(folder, "packed", arms=2, seeds=SEEDS)))
        runs = sorted((folder / "outputs" / "packed" / "runs").iterdir())
        alone_s = sum(
            pear(
                folder,
                "run",
                str(run / "config.yaml"),
                f"output_dir={folder}/alone",
                "--reuse",
                f"{folder}/outputs/packed/shared",
            )
            for run in runs[:ALONE]
        )
    each_s = alone_s / ALONE
    ratio = each_s * len(runs) / packed_s
    write_figures(
        "study",
        [
            Figure(
                name="one run by `pear run`, corpus and scores taken over", value=each_s, unit="s"
            ),
            Figure(name="a study of one run, with corpus and scores", value=shared, unit="s"),
            Figure(
                name=f"a study of {len(runs)} runs, with corpus and scores",
                value=packed_s,
                unit="s",
                reference=f"{len(runs)} times `pear run`",
                ratio=ratio,
                goal=f"{GOAL}x as fast",
                holds=ratio >= GOAL,
            ),
        ],
    )


def study(folder: Path, name: str, *, arms: int, seeds: tuple[int, ...]) -> Path:
    """A study file of so many arms and seeds."""
    known = [
        {"name": "sft", "overrides": {"sft.weights": "uniform"}},
        {"name": "dft", "overrides": {"sft.weights": "uniform", "sft.objective": "dft"}},
    ]
    tree = {
        "name": name,
        "base": str(ROOT / "jobs" / "runs" / "suffix.yaml"),
        "overrides": OVERRIDES,
        "arms": known[:arms],
        "seeds": [*seeds],
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def pear(folder: Path, *arguments: str) -> float:
    """Seconds of a `pear` command in `folder`."""
    began = time.monotonic()
    command = [sys.executable, "-m", "pear_ray", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False, text=True)
    if done.returncode:
        raise SystemExit(f"pear {' '.join(arguments)} failed: {done.stderr[-3000:]}")
    return time.monotonic() - began


if __name__ == "__main__":
    main()
