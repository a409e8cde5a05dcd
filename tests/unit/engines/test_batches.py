"""collate: the flat view of loss tokens points at the positions that predict them."""

import pytest
import torch

from pear_ray.engines.batches import Row, TokenBatch, collate

PAD = 99


def made(*rows: Row) -> TokenBatch:
    return collate(rows, pad_id=PAD, names=("score",), device=torch.device("cpu"))


def test_two_rows_by_hand() -> None:
    batch = made(
        Row([10, 11, 12, 13], [False, False, True, True], {"score": [0.0, 0.1, 0.2, 0.3]}),
        Row([20, 21], [False, True], {"score": [0.5, 0.6]}),
    )
    assert batch.input_ids.tolist() == [10, 11, 12, 13, 20, 21]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.packing.bounds.tolist() == [0, 4, 6]
    # Tokens 2 and 3 of row 0 are predicted at 1 and 2; token 1 of row 1 at 4.
    assert batch.positions.tolist() == [1, 2, 4]
    assert batch.chosen_ids.tolist() == [12, 13, 21]
    assert batch.sequence_ids.tolist() == [0, 0, 1]
    assert batch.aligned["score"].tolist() == pytest.approx([0.2, 0.3, 0.6])
    assert batch.loss_mask.tolist() == [True] * 3
    assert batch.num_loss_tokens == 3


def test_the_first_token_never_trains() -> None:
    """Nothing predicts it; in the second row it would else point into the first."""
    batch = made(
        Row([10, 11], [True, True], {"score": [1.0, 2.0]}),
        Row([20, 21], [True, False], {"score": [3.0, 4.0]}),
    )
    assert batch.chosen_ids.tolist() == [11]
    assert batch.positions.tolist() == [0]
    assert batch.aligned["score"].tolist() == [2.0]


def test_no_rows_make_two_pad_tokens_without_loss() -> None:
    batch = made()
    assert batch.input_ids.tolist() == [PAD, PAD]
    assert batch.position_ids.tolist() == [0, 1]
    assert batch.num_loss_tokens == 0
    assert batch.positions.tolist() == []
    assert batch.aligned["score"].tolist() == []


def test_a_missing_aligned_column_is_an_error() -> None:
    with pytest.raises(KeyError, match="score"):
        made(Row([10, 11], [False, True], {}))
