"""Tokenizers unlike the embedded one, with a template and an end token of their own."""

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
    """Byte-level BPE; trained here, saved to `folder` and loaded from it as any model's is."""
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
    return saved(tokenizer, end, template, folder)


def word_mark_chat(folder: Path, *, marks: str, byte_fallback: bool = True) -> ChatTokenizer:
    """BPE over words that begin with a mark, as SentencePiece writes them (Llama 2, Gemma)."""
    end = AddedToken("</s>", normalized=False, special=True)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=marks)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme=marks), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        limit_alphabet=40,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT[:1] * 4, trainer)
    tokenizer.add_special_tokens([end, AddedToken("[assistant]\n", normalized=False)])
    return saved(tokenizer, end, TEMPLATE, folder)


def saved(tokenizer: Tokenizer, end: AddedToken, template: str, folder: Path) -> ChatTokenizer:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)
    fast.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return ChatTokenizer(folder)
