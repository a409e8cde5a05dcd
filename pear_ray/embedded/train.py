"""Trains the shipped models from scratch: `python -m pear_ray.embedded.train`.

A trunk learns the games in one style. The student is the trunk after lessons full of slips, so it
knows every piece and is unreliable; the teacher is the trunk after more clean lessons in two
styles.
"""

import argparse
import copy
import functools
import hashlib
import json
import time
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pear_ray.embedded import EMBEDDED_NAMES, embedded_path
from pear_ray.embedded.lessons import DEMO_GAME, LETTERS_GAME, WORDS_GAME, Phase, batches
from pear_ray.embedded.quality import measure
from pear_ray.embedded.tokenizer import build_tokenizer, write_tokenizer
from pear_ray.embedded.training import architecture, train, versions, write_model

BATCH_SIZE = 64
NUM_THREADS = 2
MAX_LENGTH = 256
EVALUATION_SEED = 90_001
EVALUATION_PROBLEMS = 200

TRUNK = Phase(name="trunk", num_steps=900, learning_rate=3e-3, letters_share=0.0, slip=0.0, seed=1)
STUDENT = Phase(
    name="student", num_steps=250, learning_rate=1e-3, letters_share=0.0, slip=0.45, seed=2
)
TEACHER = Phase(
    name="teacher", num_steps=600, learning_rate=2e-3, letters_share=0.5, slip=0.0, seed=3
)


def main() -> None:
    """Trains, writes both folders, measures them and records it all in quality.json."""
    parser = argparse.ArgumentParser(description="Train the embedded student and teacher.")
    parser.add_argument("--output", type=Path, default=embedded_path("student").parent)
    output = parser.parse_args().output
    torch.set_num_threads(NUM_THREADS)
    torch.manual_seed(0)
    start = time.monotonic()
    trunk = Qwen3ForCausalLM(_architecture())
    _train(trunk, TRUNK)
    models = {}
    tokenizer_writer = functools.partial(write_tokenizer, max_length=MAX_LENGTH)
    for phase in (STUDENT, TEACHER):
        models[phase.name] = copy.deepcopy(trunk)
        _train(models[phase.name], phase)
        folder = output / phase.name
        write_model(models[phase.name], folder, write_tokenizer=tokenizer_writer)
    train_s = time.monotonic() - start
    report = quality_report(models, output, train_s=train_s)
    (output / "quality.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["models"], indent=2))


def _architecture() -> Qwen3Config:
    return architecture(
        build_tokenizer(),
        num_heads=3,
        num_layers=3,
        max_length=MAX_LENGTH,
    )


def _train(model: Qwen3ForCausalLM, phase: Phase) -> None:
    train(
        model,
        batches(build_tokenizer(), phase, batch_size=BATCH_SIZE),
        name=phase.name,
        num_steps=phase.num_steps,
        learning_rate=phase.learning_rate,
    )


def quality_report(
    models: dict[str, Qwen3ForCausalLM], output: Path, *, train_s: float
) -> dict[str, object]:
    """What was trained, how, and how well it plays each game on held-out problems."""
    games = (DEMO_GAME, WORDS_GAME, LETTERS_GAME)
    measured = {}
    for name in EMBEDDED_NAMES:
        weights = (output / name / "model.safetensors").read_bytes()
        measured[name] = {
            "num_parameters": sum(p.numel() for p in models[name].parameters()),
            "sha256": hashlib.sha256(weights).hexdigest(),
            "games": {
                game.name: measure(
                    models[name],
                    output / name,
                    game,
                    num_problems=EVALUATION_PROBLEMS,
                    seed=EVALUATION_SEED,
                )
                for game in games
            },
        }
    return {
        "games": {game.name: game.params for game in games},
        "evaluation": {
            "seed": EVALUATION_SEED,
            "num_problems": EVALUATION_PROBLEMS,
            "temperature": 1.0,
        },
        "phases": [
            {field: getattr(phase, field) for field in Phase.__dataclass_fields__}
            for phase in (TRUNK, STUDENT, TEACHER)
        ],
        "batch_size": BATCH_SIZE,
        "num_threads": NUM_THREADS,
        "train_s": round(train_s, 1),
        "versions": versions(),
        "models": measured,
    }


if __name__ == "__main__":
    main()
