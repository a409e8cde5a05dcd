"""TRL's GRPOTrainer for benchmarks/rl.py: with vLLM colocated, and with transformers' generation.

TRL 1.16 does not run vLLM colocated on a CPU as it is. `mend_for_cpu` is all that is changed.
"""

import functools
import sys
from pathlib import Path
from typing import Any

from rl_measures import (
    COMPLETION_TOKENS,
    GROUP,
    LEARNING_RATE,
    MAX_MODEL_LEN,
    PROBLEMS,
    PROMPTS,
    TIMED,
    WARM_UP,
    Meter,
    checked,
    fingerprint,
    share_of_digits,
)
from sft_measures import TRL_FOLDER


def mend_for_cpu() -> None:
    """What TRL's colocated vLLM needs on a CPU, and no more.

    - The engine's dtype: TRL names none, and vLLM takes bfloat16 for float32 weights.
    - Weight sync: TRL loads tensors into the engine's modules as they are. On CPU these hold
      prepacked copies and empty parameters; vLLM's own layerwise reload goes around TRL's loop.
      The tied head's copy is packed again, which vLLM 0.32 forgets.
    """
    from trl.generation import vllm_generation
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    from pear_ray.engines.vllm.weights import packed_heads, repack_heads

    vllm_generation.LLM = functools.partial(vllm_generation.LLM, dtype="float32")
    sync = vllm_generation.VLLMGeneration.sync_weights

    def sync_weights(self: Any) -> None:
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        packed = packed_heads(runner.model)
        initialize_layerwise_reload(runner.model)
        sync(self)
        finalize_layerwise_reload(runner.model, self.llm.model_config)
        repack_heads(packed)

    vllm_generation.VLLMGeneration.sync_weights = sync_weights


def step_of_trl(folder: str, shape: str, how: str) -> dict[str, Any]:
    """What a step costs TRL, and what shows that it did its work.

    Args:
        folder: Where the model is.
        shape: Of the model.
        how: `transformers` generates, or `vllm`, with TRL's default correction of the sampler (one
            more forward pass), or `vllm, uncorrected`.
    """
    sys.path.insert(0, str(TRL_FOLDER))
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        PrinterCallback,
        TrainerCallback,
    )
    from trl import GRPOTrainer

    if how.startswith("vllm"):
        mend_for_cpu()
    num_steps = WARM_UP + TIMED[shape]
    meter = Meter()

    class Clock(TrainerCallback):
        def on_train_begin(self, *_args: Any, **_: Any) -> None:
            meter.mark()

        def on_step_end(self, *_args: Any, **_: Any) -> None:
            meter.mark()

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [share_of_digits(each[0]["content"]) for each in completions]

    torch.set_num_threads(1)
    model_folder = str((Path(folder) / "model").resolve())
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    before = fingerprint(model.parameters())
    trainer = GRPOTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(prompts()),
        callbacks=[Clock()],
        args=trl_config(folder, how, max_steps=num_steps),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logs = [each for each in trainer.state.log_history if "loss" in each]
    gap = "sampling/sampling_logp_difference/mean"
    return meter.per_step() | checked(
        tokens=[each["completions/mean_length"] * PROMPTS * GROUP for each in logs],
        losses=[each["loss"] for each in logs],
        norms=[each["grad_norm"] for each in logs],
        gaps=[each[gap] for each in logs if gap in each],
        moved=fingerprint(model.parameters()) - before,
    )


def trl_config(folder: str, how: str, *, max_steps: int) -> Any:
    """TRL's settings of the step that ours takes; `folder` and `how` as in `step_of_trl`."""
    from trl import GRPOConfig

    vllm = how.startswith("vllm")
    return GRPOConfig(
        output_dir=str(Path(folder) / "trl"),
        max_steps=max_steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        # All at once: 16 at a time took as long or longer on both models.
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=COMPLETION_TOKENS,
        use_vllm=vllm,
        vllm_mode="colocate",
        vllm_max_model_length=MAX_MODEL_LEN,
        vllm_importance_sampling_correction=how == "vllm",
        generation_kwargs=({"ignore_eos": True} if vllm else {"min_new_tokens": COMPLETION_TOKENS}),
        beta=0.0,  # no KL, no reference
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )


def prompts() -> list[dict[str, Any]]:
    """Our problems, as chats that TRL renders."""
    from pear_ray.config.problems import GameProblems
    from pear_ray.tasks.problem_sets import make_problems

    problems = make_problems(GameProblems.model_validate(PROBLEMS))
    return [{"prompt": [{"role": "user", "content": each.question}]} for each in problems]
