import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.proposing.mixture import break_sticks, join_sticks, keep_heaviest

SHARES = st.lists(st.floats(0, 1), min_size=2, max_size=6).filter(lambda shares: sum(shares) > 0.01)


@given(SHARES)
def test_mixture_and_sticks_are_inverse(raw):
    shares = [share / math.fsum(raw) for share in raw]
    resolution = 4 * 2.3e-16 ** (1 / (len(shares) - 1))  # a stick's distance from 1 is a power
    assert break_sticks(np.array(join_sticks(shares))) == pytest.approx(
        shares, abs=max(1e-9, resolution)
    )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_sticks_make_weights_that_sum_to_one(sticks):
    shares = break_sticks(np.array(sticks))
    assert len(shares) == len(sticks) + 1
    assert sum(shares) == pytest.approx(1.0)
    assert min(shares) >= 0


def test_a_recipe_keeps_the_same_heaviest_donors_in_every_unit_and_each_units_sum():
    weights = np.array([[[1.0, 2.0, 0.0, 0.5], [3.0, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.4]]])
    kept = keep_heaviest(weights, 2)
    assert (kept[..., 2:] == 0).all()
    assert kept.sum(axis=2) == pytest.approx(weights.sum(axis=2))
    assert kept[0, 0, 1] / kept[0, 0, 0] == pytest.approx(2.0)
    assert kept[0, 2] == pytest.approx([0.2, 0.2, 0.0, 0.0])
    assert keep_heaviest(weights, None) is weights
