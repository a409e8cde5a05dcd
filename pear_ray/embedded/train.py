"""Trains the shipped models from scratch: `python -m pear_ray.embedded.train`.

A trunk learns the games in one style. The student is the trunk after lessons full of slips, so it
knows every piece and is unreliable; the teacher is the trunk after more clean lessons in two
styles.
"""

import argparse
import copy
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

from pear_ray.embedded import EMBEDDED_NAMES, embedded_path
from pear_ray.embedded.lessons import DEMO_GAME, LETTERS_GAME, WORDS_GAME, Phase, batches
from pear_ray.embedded.quality import measure
from pear_ray.embedded.tokenizer import END, PAD, build_tokenizer, write_tokenizer

BATCH_SIZE = 64
NUM_THREADS = 2
WARMUP_STEPS = 50
FINAL_LR_FRACTION = 0.1
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
    train(trunk, TRUNK)
    models = {}
    for phase in (STUDENT, TEACHER):
        models[phase.name] = copy.deepcopy(trunk)
        train(models[phase.name], phase)
        write_model(models[phase.name], output / phase.name)
    train_s = time.monotonic() - start
    report = quality_report(models, output, train_s=train_s)
    (output / "quality.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["models"], indent=2))


def _architecture() -> Qwen3Config:
    tokenizer = build_tokenizer()
    return Qwen3Config(
        vocab_size=math.ceil(tokenizer.get_vocab_size() / 16) * 16,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        intermediate_size=288,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
        dtype="float32",
    )


def train(model: Qwen3ForCausalLM, phase: Phase, *, log: Callable[[str], None] = print) -> None:
    """Runs one phase in place: AdamW, linear warm-up, cosine decay, completion tokens only."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    warmup = min(WARMUP_STEPS, phase.num_steps)

    def lr_factor(step: int) -> float:
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / phase.num_steps)
        return min(1.0, (step + 1) / warmup) * max(FINAL_LR_FRACTION, cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    model.train()
    start = time.monotonic()
    stream = batches(build_tokenizer(), phase, batch_size=BATCH_SIZE)
    for step, (token_ids, labels) in zip(range(1, phase.num_steps + 1), stream, strict=False):
        logits = model(input_ids=token_ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == phase.num_steps:
            elapsed_s = time.monotonic() - start
            log(f"{phase.name} {step}/{phase.num_steps} loss {loss:.4f} {elapsed_s:.0f} s")
    model.eval()


def write_model(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Writes weights, configs and tokenizer as one Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    generation = {
        "eos_token_id": model.config.eos_token_id,
        "pad_token_id": model.config.pad_token_id,
    }
    # Nothing about sampling: a top-k written here would silently become the engine's default.
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_tokenizer(folder, max_length=MAX_LENGTH)


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
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "models": measured,
    }


if __name__ == "__main__":
    main()
