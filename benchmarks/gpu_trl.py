"""TRL's GRPOTrainer for benchmarks/gpu.py: the step of gpu_measures.rl, with vLLM colocated."""

import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from gpu_measures import (
    COMPLETION_TOKENS,
    GIB,
    PROMPTS,
    SAMPLES,
    coin,
    model_of,
    questions,
)
from sft_measures import TRL_FOLDER

MICROBATCH = 16  # sequences
TRL_STEPS = 4


def trl(folder: str) -> dict[str, float]:
    """Seconds of a step, the median of three after one, and the most memory that it took."""
    sys.path.insert(0, str(TRL_FOLDER))
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    ends = list[float]()

    class Clock(TrainerCallback):
        def on_train_begin(self, *_args: Any, **_: Any) -> None:
            self.mark()

        def on_step_end(self, *_args: Any, **_: Any) -> None:
            self.mark()

        def mark(self) -> None:
            torch.cuda.synchronize()
            ends.append(time.perf_counter())

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(coin(None, each[0]["content"])) for each in completions]

    prompts = [{"prompt": [{"role": "user", "content": each}]} for each in questions()]
    model = AutoModelForCausalLM.from_pretrained(model_of(folder), dtype=torch.float32)
    trainer = GRPOTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(model_of(folder)),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(prompts),
        callbacks=[Clock()],
        args=trl_config(folder),
    )
    trainer.train()
    logs = [each for each in trainer.state.log_history if "loss" in each]
    seconds = [end - start for start, end in itertools.pairwise(ends)]
    return {
        "step_s": statistics.median(seconds[1:]),
        "first_step_s": seconds[0],
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "tokens": logs[-1]["completions/mean_length"] * PROMPTS * SAMPLES,
    }


def trl_config(folder: str) -> Any:
    """TRL's settings of the step that ours takes: float32 weights, bfloat16 products."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(Path(folder) / "trl"),
        max_steps=TRL_STEPS,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        per_device_train_batch_size=MICROBATCH,
        gradient_accumulation_steps=PROMPTS * SAMPLES // MICROBATCH,
        num_generations=SAMPLES,
        max_completion_length=COMPLETION_TOKENS,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.6,
        vllm_max_model_length=2048,
        vllm_enable_sleep_mode=True,
        beta=0.0,  # no KL, no reference
        bf16=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
