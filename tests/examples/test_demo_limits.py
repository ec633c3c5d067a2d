"""Limits on the data of a run."""

import pytest

from examples.demo.limits import DataLimits, draw


def test_draw_is_seeded_and_in_order():
    items = [str(i) for i in range(50)]
    drawn = draw(items, 10, seed=3)
    assert drawn == draw(items, 10, seed=3)
    assert drawn != draw(items, 10, seed=4)
    assert sorted(drawn, key=items.index) == drawn
    assert len(set(drawn)) == 10
    for most in (None, 50, 99):
        assert draw(items, most, seed=3) == items


def test_a_limit_must_leave_something():
    with pytest.raises(ValueError, match=r"videos \(0\) must be at least 1"):
        DataLimits(videos=0)
