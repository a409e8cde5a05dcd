"""How much a device computes at once, as measured: for those who train, and for the memory plan."""

ALL = 10**9  # a GPU wants all that its memory holds
# Tokens of a microbatch that are enough: a CPU's caches hold this one, the fastest at 0.3M and at
# 7M parameters.
ENOUGH_TOKENS = {"cpu": 1024, "cuda": ALL}
# The same for groups that share prompts, which are counted once. Of training with 1,536 it took
# 96 % at 0.3M and 98 % at 7M.
ENOUGH_GROUP_TOKENS = {"cpu": 2304, "cuda": ALL}
# More of them where states are narrow: 4,608 of 96 numbers took 97 % of 2,304; at 7M, where a state
# has 256, more took longer.
ENOUGH_GROUP_NUMBERS = {"cpu": 4608 * 96, "cuda": ALL}
# Rows of the head's logits at once. On a GPU every chunk also costs a pass over the head's whole
# gradient: with 256 it took 9 % of a step of Qwen3-0.6B's shape on an H100.
HEAD_CHUNK_TOKENS = {"cpu": 256, "cuda": 1024}
# On a CPU twice as many where they are no more numbers than this: 2 % off training at 0.3M and 7M.
NARROW_HEAD_NUMBERS = 512 * 8192


def enough_group_tokens(device: str, *, hidden_size: int) -> int:
    """Tokens, shared ones counted once, with which a microbatch of groups is large enough."""
    return max(ENOUGH_GROUP_TOKENS[device], ENOUGH_GROUP_NUMBERS[device] // hidden_size)


def head_chunk_tokens(device: str, *, vocab_size: int) -> int:
    """Rows of [row, vocab] logits that are made at once."""
    tokens = HEAD_CHUNK_TOKENS[device]
    is_narrow = device == "cpu" and 2 * tokens * vocab_size <= NARROW_HEAD_NUMBERS
    return 2 * tokens if is_narrow else tokens
