"""What the embedded models are trained on: endless scripted solutions of freshly drawn problems."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer

from pear_ray.config.problems import GameConfig
from pear_ray.embedded.solutions import solve
from pear_ray.embedded.tokenizer import ASSISTANT, END, PAD, USER
from pear_ray.tasks.games import open_game

DEMO_GAME = GameConfig(
    name="chain_sum", params={"min_terms": 5, "max_terms": 8, "min_digits": 1, "max_digits": 1}
)
"""The game of the demonstration: 4 to 7 steps, so a completion has 32 to 60 tokens."""
WORDS_GAME = GameConfig(name="spell_backward", params={"min_word_len": 3, "max_word_len": 6})
LETTERS_GAME = GameConfig(name="letter_counting", params={"min_words": 1, "max_words": 2})

CURRICULUM = (
    GameConfig(
        name="chain_sum",
        params={"min_terms": 2, "max_terms": 8, "min_digits": 1, "max_digits": 1},
        share=0.7,
    ),
    WORDS_GAME.model_copy(update={"share": 0.15}),
    LETTERS_GAME.model_copy(update={"share": 0.15}),
)

# Problem sets seed their games by a hash; small integers keep the lessons apart from all of them.
_LESSON_SEED_STRIDE = 5_000_000
_IGNORED = -100  # what cross_entropy leaves out


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One stretch of training.

    Attributes:
        name: For the log.
        num_steps: Optimizer steps.
        learning_rate: Peak, after warm-up; it falls to a tenth along a cosine.
        letters_share: Share of chain sums written in letters.
        slip: Probability that one step of a solution goes wrong.
        seed: Decides problems, styles and slips.
    """

    name: str
    num_steps: int
    learning_rate: float
    letters_share: float
    slip: float
    seed: int


def batches(
    tokenizer: Tokenizer, phase: Phase, *, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels, both [batch, seq]; labels are -100 on prompts and padding."""
    rng = Random(phase.seed)
    shares = [game.share for game in CURRICULUM]
    games = [
        open_game(game.name, json.dumps(game.params), phase.seed * _LESSON_SEED_STRIDE)
        for game in CURRICULUM
    ]
    index = 0
    pad = tokenizer.token_to_id(PAD)
    if pad is None:
        raise ValueError(f"the tokenizer has no {PAD}; make it with embedded.tokenizer")
    while True:
        prompts, completions = [], []
        for game in rng.choices(games, shares, k=batch_size):
            item = game[index]
            index += 1
            prompts.append(f"{USER}{item['question']}{END}{ASSISTANT}")
            solution = solve(item, rng=rng, letters_share=phase.letters_share, slip=phase.slip)
            completions.append(solution + END)
        yield _padded(_encode(tokenizer, prompts), _encode(tokenizer, completions), pad=pad)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def _padded(
    prompts: list[list[int]], completions: list[list[int]], *, pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = list(zip(prompts, completions, strict=True))
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    token_ids = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), _IGNORED)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        token_ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return token_ids, labels
