"""The game's tokenizer: one token for each of its symbols, and nothing else is known.

An operation with its number, as prompts have it, is one symbol: so small a student looks it up by
its number at once, and would take an hour to learn that the number stands beside it.
"""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from pear_ray.embedded.automaton.game import OPERATIONS, OPERATIONS_OF, PLACES, RECITAL, STATES
from pear_ray.embedded.automaton.teacher import ANSWER, ANSWER_ENDS, CIPHER
from pear_ray.embedded.tokenizer import ASSISTANT, END, PAD, USER, write_files

UNKNOWN = "<|unknown|>"
SPECIALS = (PAD, END, USER, ASSISTANT, UNKNOWN)
NUMBERED = tuple(operation + place for place in PLACES for operation in OPERATIONS)
SYMBOLS = (*OPERATIONS_OF, *STATES, *OPERATIONS, *PLACES, *RECITAL, *CIPHER)


def build_tokenizer() -> Tokenizer:
    """Specials first, so that padding is id 0; then what is longer than a letter."""
    whole = (ANSWER, ANSWER_ENDS, *NUMBERED)
    tokens = (*SPECIALS, *whole, *SYMBOLS)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in whole])
    return tokenizer


def write_tokenizer(folder: Path, *, max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    write_files(build_tokenizer(), folder, max_length=max_length, unk_token=UNKNOWN)
