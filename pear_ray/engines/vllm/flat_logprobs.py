"""vLLM's flat log-probs as arrays, checked to be of the ids that were asked for."""

from collections.abc import Sequence

import numpy as np
from vllm.logprobs import FlatLogprobs

from pear_ray.errors import EngineError


def chosen_logprobs(flat: FlatLogprobs, token_ids: list[int]) -> list[float]:
    """The entry of each sampled id; a position may hold more than one candidate.

    Raises:
        EngineError: There is not one position for each id.
    """
    if flat.token_ids == token_ids:
        return list(flat.logprobs)
    spans = list(zip(flat.start_indices, flat.end_indices, strict=True))
    if len(spans) != len(token_ids):
        raise EngineError(f"vLLM returned {len(spans)} log-probs for {len(token_ids)} tokens")
    return [
        flat.logprobs[flat.token_ids.index(token, start, end)]
        for token, (start, end) in zip(token_ids, spans, strict=True)
    ]


def prompt_candidates(
    flat: FlatLogprobs, ids: Sequence[int], *, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probs at each prompt token but the first, int32 and float32 [seq - 1, 1 + k].

    vLLM lists the prompt's own id, then the k likeliest in falling order, the own one again where
    it is one of them; the first token has a position without entries.

    Raises:
        EngineError: It listed something else.
    """
    width = 1 + top_k
    starts = width * np.arange(len(ids) - 1)  # [seq - 1]
    if not np.array_equal(flat.start_indices[1:], starts) or len(flat.logprobs) != width * len(
        starts
    ):
        raise EngineError(
            f"vLLM returned {len(flat.logprobs)} log-probs at {len(flat.start_indices)} positions "
            f"for {len(ids)} prompt ids, {width} wanted at each but the first; its layout is "
            "another than that of the version in pyproject.toml"
        )
    found = np.asarray(flat.token_ids, dtype=np.int32).reshape(-1, width)
    if not np.array_equal(found[:, 0], ids[1:]):
        raise EngineError("vLLM returned log-probs of other ids than the prompt's")
    return found, np.asarray(flat.logprobs, dtype=np.float32).reshape(-1, width)
