"""Candidates of a scored sequence, by hand."""

import numpy as np
import pytest

from pear_ray.engines.top_logprobs import MaskedIds, TopLogprobs, select_top, within_tokens

# One token's candidates: (id, log-prob) of its own, then of the k likeliest.
Token = list[tuple[int, float]]
INSIDE: Token = [(7, -1.0), (3, -0.5), (7, -1.0)]
OUTSIDE: Token = [(9, -4.0), (3, -0.5), (7, -1.0)]
TIED: Token = [(9, -1.0), (3, -0.5), (7, -1.0)]  # as likely as 7, which was chosen before it


def select(tokens: list[Token], loss_mask: list[bool] | None = None) -> TopLogprobs:
    ids = np.array([[one for one, _ in token] for token in tokens], dtype=np.int32)
    logprobs = np.array([[value for _, value in token] for token in tokens], dtype=np.float32)
    return select_top(ids, logprobs, loss_mask or [False] + [True] * len(tokens))


@pytest.mark.parametrize(
    ("token", "ids", "logprobs"),
    [
        (INSIDE, [3, 7], [-0.5, -1.0]),
        (OUTSIDE, [3, 9], [-0.5, -4.0]),
        (TIED, [3, 9], [-0.5, -1.0]),
        ([(3, -0.5), (3, -0.5), (7, -1.0)], [3, 7], [-0.5, -1.0]),  # the likeliest itself
        ([(7, -1.0), (7, -1.0)], [7], [-1.0]),  # k = 1
        ([(9, -4.0), (7, -1.0)], [9], [-4.0]),
        ([(0, -2.0), (1, -0.5), (2, -1.5), (0, -2.0)], [1, 2, 0], [-0.5, -1.5, -2.0]),  # k = all
    ],
)
def test_the_own_id_is_a_candidate(token: Token, ids: list[int], logprobs: list[float]) -> None:
    found = select([token])
    assert found.top_ids.tolist() == [ids]
    assert found.top_logprobs.tolist() == [logprobs]
    assert found.logprobs.tolist() == [0.0, token[0][1]]


def test_only_tokens_that_train_have_candidates() -> None:
    found = select([INSIDE, OUTSIDE, TIED], [False, False, True, True])
    assert found.top_ids.tolist() == [[3, 9], [3, 9]]
    assert found.top_logprobs.tolist() == [[-0.5, -4.0], [-0.5, -1.0]]
    assert found.logprobs.tolist() == [0.0, -1.0, -4.0, -1.0]
    assert found.top_ids.dtype == np.int32
    assert found.top_logprobs.dtype == np.float32


def test_a_first_token_has_no_candidates_whatever_its_mask_says() -> None:
    assert select([INSIDE], [True, True]).top_ids.tolist() == [[3, 7]]
    assert select([INSIDE], [True, False]).top_ids.shape == (0, 2)


def test_what_was_given_stays_as_it_was() -> None:
    ids = np.array([[9, 3, 7]], dtype=np.int32)
    logprobs = np.array([[-4.0, -0.5, -1.0]], dtype=np.float32)
    select_top(ids, logprobs, [False, True])
    assert ids.tolist() == [[9, 3, 7]]
    assert logprobs.tolist() == [[-4.0, -0.5, -1.0]]


@pytest.mark.parametrize(
    ("lengths", "most", "runs"),
    [
        ([3, 3, 3], 6, [[3, 3], [3]]),
        ([3, 3, 3], 5, [[3], [3], [3]]),
        ([9, 1, 1], 5, [[9], [1, 1]]),  # longer than allowed: by itself
        ([1, 9, 1], 5, [[1], [9], [1]]),
        ([2, 2], 0, [[2], [2]]),
        ([], 5, []),
    ],
)
def test_runs_of_rows(lengths: list[int], most: int, runs: list[list[int]]) -> None:
    rows = [MaskedIds([1] * length, [True] * length) for length in lengths]
    assert [[len(row) for row in run] for run in within_tokens(rows, most)] == runs
