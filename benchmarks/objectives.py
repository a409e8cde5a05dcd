"""One SFT run per objective, and plain SFT under each PEAR weighting, on one scored corpus.

    python benchmarks/objectives.py OUT_DIR               # the corpus and every arm, one by one
    python benchmarks/objectives.py OUT_DIR corpus        # only the corpus, with its scores
    python benchmarks/objectives.py OUT_DIR dft pear-block  # only these arms
    pear compare OUT_DIR/arms/* --out OUT_DIR/compare.html

The corpus is collected and scored once; arms take it over (`--reuse`). One seed per arm: this shows
curves, it ranks nothing.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import get_args

from pear_ray.config.objectives import ObjectiveConfig

ROOT = Path(__file__).parents[1]
CORPUS = "corpus"
KL_CANDIDATES = 20  # that score.top_k keeps for forward_kl
# Of every arm and of the corpus: a setting that differed would be another corpus.
SHARED = [
    f"score.top_k={KL_CANDIDATES}",
    "sft.num_epochs=8",
    "sft.heldout_rows=96",
    "sft.evaluate_every=5",
    "sft.checkpoint_every=200",
]
UNIFORM = "sft.weights={kind: uniform}"
OBJECTIVES = [each.model_fields["kind"].default for each in get_args(get_args(ObjectiveConfig)[0])]
ARMS = {name: [UNIFORM, f"sft.objective={name}"] for name in OBJECTIVES} | {
    "pear-token": ["sft.weights={kind: pear, level: token}"],
    "pear-block": ["sft.weights={kind: pear, level: block}"],
    "pear-sequence": ["sft.weights={kind: pear, level: sequence}"],
    "pear-token-init": ["sft.weights={kind: pear, level: token, ratio_policy: init}"],
    "pear-token-ema": [
        "sft.weights={kind: pear, level: token, ratio_policy: ema}",
        "sft.ema_decay=0.95",
    ],
}


def main() -> None:
    """Make what was asked for; what is complete and current is passed over."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"corpus, {', '.join(ARMS)}; or all")
    parser.add_argument("--run-file", type=Path, default=ROOT / "jobs" / "runs" / "demo.yaml")
    asked = parser.parse_args()
    if unknown := set(asked.arms) - {CORPUS, *ARMS}:
        parser.error(f"unknown arms: {', '.join(sorted(unknown))}; use {', '.join(ARMS)}")
    out_dir = asked.out_dir.resolve()
    for arm in asked.arms or [CORPUS, *ARMS]:
        if arm == CORPUS:
            for stage in ("collect", "score"):
                pear(asked.run_file, stage, f"name={CORPUS}", f"output_dir={out_dir}")
        else:
            own = [f"name={arm}", f"output_dir={out_dir / 'arms'}", *ARMS[arm]]
            pear(asked.run_file, "sft", *own, "--reuse", str(out_dir / CORPUS))


def pear(run_file: Path, stage: str, *arguments: str) -> None:
    """Run one stage in a process of its own; ends here where it fails."""
    command = [sys.executable, "-m", "pear_ray", stage, str(run_file), *SHARED, *arguments]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"{arguments[0]}: {stage} ended with exit code {done.returncode}")


if __name__ == "__main__":
    main()
