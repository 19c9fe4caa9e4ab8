"""Baselines and warm starts are what they are named; recipes of earlier runs come first."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_engine.errors import MergeError
from search.proposing.recipes import to_recipe
from search.proposing.starts import UNIFORM, baselines, soup_steps, warm_starts
from spaces import METHODS, differences, small_space


def test_baselines_are_base_each_donor_and_their_average():
    weights = {
        name: recipe.values("x", 0.0)["weight"] for name, recipe in baselines(small_space()).items()
    }
    assert weights["base"] == (0, 0, 0)
    assert weights["b"] == (0, 1, 0)
    assert weights[UNIFORM] == pytest.approx((1 / 3,) * 3, abs=1e-6)


def test_warm_starts_include_the_baselines():
    points = small_space()
    starts = {to_recipe(points, point).key for _, point in warm_starts(points)}
    assert {recipe.key for recipe in baselines(points).values()} <= starts


def test_warm_starts_outside_the_users_ranges_are_left_out():
    labels = [label for label, _ in warm_starts(small_space(scale=(0.5, 1.0)))]
    assert "base" not in labels
    assert "scale 0.8" in labels


@pytest.mark.parametrize("method", METHODS)
@given(
    st.lists(st.just(0.0) | st.floats(0.3, 1.5), min_size=3, max_size=3).filter(any),
    st.floats(0.1, 1.0),
)
def test_recipe_of_an_earlier_run_is_tried_first(method, weights, density):
    recipe = to_recipe(small_space(), small_space().point(method, weights, density=density))
    label, point = warm_starts(small_space(starts=(recipe,)))[0]
    assert label == "start 1"
    again = to_recipe(small_space(), point)
    mine, theirs = (each.values("x", 0.0) for each in (again, recipe))
    assert [source.model for source in again.donors] == [source.model for source in recipe.donors]
    for name in mine:
        assert mine[name] == pytest.approx(theirs[name], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"donors": ("a", "b", "d")}, "'c', which the study does not have"),
        ({"methods": ("ties",)}, "method 'task_arithmetic', which the study does not have"),
        ({"scale": (0.0, 0.5)}, "outside the study's ranges"),
    ],
)
def test_recipe_of_another_study_is_refused(changes, message):
    recipe = to_recipe(small_space(), small_space().point("task_arithmetic", (1.0, 1.0, 1.0)))
    with pytest.raises(MergeError, match=message):
        warm_starts(small_space(starts=(recipe,), **changes))


def test_baselines_of_differences_are_the_models_as_they_are():
    inputs = baselines(differences())
    weights = {name: recipe.values("x", 0.0)["weight"] for name, recipe in inputs.items()}
    assert weights["base"] == (0, 0, 0)
    assert weights["b"] == (0, 1, 0)
    assert weights[UNIFORM] == pytest.approx((1 / 3, -1 / 3, 0), abs=1e-6)
    assert "-0.0" not in inputs["base"].to_yaml()


WEIGHTS = st.lists(st.just(0.0) | st.floats(0.3, 1.5), min_size=3, max_size=3)


# Below a tenth of the mean a weight is set to zero (``zero_small_weights``).
@given(WEIGHTS.filter(lambda w: any(w) and (w[1] == w[2] or abs(w[1] - w[2]) > 0.06)))
def test_recipe_of_differences_is_tried_first(weights):
    recipe = to_recipe(differences(), differences().point("task_arithmetic", weights))
    again = to_recipe(differences(), warm_starts(differences(starts=(recipe,)))[0][1])
    given, tried = (one.values("x", 0.0)["weight"] for one in (recipe, again))
    assert tried == pytest.approx(given, abs=1e-4)


def test_recipe_that_differences_cannot_make_is_refused():
    alone = baselines(differences())["a"]
    with pytest.raises(MergeError, match="not a sum of a - b, c, base - c"):
        warm_starts(differences(starts=(alone,)))


def test_warm_starts_are_a_third_of_the_trials_at_most_and_the_users_own_come_first():
    mine = to_recipe(small_space(), small_space().point("ties", (1.0, 0.5, 1.0)))
    for most in (3, 4, 10, 13):
        space = small_space(starts=(mine,), most_starts=most)
        labels = [label for label, _ in warm_starts(space)]
        assert labels[:2] == ["start 1", UNIFORM]
        assert len(labels) + soup_steps(space) == most


def test_starts_of_a_pool_are_of_its_best_donors():
    donors = tuple(f"donor {number}" for number in range(20))
    space = small_space(donors=donors, at_most=2)
    starts = dict(warm_starts(space, [7, 3, *(i for i in range(20) if i not in (7, 3))]))
    assert [*starts][:3] == ["average of the best 2", "donor 7", "scale 1"]
    weights = space.weights([starts["average of the best 2"], starts["scale 0.6"]])[:, 0]
    assert weights[:, [3, 7]] == pytest.approx(np.array([[0.5, 0.5], [0.6, 0.6]]), abs=1e-5)
    assert weights.sum() == pytest.approx(2.2, abs=1e-4)
    average = baselines(space)[UNIFORM].values("x", 0.0)["weight"]
    assert average == pytest.approx((0.05,) * 20)


def test_averages_leave_out_one_donor_each_of_a_few():
    space = small_space()
    points = [point for label, point in warm_starts(space) if label.startswith("average without")]
    left_out = [(weights == 0).tolist() for weights in space.weights(points)[:, 0]]
    assert sorted(left_out) == [[False, False, True], [False, True, False], [True, False, False]]
