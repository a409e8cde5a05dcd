"""How well a model plays the game: pass@1 and pass@8 at temperature 1 on a problem file."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

from pear_ray.config.problems import FileProblems
from pear_ray.config.rewards import ExactVerifier
from pear_ray.records import RewardStatus
from pear_ray.tasks.problem_files import read_problems
from pear_ray.tasks.verifiers import verify_exact

NUM_SAMPLES = 8
MAX_TOKENS = 96


def measure(
    model: PreTrainedModel, output: Path, problem_set: str, *, seed: int
) -> dict[str, float]:
    """Pass@1 (the mean over samples), pass@8, and mean completion length in tokens.

    Args:
        model: What plays.
        output: Folder with the problem files, and `student/` for its tokenizer.
        problem_set: Stem of a problem file.
        seed: Of sampling.
    """
    tokenizer = AutoTokenizer.from_pretrained(output / "student")
    path = output / f"{problem_set}.jsonl"
    problems = read_problems(FileProblems(kind="file", path=str(path)))
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
    inputs = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        ids = model.generate(
            **inputs, max_new_tokens=MAX_TOKENS, do_sample=True, temperature=1.0, top_k=0
        )
    completions = ids[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    verifier = ExactVerifier(kind="exact")
    right = torch.tensor(
        [
            verify_exact(verifier, problems[row // NUM_SAMPLES], text).status == RewardStatus.OK
            for row, text in enumerate(texts)
        ]
    ).view(len(problems), NUM_SAMPLES)
    return {
        "pass_at_1": round(right.float().mean().item(), 4),
        f"pass_at_{NUM_SAMPLES}": round(right.any(dim=1).float().mean().item(), 4),
        "completion_tokens": round(
            (completions != tokenizer.pad_token_id).sum().item() / len(prompts), 1
        ),
    }
