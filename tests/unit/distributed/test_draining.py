"""When a loop saves because a machine goes, by the news that Ray Train gives a worker."""

import time
from types import SimpleNamespace

import pytest
from ray.train.v2._internal.execution import context
from ray.train.v2._internal.execution.preemption import PreemptionContext
from ray.train.v2.api.preemption import PreemptionInfo

from pear_ray.distributed.draining import Notice, Wishes
from pear_ray.distributed.train_group import STOP_FILE


@pytest.fixture
def news(monkeypatch):
    """The part of Ray Train's context that holds the news, as its watcher sets it."""
    held = PreemptionContext()
    monkeypatch.setattr(context, "_train_context", SimpleNamespace(preemption_context=held))
    return held


def goes_in(seconds: float | None) -> PreemptionInfo:
    deadline_ms = None if seconds is None else int((time.time() + seconds) * 1000)
    return PreemptionInfo(deadline_ms=deadline_ms, preempted_node_to_ranks={"node": [0]})


def agreed(wishes: Wishes) -> Notice:
    """What a group of this rank alone agrees on in a step that is not its last."""
    wishes.agree(wishes.mine())
    if wishes.notice is not Notice.SAVE_AND_WAIT:  # which waits for the end of the process
        wishes.end_step(is_last=False)
    return wishes.notice


def test_without_news_and_outside_of_ray_train_nothing_is_wished(tmp_path):
    wishes = Wishes(tmp_path)
    assert agreed(wishes) is Notice.NONE
    assert not wishes.save
    (tmp_path / STOP_FILE).touch()
    agreed(wishes)
    assert wishes.stop
    assert wishes.save


@pytest.mark.parametrize("seconds", [100, None])  # None: Ray Train takes two minutes
def test_a_notice_is_saved_for_once(tmp_path, news, seconds):
    wishes = Wishes(tmp_path)
    assert agreed(wishes) is Notice.NONE
    news.preemption_info = goes_in(seconds)
    assert wishes.mine()["max/notice"] == wishes.mine()["max/notice"] == Notice.SAVE
    assert [agreed(wishes) for _ in range(3)] == [Notice.SAVE, Notice.NONE, Notice.NONE]
    assert not wishes.save
    news.preemption_info = goes_in(50)  # another node, sooner
    assert agreed(wishes) is Notice.SAVE


def test_the_last_save_is_when_no_other_step_fits(tmp_path, news):
    wishes = Wishes(tmp_path)
    news.preemption_info = goes_in(10)
    assert agreed(wishes) is Notice.SAVE
    time.sleep(0.3)
    assert agreed(wishes) is Notice.NONE
    news.preemption_info = goes_in(2)  # less than the seconds that are kept free
    assert agreed(wishes) is Notice.SAVE_AND_WAIT
    assert wishes.save
    news.preemption_info = goes_in(-100)  # called off: the group should be gone since long
    wishes.agree(wishes.mine())
    assert wishes.notice is Notice.SAVE
