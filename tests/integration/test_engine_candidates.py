"""The engine's candidates against transformers' in float32, prompts cut into small chunks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm.logprobs import FlatLogprobs

from pear_ray.embedded.paths import embedded_path
from pear_ray.engines.top_logprobs import MaskedIds
from pear_ray.engines.vllm import engine as engine_module
from pear_ray.engines.vllm.flat_logprobs import prompt_candidates
from pear_ray.errors import EngineError

STUDENT = embedded_path("student")
VOCABULARY = 272
CHUNK = 64  # of `chunked_engine`
# Ids at random make sharp distributions: on these rows transformers in float32 is itself up to
# 3.5e-5 from float64, and the engine up to 2.3e-5, cut or not.
GAP = {"rtol": 2e-6, "atol": 5e-5}
# One token; shorter than a chunk; at, just below and just above one; cut twice and thrice.
LENGTHS = [1, 2, 40, CHUNK - 1, CHUNK, CHUNK + 1, 130, 200]


@pytest.fixture(scope="module")
def rows() -> list[MaskedIds]:
    generator = np.random.default_rng(3)
    return [
        MaskedIds(
            generator.integers(5, 250, size=length).tolist(),
            [False, *(generator.random(length - 1) < 0.7).tolist()],
        )
        for length in LENGTHS
    ]


@pytest.fixture(scope="module")
def reference(rows: Sequence[MaskedIds]) -> list[torch.Tensor]:
    """Log-probs over the vocabulary at each token but the first, [seq - 1, vocabulary]."""
    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32).eval()
    with torch.no_grad():
        return [
            model(torch.tensor([row.token_ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
            for row in rows
        ]


@pytest.mark.parametrize("top_k", [1, 5, 50, VOCABULARY])
def test_candidates_are_those_of_transformers(
    chunked_engine: Any, rows: list[MaskedIds], reference: list[torch.Tensor], top_k: int
) -> None:
    found = chunked_engine.score_top(rows, top_k=top_k)
    num_outside = 0
    for row, all_logprobs, ours in zip(rows, reference, found, strict=True):
        trains = torch.tensor(row.loss_mask)[1:]
        theirs, own = all_logprobs[trains], torch.tensor(row.token_ids)[1:][trains]
        assert ours.top_ids.shape == ours.top_logprobs.shape == (len(own), top_k)
        ids, logprobs = torch.tensor(ours.top_ids).long(), torch.tensor(ours.top_logprobs)
        # Every candidate's log-prob is its own, and no id is there twice.
        np.testing.assert_allclose(logprobs, theirs.gather(1, ids), **GAP)
        assert all(len(set(each)) == top_k for each in ids.tolist())
        # They are the likeliest, in falling order; the last may be the sequence's own id.
        assert (logprobs.diff(dim=1) <= 0).all()
        likeliest = theirs.topk(top_k).values
        outside = theirs.gather(1, own[:, None])[:, 0] < likeliest[:, -1] - GAP["atol"]
        likeliest[outside, -1] = theirs.gather(1, own[:, None])[outside, 0]
        np.testing.assert_allclose(logprobs, likeliest, **GAP)
        assert (ids == own[:, None]).any(dim=1).all()
        assert (ids[outside, -1] == own[outside]).all()
        num_outside += int(outside.sum())
    assert (num_outside == 0) == (top_k == VOCABULARY)  # both kinds of token were seen


@pytest.mark.parametrize("top_k", [1, 50])
def test_log_probs_are_the_same_with_and_without_candidates(
    chunked_engine: Any, rows: list[MaskedIds], top_k: int
) -> None:
    plain = chunked_engine.score([row.token_ids for row in rows])
    for one, other in zip(plain, chunked_engine.score_top(rows, top_k=top_k), strict=True):
        np.testing.assert_array_equal(one, other.logprobs)


def test_calls_cut_for_memory_give_the_same(
    chunked_engine: Any, rows: list[MaskedIds], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = chunked_engine.score_top(rows, top_k=4)
    monkeypatch.setattr(engine_module, "CANDIDATES_AT_ONCE", 5 * 150)  # 150 tokens
    for one, other in zip(whole, chunked_engine.score_top(rows, top_k=4), strict=True):
        np.testing.assert_array_equal(one.top_ids, other.top_ids)
        np.testing.assert_allclose(one.top_logprobs, other.top_logprobs, rtol=2e-6, atol=1e-6)


def flat_logprobs(positions: list[list[int]]) -> FlatLogprobs:
    flat = FlatLogprobs()
    for ids in positions:
        flat.append_fast(ids, [-1.0] * len(ids), iter(ids), iter(ids))
    return flat


@pytest.mark.parametrize(
    "positions",
    [
        [[], [5, 7, 8], [6, 7, 8], [7, 7, 8]],  # one too many
        [[], [5, 7, 8]],
        [[], [5, 7, 8], [6, 7]],
        [[], [5, 7], [6, 7, 8, 9]],
        [[5, 7, 8], [6, 7, 8]],
    ],
)
def test_another_layout_is_refused(positions: list[list[int]]) -> None:
    with pytest.raises(EngineError, match="for 3 prompt ids, 3 wanted at each but the first"):
        prompt_candidates(flat_logprobs(positions), [4, 5, 6], top_k=2)


def test_other_ids_are_refused() -> None:
    with pytest.raises(EngineError, match="log-probs of other ids than the prompt's"):
        prompt_candidates(flat_logprobs([[], [5, 7, 8], [7, 6, 8]]), [4, 5, 6], top_k=2)
