"""Trains the shipped student from scratch: `python -m pear_ray.embedded.automaton.train`.

A trunk learns plain solutions of both games, first with short recitals. The student is the trunk
after lessons full of slips: it knows every piece and is unreliable.
"""

import argparse
import functools
import hashlib
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pear_ray.embedded.automaton.generate import CORPUS_FILE, PROBLEM_SETS, Settings, write_data
from pear_ray.embedded.automaton.lessons import Phase, batches
from pear_ray.embedded.automaton.quality import measure
from pear_ray.embedded.automaton.tokenizer import build_tokenizer, write_tokenizer
from pear_ray.embedded.training import architecture, train, versions, write_model

BATCH_SIZE = 32
NUM_THREADS = 1
MAX_LENGTH = 256
EVALUATION_SEED = 90_001

PHASES = (
    Phase(name="table", num_steps=250, learning_rate=6e-3, slip=0.0, shortness=1.2, seed=1),
    Phase(name="lengths", num_steps=250, learning_rate=4e-3, slip=0.0, shortness=0.6, seed=2),
    Phase(name="slips", num_steps=100, learning_rate=1e-3, slip=0.22, shortness=0.6, seed=3),
)
INITIAL_STD = 0.1  # transformers' 0.02 is for wide models: with it this one learns next to nothing


def main() -> None:
    """Trains the student, makes the default data, and records both in quality.json."""
    parser = argparse.ArgumentParser(description="Train the student of the suffix game.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument(
        "--free", type=float, default=0.0, help="share of lessons whose recitals are of any letters"
    )
    parser.add_argument(
        "--shortness",
        type=float,
        help="of recitals, after the first phase: 0 for as many long ones as short ones",
    )
    given = parser.parse_args()
    output, phases = given.output, phases_of(free=given.free, shortness=given.shortness)
    torch.set_num_threads(NUM_THREADS)
    torch.manual_seed(0)
    start = time.monotonic()
    student = Qwen3ForCausalLM(_architecture())
    for phase in phases:
        train(
            student,
            batches(build_tokenizer(), phase, batch_size=BATCH_SIZE),
            name=phase.name,
            num_steps=phase.num_steps,
            learning_rate=phase.learning_rate,
        )
    train_s = time.monotonic() - start
    tokenizer_writer = functools.partial(write_tokenizer, max_length=MAX_LENGTH)
    write_model(student, output / "student", write_tokenizer=tokenizer_writer)
    write_data(output, Settings())
    report = quality_report(student, output, phases=phases, train_s=train_s)
    (output / "quality.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["problems"], indent=2))


def phases_of(*, free: float, shortness: float | None) -> tuple[Phase, ...]:
    """PHASES, from the second on for a student of free or of long recitals."""
    first, *later = PHASES
    return (
        first,
        *(
            replace(phase, free=free, shortness=phase.shortness if shortness is None else shortness)
            for phase in later
        ),
    )


def _architecture() -> Qwen3Config:
    return architecture(
        build_tokenizer(),
        num_heads=2,
        num_layers=2,
        max_length=MAX_LENGTH,
        initializer_range=INITIAL_STD,
    )


def quality_report(
    student: Qwen3ForCausalLM, output: Path, *, phases: tuple[Phase, ...], train_s: float
) -> dict[str, object]:
    """What was trained, how, how well it plays, and what else is shipped."""
    files = ("student/model.safetensors", CORPUS_FILE)
    return {
        "num_parameters": sum(parameter.numel() for parameter in student.parameters()),
        "sha256": {
            name: hashlib.sha256((output / name).read_bytes()).hexdigest() for name in files
        },
        "evaluation": {"seed": EVALUATION_SEED, "temperature": 1.0},
        "problems": {
            name: measure(student, output, name, seed=EVALUATION_SEED)
            for name in PROBLEM_SETS
            if name.startswith("heldout")
        },
        "phases": [asdict(phase) for phase in phases],
        "batch_size": BATCH_SIZE,
        "num_threads": NUM_THREADS,
        "train_s": round(train_s, 1),
        "versions": versions(),
    }


if __name__ == "__main__":
    main()
