"""Both policies' scores walk in step, and never past a difference."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_ray.artifacts.tables import SCORED
from pear_ray.errors import ArtifactError
from pear_ray.reporting.diagnosis.rows import ROWS_PER_BATCH, load_diagnosis_rows


def row(example_id, logprob, **changes):
    return {
        "example_id": example_id,
        "source": "teacher",
        "is_negative": False,
        "token_ids": [5, 6, 7],
        "loss_mask": [False, True, True],
        "behavior_logprobs": [0.0, logprob, 2 * logprob],
    } | changes


def write(folder, name, rows, schema=SCORED):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


@pytest.fixture
def folders(tmp_path):
    return tmp_path / "scored", tmp_path / "policy"


def refusal(folders):
    with pytest.raises(ArtifactError) as caught:
        list(load_diagnosis_rows(*folders))
    return str(caught.value)


def test_rows_carry_both_policies_log_probs(folders):
    scored, policy = folders
    uneven = {"token_ids": [1], "loss_mask": [True], "behavior_logprobs": [-3.0], "source": "web"}
    write(scored, "b.parquet", [row("b", -0.5, is_negative=True)])
    write(scored, "a.parquet", [row("z", -0.25), row("a", -3.0, **uneven)])
    write(policy, "a.parquet", [row("z", -1.0), row("a", 0.0, **uneven)])
    write(policy, "b.parquet", [row("b", -2.0, is_negative=True)])
    batches = list(load_diagnosis_rows(*folders))
    assert [[r.example_id for r in batch] for batch in batches] == [["a", "z"], ["b"]]
    web, teacher = batches[0]
    assert (web.source, web.token_ids.tolist(), web.loss_mask.tolist()) == ("web", [1], [True])
    assert web.policy_logprobs.tolist() == [-3.0]
    assert teacher.behavior_logprobs.tolist() == [0.0, -0.25, -0.5]
    assert teacher.policy_logprobs.tolist() == [0.0, -1.0, -2.0]
    assert teacher.loss_mask.tolist() == [False, True, True]
    assert [batches[0][1].is_negative, batches[1][0].is_negative] == [False, True]


def test_rows_of_a_shard_pair_by_id_whatever_their_order(folders):
    scored, policy = folders
    write(scored, "a.parquet", [row("x", -0.5), row("y", -1.0), row("w", -1.5)])
    write(policy, "a.parquet", [row("w", -15.0), row("x", -5.0), row("y", -10.0)])
    (batch,) = load_diagnosis_rows(*folders)
    assert [
        (r.example_id, r.behavior_logprobs[1].item(), r.policy_logprobs[1].item()) for r in batch
    ] == [("w", -1.5, -15.0), ("x", -0.5, -5.0), ("y", -1.0, -10.0)]


def test_a_large_shard_comes_in_batches(folders):
    rows = [row(f"{k:04d}", -k / 64) for k in range(2 * ROWS_PER_BATCH + 1)]
    for folder in folders:
        write(folder, "a.parquet", rows)
    batches = list(load_diagnosis_rows(*folders))
    assert [len(batch) for batch in batches] == [ROWS_PER_BATCH, ROWS_PER_BATCH, 1]
    last = batches[-1][0]
    assert last.example_id == "0128"
    assert last.behavior_logprobs.tolist() == [0.0, -2.0, -4.0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"example_id": "b"}, "differs in example_id"),
        ({"source": "other"}, "'a' differs in source"),
        ({"is_negative": True}, "'a' differs in is_negative"),
        ({"token_ids": [5, 6, 8]}, "'a' differs in token_ids"),
        ({"loss_mask": [True, True, True]}, "'a' differs in loss_mask"),
        ({"behavior_logprobs": [0.0, -1.0]}, "another number of behavior_logprobs than of token"),
        ({"behavior_logprobs": [0.0, -1.0, None]}, "behavior_logprobs holds nulls"),
        (
            {"token_ids": [5, 6], "loss_mask": [False, True], "behavior_logprobs": [0.0, -1.0]},
            "'a' differs in token_ids",
        ),
    ],
)
def test_a_difference_is_an_error(folders, changes, told):
    write(folders[0], "a.parquet", [row("a", -1.0)])
    write(folders[1], "a.parquet", [row("a", -1.0) | changes])
    assert told in refusal(folders)
    assert "again" in refusal(folders)


def test_a_row_or_shard_on_one_side_only_is_an_error(folders):
    scored, policy = folders
    write(scored, "a.parquet", [row("a", -1.0), row("b", -1.0)])
    write(policy, "a.parquet", [row("a", -1.0)])
    assert "2 rows are scored under the behavior policy and 1 under" in refusal(folders)
    write(policy, "a.parquet", [row("a", -1.0), row("b", -1.0)])
    write(scored, "deep/b.parquet", [row("c", -1.0)])
    message = refusal(folders)
    assert message.startswith(f"{policy}: 1 of 2 shards have no counterpart, the first deep/b.parq")
    assert "run the stage `diagnose` again" in message


def test_no_shards_and_other_tables_are_errors(folders):
    scored, policy = folders
    assert "no Parquet file there; run the stage `score` again" in refusal(folders)
    write(scored, "a.parquet", [row("a", -1.0)])
    write(policy, "a.parquet", [{"x": 1}], schema=pa.schema([("x", pa.int32())]))
    assert "not a table of this version" in refusal(folders)


def test_an_empty_shard_is_passed_over(folders):
    for folder in folders:
        write(folder, "a.parquet", [])
        write(folder, "b.parquet", [row("b", -1.0)])
    assert [[r.example_id for r in batch] for batch in load_diagnosis_rows(*folders)] == [["b"]]
