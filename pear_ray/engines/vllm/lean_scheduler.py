"""vLLM's scheduler, asking for cache where a sequence needs some, and holding no more of it."""

from typing import Any

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.request import Request


class LeanScheduler(Scheduler):
    """Takes cache once per block of a sequence, not once per token.

    vLLM asks at every token for what a block, 32 tokens, has room for anyway. Beside a small model
    that is a twentieth of a rollout's time. And blocks that as many of the longest sequences as run
    at once cannot fill are none: each is touched whenever the cache is emptied.
    """

    def __init__(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, **others: Any
    ) -> None:
        groups = kv_cache_config.kv_cache_groups
        # Others give blocks back at every token: those that left a window.
        is_plain = len(groups) == 1 and type(groups[0].kv_cache_spec) is FullAttentionSpec
        size = groups[0].kv_cache_spec.block_size if is_plain else 0
        if is_plain:
            longest = cdiv(vllm_config.model_config.max_model_len, size)
            most = vllm_config.scheduler_config.max_num_seqs * longest + 1  # and vLLM's empty one
            kv_cache_config.num_blocks = min(kv_cache_config.num_blocks, most)
        super().__init__(vllm_config, kv_cache_config, **others)
        if is_plain:
            self._ask_once_per_block(size)

    def _ask_once_per_block(self, size: int) -> None:
        manager = self.kv_cache_manager
        allocate, nothing = manager.allocate_slots, manager.empty_kv_cache_blocks

        def allocate_slots(
            request: Request, num_new_tokens: int, *others: Any, **named: Any
        ) -> KVCacheBlocks | None:
            has_room = request.num_computed_tokens % size and num_new_tokens == 1
            if has_room and not others and not any(named.values()):
                return nothing
            return allocate(request, num_new_tokens, *others, **named)

        manager.allocate_slots = allocate_slots
