"""Features are equal exactly where recipes are, and candidates are points of the space."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.proposing.encoding import RecipeEncoding
from search.proposing.recipes import to_recipe
from search.proposing.space import Space

METHODS = (
    "task_arithmetic",
    "linear",
    "ties",
    "slerp",
    "nuslerp",
    "model_stock",
    "sce",
    "nearswap",
)
SPACE = Space("base", ("a", "b", "c"), METHODS, (0.0, 1.5), {"density": (0.1, 1.0)})
UNITS = Space("base", ("a", "b"), ("ties", "linear"), (0.2, 1.0), {}, (("mlp",), ()))


FEW = Space("base", ("a", "b", "c", "d"), METHODS, (0.0, 1.5), {}, (("mlp",), ()), at_most=2)

NUMBERS = st.floats(0.1, 1.4).map(lambda number: round(number, 2))
POINTS = st.builds(
    lambda method, weights, density: SPACE.point(method, weights, density=min(density, 1.0)),
    st.sampled_from(METHODS),
    st.tuples(NUMBERS, NUMBERS, NUMBERS),
    NUMBERS,
)


@given(POINTS, POINTS)
def test_recipes_are_equal_where_features_are(one, other):
    encoding = RecipeEncoding(SPACE)
    both = encoding.candidates([one, other | {"method": one["method"]}])
    same = np.allclose(*encoding.encode(both), atol=1e-5)
    keys = {to_recipe(SPACE, encoding.point(both[[i]])).key for i in range(2)}
    assert same == (len(keys) == 1)


@pytest.mark.parametrize("space", [SPACE, UNITS, FEW])
@given(st.integers(0, 1000))
@settings(max_examples=20)
def test_candidates_are_points_of_the_space_and_back(space, seed):
    encoding, generator = RecipeEncoding(space), np.random.default_rng(seed)
    candidates = encoding.random(20, generator)
    candidates += encoding.perturb(candidates, 0.5, generator)
    points = [encoding.point(candidates[[i]]) for i in range(len(candidates))]
    assert all(space.contains(point) for point in points)
    assert encoding.candidates(points).weights == pytest.approx(candidates.weights, abs=2e-5)


def test_some_candidates_leave_donors_out():
    candidates = RecipeEncoding(SPACE).random(100, np.random.default_rng(0))
    absent = (candidates.weights == 0).any(axis=(1, 2))
    assert 0.1 < absent.mean() < 0.6
