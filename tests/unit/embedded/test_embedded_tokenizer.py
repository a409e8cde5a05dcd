"""The tokenizer: lossless on anything, short on the games, prompts a prefix of conversations."""

import string
from random import Random

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pear_ray.config.problems import GameProblems
from pear_ray.embedded import embedded_path
from pear_ray.embedded.lessons import DEMO_GAME
from pear_ray.embedded.tokenizer import PHRASES
from pear_ray.tasks.games import make_game_problems

MAX_PROMPT_TOKENS = 40


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_path("student"))


def test_any_text_round_trips(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = Random(0)
    pieces = [*string.printable, *PHRASES, "é", "漢", "🙂", "\x00", "  ", " ,", " n't"]
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 60)))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text


def test_digits_letters_and_phrases(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("12-7=5") == ["1", "2", "-", "7", "=", "5"]
    assert tokenizer.tokenize("sun") == ["s", "u", "n"]
    for phrase in PHRASES:
        assert tokenizer.tokenize(phrase) == [phrase]


def test_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")
    ids = tokenizer.encode("7<|end|>", add_special_tokens=False)
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "7"


def test_the_prompt_is_a_prefix_of_the_conversation(tokenizer: PreTrainedTokenizerBase) -> None:
    for problem in make_game_problems(GameProblems(games=[DEMO_GAME], size=20)):
        user = {"role": "user", "content": problem.question}
        assistant = {"role": "assistant", "content": "4-1=3 <answer>3</answer>"}
        prompt = tokenizer.apply_chat_template(
            [user], add_generation_prompt=True, return_dict=False
        )
        whole = tokenizer.apply_chat_template([user, assistant], return_dict=False)
        assert whole[: len(prompt)] == prompt
        assert whole[-1] == tokenizer.eos_token_id
        assert len(prompt) <= MAX_PROMPT_TOKENS
        completion = tokenizer.encode(assistant["content"], add_special_tokens=False)
        assert whole[len(prompt) : -1] == completion
