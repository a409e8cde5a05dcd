"""The marks that the dashboard counts."""

from pear_ray.distributed.job_page import MAX_MARKS, marks_of


def test_a_bar_of_marks_is_full_at_the_last_step():
    assert marks_of(3) == (1, range(1, 4))
    each, steps = marks_of(1001)
    assert each == 3
    assert steps[0] == 2
    assert steps[-1] == 1001
    assert len(steps) <= MAX_MARKS
