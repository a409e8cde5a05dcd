"""How well an embedded model plays the games: pass@1 and pass@8 at temperature 1."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

from pear_ray.config.problems import GameConfig, GameProblems
from pear_ray.records import RewardStatus
from pear_ray.tasks.games import make_game_problems
from pear_ray.tasks.verifiers import verify

NUM_SAMPLES = 8
MAX_TOKENS = 96
_ROWS_AT_ONCE = 800


def measure(
    model: PreTrainedModel, folder: Path, game: GameConfig, *, num_problems: int, seed: int
) -> dict[str, float]:
    """Pass@1 (the mean over samples), pass@8, and mean completion length in tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = make_game_problems(GameProblems(games=[game], size=num_problems, seed=seed))
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for problem in problems
        for _ in range(NUM_SAMPLES)
    ]
    torch.manual_seed(seed)
    texts, num_tokens = [], 0
    for start in range(0, len(prompts), _ROWS_AT_ONCE):
        inputs = tokenizer(
            prompts[start : start + _ROWS_AT_ONCE], padding=True, return_tensors="pt"
        )
        with torch.inference_mode():
            ids = model.generate(
                **inputs, max_new_tokens=MAX_TOKENS, do_sample=True, temperature=1.0, top_k=0
            )
        completions = ids[:, inputs["input_ids"].shape[1] :]
        num_tokens += int((completions != tokenizer.pad_token_id).sum())
        texts += tokenizer.batch_decode(completions, skip_special_tokens=True)
    right = torch.tensor(
        [
            verify(problems[row // NUM_SAMPLES], text).status == RewardStatus.OK
            for row, text in enumerate(texts)
        ]
    ).view(num_problems, NUM_SAMPLES)
    return {
        "pass_at_1": round(right.float().mean().item(), 4),
        f"pass_at_{NUM_SAMPLES}": round(right.any(dim=1).float().mean().item(), 4),
        "completion_tokens": round(num_tokens / len(prompts), 1),
    }
