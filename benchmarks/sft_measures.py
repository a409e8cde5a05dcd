"""What benchmarks/sft.py calls in processes of their own: our trainer, and TRL's, on one thread."""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

TRL_FOLDER = Path(__file__).parent / ".trl"
EPOCHS = 3  # the first warms up
# name: hidden, layers, heads, key-value heads, intermediate, vocabulary, rows, rows per batch
SHAPES = {
    "0.3M": (96, 3, 3, 3, 288, 272, 256, 32),
    "7M": (256, 6, 4, 4, 768, 4096, 96, 16),
    "135M": (576, 30, 9, 3, 1536, 49152, 8, 4),  # SmolLM2-135M's
}
MICROBATCH_ROWS = 4
LONGEST = 600
LEAST_PRODUCTS, PRODUCTS_S = 5, 0.5  # of one size
HEAD_SIZES = (4096, 151_936, 1024)  # tokens; Qwen3-0.6B's vocabulary and hidden size


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


def counted_tokens(shape: str) -> int:
    """Real tokens of the epochs that are timed, prompts included."""
    return (EPOCHS - 1) * sum(len(row["token_ids"]) for row in corpus(shape))


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


def pace_of_trl(folder: str, shape: str, packed: bool) -> dict[str, Any]:  # noqa: FBT001
    """TRL's tokens per CPU-second after the first epoch; packed, whether documents stay apart."""
    sys.path.insert(0, str(TRL_FOLDER))
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)

    class Clock(TrainerCallback):
        began = spent = 0.0

        def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if not self.began and state.epoch >= 1:
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
    model = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(Path(folder) / "model"),
        train_dataset=Dataset.from_list(rows),
        callbacks=[clock],
        args=SFTConfig(
            output_dir=str(Path(folder) / "trl"),
            num_train_epochs=EPOCHS,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            **batching(shape, packed=packed),
        ),
    )
    trainer.train()
    found = {
        "tokens_per_cpu_s": counted_tokens(shape) / clock.spent,
        "steps_per_epoch": trainer.state.global_step / EPOCHS,
        "attention": model.config._attn_implementation,  # noqa: SLF001 - where it is written
    }
    return found | ({"mixing": mixing(trainer)} if packed else {})


def batching(shape: str, *, packed: bool) -> dict[str, Any]:
    """How TRL makes batches: our rows per microbatch padded, or packs as long as the longest row.

    Packed, a step has as many packs as make about our number of steps.
    """
    rows_per_batch, num_rows = SHAPES[shape][7], SHAPES[shape][6]
    if not packed:
        return {
            "packing": False,
            "max_length": 1024,
            "per_device_train_batch_size": MICROBATCH_ROWS,
            "gradient_accumulation_steps": rows_per_batch // MICROBATCH_ROWS,
        }
    packs = -(-sum(len(row["token_ids"]) for row in corpus(shape)) // LONGEST)
    return {
        "packing": True,
        "packing_strategy": "bfd",  # best fit decreasing, TRL's default: rows stay whole
        "max_length": LONGEST,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": max(1, round(packs * rows_per_batch / num_rows)),
    }


def mixing(trainer: Any) -> float:
    """How much a pack's other documents move the last document's logits, at most."""
    import torch

    model = trainer.model.eval()
    for inputs in trainer.get_train_dataloader():
        starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
        if len(starts) > 1:
            break
    with torch.no_grad():
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        together = model(**inputs).logits[0, starts[-1] :]
        alone = model(inputs["input_ids"][:, starts[-1] :]).logits[0]
    return float((together - alone).abs().max())


def flops_share(folder: str, shape: str) -> dict[str, float]:
    """FLOP/s of our steps after the first epoch, and of matrix products before and after them."""
    one_process()
    before = matmul_peak(shape)
    each = worker(folder, shape, "pear")
    parameters = sum(p.numel() for p in each.trainer.module.parameters())
    began = 0.0
    for step in range(each.num_steps):
        if step == each.num_steps // EPOCHS:
            began = time.process_time()
        each.step(step)
    seconds = time.process_time() - began
    after = matmul_peak(shape)
    return {
        "flops_per_s": counted_flops(shape, parameters) / seconds,
        "before": before,
        "after": after,
        "parameters": parameters,
    }


def counted_flops(shape: str, parameters: int) -> float:
    """6 N tokens, and 12 x layers x hidden x seq x tokens of attention: seq is a row's length."""
    hidden, layers, *_ = SHAPES[shape]
    lengths = [len(row["token_ids"]) for row in corpus(shape)]
    attention = 12 * layers * hidden * sum(length * length for length in lengths)
    return (EPOCHS - 1) * (6.0 * parameters * sum(lengths) + attention)


def matmul_peak(shape: str) -> float:
    """FLOP/s of the fastest of the model's products, float32 on one thread, inputs in place.

    2,400 tokens (a microbatch) through attention's and the MLP's matrices, 256 (a chunk of
    log-probs) through the head.
    """
    import torch

    hidden, _, _, _, intermediate, vocabulary, *_ = SHAPES[shape]
    tokens = LONGEST * MICROBATCH_ROWS
    products = [
        (tokens, hidden, hidden),
        (tokens, hidden, intermediate),
        (tokens, intermediate, hidden),
        (256, hidden, vocabulary),
    ]
    best = 0.0
    for rows, inner, columns in products:
        left, right, out = (
            torch.rand(size) for size in ((rows, inner), (inner, columns), (rows, columns))
        )
        times = []
        while len(times) < LEAST_PRODUCTS or sum(times) < PRODUCTS_S:
            start = time.process_time()
            torch.mm(left, right, out=out)
            times.append(time.process_time() - start)
        best = max(best, 2.0 * rows * inner * columns / float(np.median(times)))
    return best


def head_of_ours() -> dict[str, float]:
    """`chosen_logprobs`, forward and backward."""
    from pear_ray.algorithms.logprobs import chosen_logprobs

    return head_peak(chosen_logprobs)


def head_of_torch() -> dict[str, float]:
    """The same by logits, their float32 log-softmax and a gather, all of it at once."""
    import torch

    def plain(hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        logits = hidden @ head.T
        return logits.float().log_softmax(-1).gather(1, ids[:, None])[:, 0]

    return head_peak(plain)


def head_peak(logprobs: Any) -> dict[str, float]:
    """Peak above the inputs and the head's gradient of log-probs, forward and backward.

    Before the base is read there are the head's weights, hidden states and ids, and the libraries
    have been used once. What is left above it and the head's gradient: logits, temporaries, the
    gradient of the hidden states, the log-probs.
    """
    import torch
    from processes import memory_of

    torch.set_num_threads(1)
    tokens, vocabulary, width = HEAD_SIZES
    warm = torch.rand(8, 4, requires_grad=True)
    logprobs(warm, torch.rand(16, 4), torch.arange(8)).sum().backward()
    torch.manual_seed(0)
    head = torch.randn(vocabulary, width).div_(width**0.5).requires_grad_()
    hidden = torch.randn(tokens, width).requires_grad_()
    ids = torch.randint(vocabulary, (tokens,))
    base, began = memory_of("VmRSS"), time.process_time()
    found = logprobs(hidden, head, ids)
    found.sum().backward()
    seconds, peak = time.process_time() - began, memory_of("VmHWM")
    return {
        "above": peak - base - 4 * head.numel(),
        "cpu_s": seconds,
        "sum": found.sum().item(),
        "gradient": head.grad.norm().item() + hidden.grad.norm().item(),
    }
