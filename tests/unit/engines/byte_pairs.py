"""A tokenizer unlike the embedded one: byte-level BPE, with its own template and end token."""

from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from pear_ray.engines.chat import ChatTokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']\\n' + m['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
)
# Merges: the word pieces of these lines, runs of newlines, and the first bytes of emoji and CJK.
TEXT = [
    "the answer is twelve, so the other answer is twenty one",
    "hello world, the world is round 🙂🙃 日本 日本語 café naïve",
    "first\n\nsecond\n\n\n\nthird = 3 + 4",
] * 4
VOCABULARY = 420


def byte_pair_chat(
    folder: Path,
    *,
    template: str = TEMPLATE,
    end_token: AddedToken | None = None,
    normalizer: object = None,
    trim_offsets: bool = False,
) -> ChatTokenizer:
    """Trained here, saved to `folder` and loaded from it as any model's is."""
    end = end_token or AddedToken("</s>", normalized=False, special=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    # Without the usual regex merges may cross from whitespace into words and over lines.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=8,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([end])
    if trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)
    fast.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return ChatTokenizer(folder)
