"""Axes of charts."""

from hypothesis import given
from hypothesis import strategies as st

from search.showing.svg import Axis


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e4))
def test_ticks_are_on_the_axis_and_neither_few_nor_many(low, width):
    axis = Axis("x", low, low + width)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 7
    assert all(-1e-6 <= axis.share(tick) <= 1 + 1e-6 for tick in ticks)
