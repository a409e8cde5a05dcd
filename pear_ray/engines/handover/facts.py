"""What trainer, exporter and engine must agree on beside the weights: config, ends, tokenizer."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from pear_ray.engines.chat import ChatTokenizer, chat_loss_mask
from pear_ray.errors import InputError

# What says where a config comes from, or how its model was last called, but not what it computes.
_PROVENANCE = frozenset({"_name_or_path", "transformers_version", "use_cache"})
GENERATION_FILE = "generation_config.json"
# Digits, spaces, a line break and letters outside of ASCII: what tokenizers take apart differently.
PROBE_QUESTION = "What is  12 + 305?\nSay it in words: é, 日本."
PROBE_ANSWER = "It is 317.\n\n<answer>317</answer>"


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """How a tokenizer and its chat template write.

    Attributes:
        vocabulary: Hash over every token and its id.
        num_tokens: Tokens, added ones among them.
        end_id: The end token's id.
        end_token: The end token itself.
        template: The chat template; empty where there is none.
        prompt_ids: Ids of the probe question as a prompt.
        chat_ids: Ids of the probe question with its answer.
        chat_mask: Which of them would train.
        answer_ending: What the template writes behind an answer.
    """

    vocabulary: str
    num_tokens: int
    end_id: int
    end_token: str
    template: str
    prompt_ids: list[int]
    chat_ids: list[int]
    chat_mask: list[bool]
    answer_ending: str


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model's config, and where its completions end.

    Attributes:
        config: As JSON, without what says nothing of what it computes.
        end_ids: `eos_token_id` of its generation config, ascending.
        end_tokens: The tokens of `end_ids` and the tokenizer's own end token, sorted.
        tokenizer: Its tokenizer's facts.
    """

    config: dict[str, Any]
    end_ids: list[int]
    end_tokens: list[str]
    tokenizer: TokenizerFacts


def facts_of_model(causal_lm: PreTrainedModel, chat: ChatTokenizer) -> ModelFacts:
    """The facts of a model in training, as they are in memory."""
    config = causal_lm.config.to_dict() | {"architectures": [type(causal_lm).__name__]}
    return _facts(config, causal_lm.generation_config.eos_token_id, chat)


def facts_of_folder(folder: Path) -> ModelFacts:
    """The facts of a model's folder, as stages and engines will read it.

    Raises:
        InputError: transformers cannot read its config, or its tokenizer has no end token.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        ends = config.eos_token_id  # what both libraries go by where there is no such file
        if (folder / GENERATION_FILE).exists():
            ends = GenerationConfig.from_pretrained(folder).eos_token_id
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise InputError(f"{folder}: transformers cannot read its configs: {error}") from error
    return _facts(config.to_dict(), ends, ChatTokenizer(folder))


def _facts(config: dict[str, Any], ends: int | list[int] | None, chat: ChatTokenizer) -> ModelFacts:
    tree = {name: value for name, value in config.items() if name not in _PROVENANCE}
    found = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    tokens = chat.tokenizer.convert_ids_to_tokens(sorted({chat.eos_id, *found}))
    return ModelFacts(
        config=json.loads(json.dumps(tree, default=str)),  # tuples and dtypes as a file has them
        end_ids=sorted(found),
        end_tokens=sorted(map(str, tokens)),
        tokenizer=_tokenizer_facts(chat),
    )


def _tokenizer_facts(chat: ChatTokenizer) -> TokenizerFacts:
    tokenizer = chat.tokenizer
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
    template = tokenizer.chat_template or ""
    prompt_ids, chat_ids, mask, ending = [], [], [], ""
    if template:
        turns = [
            {"role": "user", "content": PROBE_QUESTION},
            {"role": "assistant", "content": PROBE_ANSWER},
        ]
        encoded = chat.encode(turns)
        prompt_ids, chat_ids = chat.prompt_ids(PROBE_QUESTION), encoded.token_ids
        mask, ending = chat_loss_mask(encoded, train_on="all"), chat.answer_ending()
    return TokenizerFacts(
        vocabulary=hashlib.sha256(vocabulary).hexdigest()[:20],
        num_tokens=len(tokenizer),
        end_id=chat.eos_id,
        end_token=tokenizer.eos_token,
        template=template if isinstance(template, str) else json.dumps(template, sort_keys=True),
        prompt_ids=prompt_ids,
        chat_ids=chat_ids,
        chat_mask=mask,
        answer_ending=ending,
    )
