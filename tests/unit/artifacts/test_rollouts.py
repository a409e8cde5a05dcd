"""Rollouts go to a file and come back as they were."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_ray.artifacts.rollouts import (
    TrainedNumbers,
    read_groups,
    rollouts_table,
    saved_steps,
    step_file,
    write_step,
)
from pear_ray.artifacts.tables import ROLLOUTS
from pear_ray.errors import ArtifactError
from pear_ray.records import (
    Completion,
    FinishReason,
    Problem,
    Reward,
    RewardStatus,
    Rollout,
    RolloutGroup,
)


def rollout(number: int, reward: Reward) -> Rollout:
    return Rollout(
        problem=Problem(f"sum/{number}", "sum", f"{number} + 1 =", '{"answer": 2}'),
        prompt_ids=[1, 2, number],
        completion=Completion(
            token_ids=[number, 7],
            # Of float32, as an engine gives them: the file holds no more digits.
            behavior_logprobs=[-0.5, -0.125],
            text="2",
            finish_reason=FinishReason.LENGTH if number else FinishReason.STOP,
        ),
        policy_version=3,
        reward=reward,
    )


RIGHT = Reward(RewardStatus.OK, 1.1, "", {"game": 1.0, "form": 0.1})
WRONG = Reward(RewardStatus.FAILED, 0.0, "3 is not 2", {"game": 0.0, "form": 0.0})
ERRORED = Reward(RewardStatus.ERRORED, 0.0, "Traceback")
GROUPS = [RolloutGroup([rollout(n, RIGHT), rollout(n, each)]) for n, each in enumerate([WRONG] * 3)]


def test_groups_of_two_ranks_come_back_in_their_places(tmp_path: Path) -> None:
    mine = rollouts_table([GROUPS[0], GROUPS[2]], step=4, places=[0, 2], temperature=0.7)
    theirs = rollouts_table([GROUPS[1]], step=4, places=[1], temperature=0.7)
    path = write_step(tmp_path / "rollouts", 4, [mine, theirs])
    assert path == step_file(tmp_path / "rollouts", 4)
    assert read_groups(path) == GROUPS
    table = pq.read_table(path)
    assert table["group"].to_pylist() == [0, 0, 1, 1, 2, 2]
    assert table["sample_index"].to_pylist() == [0, 1] * 3
    assert table["temperature"].to_pylist() == [0.7] * 6
    assert table["advantage"].null_count == 6
    assert [one.name for one in path.parent.iterdir()] == ["step-00004.parquet"]


def test_what_training_found_is_beside_each_rollout(tmp_path: Path) -> None:
    trained = TrainedNumbers([0.5, -0.5], [[-0.25, -1.0], [-2.0, -4.0]])
    table = rollouts_table(GROUPS[:1], step=1, places=[0], temperature=1.0, trained=trained)
    rows = pq.read_table(write_step(tmp_path, 1, [table])).to_pylist()
    assert [row["advantage"] for row in rows] == [0.5, -0.5]
    assert [row["proximal_logprobs"] for row in rows] == [[-0.25, -1.0], [-2.0, -4.0]]
    assert rows[0]["reward_components"] == [("game", 1.0), ("form", 0.1)]


def test_an_errored_reward_is_saved_without_a_value(tmp_path: Path) -> None:
    group = RolloutGroup([rollout(0, ERRORED)])
    path = write_step(tmp_path, 1, [rollouts_table([group], step=1, places=[0], temperature=1.0)])
    assert pq.read_table(path)["reward_value"].to_pylist() == [None]
    assert read_groups(path)[0].rollouts[0].reward == ERRORED


def test_a_step_done_again_replaces_its_file(tmp_path: Path) -> None:
    for groups in (GROUPS, GROUPS[1:2]):
        places = range(len(groups))
        tables = [rollouts_table(groups, step=2, places=places, temperature=1.0)]
        write_step(tmp_path, 2, tables)
    assert read_groups(saved_steps(tmp_path)[2]) == GROUPS[1:2]
    assert list(saved_steps(tmp_path)) == [2]
    assert saved_steps(tmp_path / "nowhere") == {}


def test_a_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    table = rollouts_table(GROUPS, step=1, places=range(3), temperature=1.0)
    short = pa.array([[-0.5]] * 6, type=pa.list_(pa.float32()))
    place = ROLLOUTS.get_field_index("behavior_logprobs")
    broken = table.set_column(place, ROLLOUTS.field(place), short)
    path = write_step(tmp_path, 1, [broken])
    with pytest.raises(ArtifactError, match="group 0, completion 0 has 1 behavior_logprobs for 2"):
        read_groups(path)
    path.write_bytes(b"PAR?")
    with pytest.raises(ArtifactError, match=r"step-00001\.parquet: not a table of this version"):
        read_groups(path)
