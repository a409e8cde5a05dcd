"""SFT: what PEAR costs beside plain SFT, and our pace beside TRL's SFTTrainer.

`python benchmarks/sft.py` does both (minutes on two cores); with `pear` or `trl` only that one.
TRL is no dependency of ours: it is installed, without its dependencies, into benchmarks/.trl.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from processes import in_process
from record import Figure, write_parts

TRL = ["trl==1.16.0", "accelerate==1.15.0"]
TRL_FOLDER = Path(__file__).parent / ".trl"
EPOCHS = 3  # the first warms up
GOAL_OVERHEAD, GOAL_MEMORY, GOAL_SMALL, GOAL_LARGE = 0.98, 1.03, 1.5, 1.0
# name: hidden, layers, heads, key-value heads, intermediate, vocabulary, rows, rows per batch
SHAPES = {
    "0.3M": (96, 3, 3, 3, 288, 272, 256, 32),
    "7M": (256, 6, 4, 4, 768, 4096, 96, 16),
    "135M": (576, 30, 9, 3, 1536, 49152, 8, 4),  # SmolLM2-135M's
}
GOALS = {"0.3M": GOAL_SMALL, "7M": GOAL_SMALL, "135M": GOAL_LARGE}
MICROBATCH_ROWS = 4


def main() -> None:
    """Measure what is asked for, and write the figures."""
    write_parts("sft", {"pear": pear, "trl": trl})


def pear() -> list[Figure]:
    """Tokens per CPU-second and peak memory of PEAR beside plain SFT, on the 7M model."""
    with tempfile.TemporaryDirectory() as folder:
        make_model("7M", Path(folder))
        both = in_worker("paces_of_both", folder, "7M")
        peaks = {kind: in_worker("peak_of", folder, "7M", kind) for kind in ("uniform", "pear")}
    ratio = both["pear"] / both["uniform"]
    memory = peaks["pear"]["mib"] / peaks["uniform"]["mib"]
    return [
        Figure(
            name="pear: live token weights, 7M model, steps of both by turns",
            value=both["pear"],
            unit="tokens/CPU-s",
            reference=f"our uniform SFT: {both['uniform']:,.0f} tokens/CPU-s",
            ratio=ratio,
            goal=f"at least {GOAL_OVERHEAD:g}",
            holds=ratio >= GOAL_OVERHEAD,
        ),
        Figure(
            name="pear: peak memory of the process",
            value=peaks["pear"]["mib"],
            unit="MiB",
            reference=f"our uniform SFT: {peaks['uniform']['mib']:,.0f} MiB",
            ratio=memory,
            goal=f"at most {GOAL_MEMORY:g}",
            holds=memory <= GOAL_MEMORY,
        ),
    ]


def trl() -> list[Figure]:
    """Real tokens per CPU-second beside TRL's SFTTrainer: same rows, batches, threads, AdamW."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
    if not TRL_FOLDER.exists():
        subprocess.run([*install, str(TRL_FOLDER), *TRL], check=True)
    figures = []
    for shape, goal in GOALS.items():
        with tempfile.TemporaryDirectory() as folder:
            make_model(shape, Path(folder))
            before = in_worker("pace_of_trl", folder, shape)["tokens_per_cpu_s"]
            ours = in_worker("pace_of_ours", folder, shape)["tokens_per_cpu_s"]
            after = in_worker("pace_of_trl", folder, shape)["tokens_per_cpu_s"]
        theirs = (before + after) / 2  # on both sides: a shared machine's pace drifts
        figures.append(
            Figure(
                name=f"trl: {shape} model, PEAR, rows padded to their microbatch",
                value=ours,
                unit="tokens/CPU-s",
                reference=f"TRL {TRL[0].partition('==')[2]} SFTTrainer, plain SFT, padded: "
                f"{before:,.0f} before and {after:,.0f} tokens/CPU-s after",
                ratio=ours / theirs,
                goal=f"at least {goal:g}",
                holds=ours / theirs >= goal,
            )
        )
    return figures


def make_model(shape: str, folder: Path) -> None:
    """A random model of `shape` with the embedded tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from pear_ray.embedded.paths import embedded_path

    hidden, layers, heads, kv_heads, intermediate, vocabulary, *_ = SHAPES[shape]
    config = Qwen3Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=257,
        pad_token_id=256,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(embedded_path("student")).save_pretrained(folder / "model")


def corpus(shape: str) -> list[dict[str, Any]]:
    """Rows of 30 to 600 tokens, a fifth of each a prompt; lengths spread as corpora's are."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(SHAPES[shape][6]):
        length = int(np.clip(generator.lognormal(4.7, 0.7), 30, 600))
        prompt = length // 5
        rows.append(
            {
                "example_id": f"row-{number:04d}",
                "source": "benchmark",
                "is_negative": False,
                "token_ids": generator.integers(5, 250, size=length).tolist(),
                "loss_mask": [False] * prompt + [True] * (length - prompt),
                "behavior_logprobs": (-3 * generator.random(length)).tolist(),
            }
        )
    return rows


def worker(folder: str, shape: str, kind: str) -> Any:
    """An SFT worker of ours in this process, on one thread."""
    from pear_ray.artifacts.tables import SCORED, write_rows
    from pear_ray.config.run import validate_run
    from pear_ray.distributed.sft_loop import SftWorker, TrainJob

    run_dir = Path(folder) / kind
    (run_dir / "score" / "scored").mkdir(parents=True, exist_ok=True)
    (run_dir / "sft").mkdir(exist_ok=True)
    rows = corpus(shape)
    write_rows(run_dir / "score" / "scored" / "rows.parquet", rows, SCORED)
    game = {"games": [{"name": "chain_sum"}], "size": 8}
    optimizer = {"learning_rate": 1e-4, "warmup_fraction": 0.0}
    config = validate_run(
        {
            "name": kind,
            "models": {"policy": "unused", "behavior": "unused", "dtype": "float32"},
            "corpus": {"kind": "dataset", "path": "unused"},
            "sft": {
                "optimizer": optimizer,
                "weights": {"kind": kind},
                "num_epochs": EPOCHS,
                "global_batch_size": SHAPES[shape][7],
                "microbatch_tokens": 600 * MICROBATCH_ROWS,
                "backend": {"kind": "ddp"},
            },
            "rl": {"problems": game, "optimizer": optimizer, "num_steps": 1},
            "evaluate": {"problems": game},
            "cluster": {"num_trainers": 1},
        },
        origin="benchmark",
    )
    job = TrainJob(config=config, run_dir=run_dir, attempt=1, model=Path(folder) / "model")
    return SftWorker(job)


def one_process() -> None:
    """A process group of this process alone, on one thread."""
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1
    )


def paces_of_both(folder: str, shape: str) -> dict[str, float]:
    """Tokens per CPU-second of PEAR and of plain SFT, a step of one after a step of the other."""
    one_process()
    workers = {kind: worker(folder, shape, kind) for kind in ("uniform", "pear")}
    spent = dict.fromkeys(workers, 0.0)
    steps = workers["pear"].num_steps
    for step in range(steps):
        for kind, each in workers.items():
            began = time.process_time()
            each.step(step)
            if step >= steps // EPOCHS:
                spent[kind] += time.process_time() - began
    return {kind: counted_tokens(shape) / seconds for kind, seconds in spent.items()}


def peak_of(folder: str, shape: str, kind: str) -> dict[str, float]:
    """Largest resident memory of a process that trains for an epoch."""
    import resource

    one_process()
    each = worker(folder, shape, kind)
    for step in range(each.num_steps // EPOCHS):
        each.step(step)
    return {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def pace_of_ours(folder: str, shape: str) -> dict[str, float]:
    """Our tokens per CPU-second after the first epoch."""
    one_process()
    each = worker(folder, shape, "pear")
    began = 0.0
    for step in range(each.num_steps):
        if step == each.num_steps // EPOCHS:
            began = time.process_time()
        each.step(step)
    return {"tokens_per_cpu_s": counted_tokens(shape) / (time.process_time() - began)}


def pace_of_trl(folder: str, shape: str) -> dict[str, float]:
    """TRL's tokens per CPU-second after the first epoch."""
    sys.path.insert(0, str(TRL_FOLDER))
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    batch = SHAPES[shape][7]
    steps = SHAPES[shape][6] // batch

    class Clock(TrainerCallback):
        began = spent = 0.0

        def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step == steps:
                self.began = time.process_time()

        def on_step_end(self, *_args: Any, **_: Any) -> None:
            self.spent = time.process_time() - self.began

    clock = Clock()
    rows = [
        {
            "input_ids": row["token_ids"],
            "completion_mask": [int(trains) for trains in row["loss_mask"]],
        }
        for row in corpus(shape)
    ]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(Path(folder) / "model"),
        train_dataset=Dataset.from_list(rows),
        callbacks=[clock],
        args=SFTConfig(
            output_dir=str(Path(folder) / "trl"),
            per_device_train_batch_size=MICROBATCH_ROWS,
            gradient_accumulation_steps=batch // MICROBATCH_ROWS,
            num_train_epochs=EPOCHS,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            max_length=1024,
            packing=False,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        ),
    )
    trainer.train()
    return {"tokens_per_cpu_s": counted_tokens(shape) / clock.spent}


def counted_tokens(shape: str) -> int:
    """Real tokens of the epochs that are timed, prompts included."""
    return (EPOCHS - 1) * sum(len(row["token_ids"]) for row in corpus(shape))


def in_worker(task: str, *arguments: Any) -> Any:
    """Call a function of this module in a fresh process with a training worker's environment."""
    from pear_ray.engines.environment import engine_environment

    environ = engine_environment(device="cpu", num_threads=1, kv_cache_gib=1)
    return in_process(f"sft.{task}", *arguments, environ=environ)


if __name__ == "__main__":
    main()
