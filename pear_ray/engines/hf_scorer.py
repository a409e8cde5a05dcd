"""The slow, independent scorer: transformers in float32, for audits."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def reference_logprobs(folder: Path, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Natural-log probability of each id given those before it (0 first), one sequence at a time.

    Deliberately naive, with a whole float32 log-softmax: it shares no code with what it audits.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, attn_implementation="eager"
    ).eval()
    found = []
    for ids in sequences:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logprobs = model(tokens, use_cache=False).logits[0, :-1].log_softmax(-1)
        chosen = logprobs.gather(1, tokens[0, 1:, None]).squeeze(1)
        found.append([0.0, *chosen.tolist()])
    return found
