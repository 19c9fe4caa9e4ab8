import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.proposing.space import coarse_to_fine
from spaces import small_space


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=2), st.floats(0.1, 1.5))
def test_donor_under_a_tenth_of_the_mean_is_left_out(sticks, scale):
    point = {"method": "ties", "density": 0.5, "scale": scale}
    weights = small_space().weights([point | {"mix_1": sticks[0], "mix_2": sticks[1]}])[0, 0]
    assert sum(weights) == pytest.approx(3 * scale, abs=1e-5)
    assert all(weight == 0 or weight > 0.0999 * scale for weight in weights)


def test_single_donor_has_a_scale_and_no_mixture():
    alone = small_space(donors=("a",), methods=("task_arithmetic",), ranges={})
    assert set(alone.distributions) == {"method", "scale"}
    assert alone.weights([{"method": "task_arithmetic", "scale": 0.7}]).tolist() == [[[0.7]]]


def test_stages_go_from_one_group_to_all_units():
    assert coarse_to_fine(1, 0) == ()
    assert coarse_to_fine(4, 0) == ((0, 0, 0, 0), (0, 0, 1, 1))
    assert coarse_to_fine(3, 0) == ((0, 0, 0), (0, 0, 1))
    assert coarse_to_fine(1, 2) == ((0, 0, 0),)
    assert coarse_to_fine(2, 1) == ((0, 0, 0, 0), (0, 1, 0, 1))
