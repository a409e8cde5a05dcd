"""How the shipped models are trained and written: one loop and one folder layout for all."""

import json
import math
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from pear_ray.embedded.tokenizer import END, PAD

WARMUP_STEPS = 50
FINAL_LR_FRACTION = 0.1
LOG_EVERY = 50
HEAD_SIZE = 32


def architecture(
    tokenizer: Tokenizer,
    *,
    num_heads: int,
    num_layers: int,
    max_length: int,
    initializer_range: float = 0.02,
) -> Qwen3Config:
    """A small Qwen3 for the tokens of `tokenizer`, as wide as its attention heads together."""
    hidden_size = num_heads * HEAD_SIZE
    return Qwen3Config(
        vocab_size=math.ceil(tokenizer.get_vocab_size() / 16) * 16,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=HEAD_SIZE,
        intermediate_size=3 * hidden_size,
        max_position_embeddings=max_length,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        initializer_range=initializer_range,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
        dtype="float32",
    )


def versions() -> dict[str, str]:
    """What the weights of a training depend on besides its settings."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def train(
    model: Qwen3ForCausalLM,
    stream: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    name: str,
    num_steps: int,
    learning_rate: float,
    log: Callable[[str], None] = print,
) -> None:
    """Runs one phase in place: AdamW, linear warm-up, cosine decay, completion tokens only.

    Args:
        model: What is trained.
        stream: Token ids and labels, both [batch, seq]; labels are -100 on prompts and padding.
        name: For the log.
        num_steps: Optimizer steps.
        learning_rate: Peak, after warm-up; it falls to a tenth along a cosine.
        log: Told how it goes.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    warmup = min(WARMUP_STEPS, num_steps)

    def lr_factor(step: int) -> float:
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / num_steps)
        return min(1.0, (step + 1) / warmup) * max(FINAL_LR_FRACTION, cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    model.train()
    start = time.monotonic()
    for step, (token_ids, labels) in zip(range(1, num_steps + 1), stream, strict=False):
        logits = model(input_ids=token_ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % LOG_EVERY == 0 or step == num_steps:
            log(f"{name} {step}/{num_steps} loss {loss:.4f} {time.monotonic() - start:.0f} s")
    model.eval()


def write_model(
    model: Qwen3ForCausalLM, folder: Path, *, write_tokenizer: Callable[[Path], None]
) -> None:
    """Writes weights, configs and tokenizer as one Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    generation = {
        "eos_token_id": model.config.eos_token_id,
        "pad_token_id": model.config.pad_token_id,
    }
    # Nothing about sampling: a top-k written here would silently become the engine's default.
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_tokenizer(folder)
