import math

import numpy as np
import optuna
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from merge_engine.errors import MergeError
from merge_engine.recipe.recipe_file import parse_recipe
from search.proposing.gp import GAIN, GaussianSampler
from search.proposing.mixture import break_sticks, join_sticks
from search.proposing.recipes import to_recipe
from search.proposing.space import STAGE, Space, coarse_to_fine, model_units
from search.proposing.starts import UNIFORM, baselines, warm_starts
from search.study.spec import ModelDifference

DONORS = ("a", "b", "c")
METHODS = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "linear", "slerp", "model_stock")


def space(**changes):
    fields = {
        "base": "base",
        "donors": DONORS,
        "methods": METHODS,
        "scale": (0.0, 1.5),
        "ranges": {"density": (0.1, 1.0)},
    }
    return Space(**(fields | changes))


SHARES = st.lists(st.floats(0, 1), min_size=2, max_size=6).filter(lambda shares: sum(shares) > 0.01)


@given(SHARES)
def test_mixture_and_sticks_are_inverse(raw):
    shares = [share / math.fsum(raw) for share in raw]
    resolution = 4 * 2.3e-16 ** (1 / (len(shares) - 1))  # a stick's distance from 1 is a power
    assert break_sticks(np.array(join_sticks(shares))) == pytest.approx(
        shares, abs=max(1e-9, resolution)
    )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_any_sticks_are_abreak_sticks(sticks):
    shares = break_sticks(np.array(sticks))
    assert len(shares) == len(sticks) + 1
    assert sum(shares) == pytest.approx(1.0)
    assert min(shares) >= 0


@given(st.lists(st.just(0.0) | st.floats(0.15, 1.5), min_size=3, max_size=3))
def test_point_of_weights_has_the_recipe_of_those_weights(weights):
    point = space().point("task_arithmetic", weights)
    assert space().weights([point])[0, 0] == pytest.approx(weights, abs=2e-5)


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=2), st.floats(0.1, 1.5))
def test_donor_under_a_tenth_of_the_mean_is_left_out(sticks, scale):
    point = {"method": "ties", "density": 0.5, "scale": scale}
    weights = space().weights([point | {"mix_1": sticks[0], "mix_2": sticks[1]}])[0, 0]
    assert sum(weights) == pytest.approx(3 * scale, abs=1e-5)
    assert all(weight == 0 or weight > 0.0999 * scale for weight in weights)


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_every_point_is_a_legal_recipe_that_mergekit_would_read(method, data):
    points = space(methods=(method,))
    point = {
        name: data.draw(st.floats(d.low, d.high)) if name != "method" else method
        for name, d in points.distributions.items()
    }
    recipe = to_recipe(points, point)
    again, notes = parse_recipe(yaml.safe_load(recipe.to_yaml()), "again")
    assert again == recipe
    assert recipe.dtype == "float32"
    assert recipe.base_model
    assert not [note for note in notes if "no parameter" in note]
    recipe.values("model.layers.0.mlp.up_proj.weight", 0.0)


def test_baselines_are_base_each_donor_and_their_average():
    weights = {
        name: recipe.values("x", 0.0)["weight"] for name, recipe in baselines(space()).items()
    }
    assert weights["base"] == (0, 0, 0)
    assert weights["b"] == (0, 1, 0)
    assert weights[UNIFORM] == pytest.approx((1 / 3,) * 3, abs=1e-6)


def test_warm_starts_are_the_baselines_again_so_they_cost_nothing_twice():
    points = space()
    starts = {to_recipe(points, point).key for _, point in warm_starts(points)}
    assert {recipe.key for recipe in baselines(points).values()} <= starts


def test_warm_starts_outside_the_users_ranges_are_left_out():
    labels = [label for label, _ in warm_starts(space(scale=(0.5, 1.0)))]
    assert "base" not in labels
    assert "scale 0.8" in labels


@pytest.mark.parametrize("method", METHODS)
@given(
    st.lists(st.just(0.0) | st.floats(0.3, 1.5), min_size=3, max_size=3).filter(any),
    st.floats(0.1, 1.0),
)
def test_recipe_of_an_earlier_run_is_tried_first(method, weights, density):
    recipe = to_recipe(space(), space().point(method, weights, density=density))
    label, point = warm_starts(space(starts=(recipe,)))[-1]
    assert label == "start 1"
    again = to_recipe(space(), point)
    mine, theirs = (each.values("x", 0.0) for each in (again, recipe))
    assert [source.model for source in again.donors] == [source.model for source in recipe.donors]
    for name in mine:
        assert mine[name] == pytest.approx(theirs[name], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"donors": ("a", "b", "d")}, "'c', which the study has not"),
        ({"methods": ("ties",)}, "method 'task_arithmetic', which the study has not"),
        ({"scale": (0.0, 0.5)}, "outside the study's ranges"),
    ],
)
def test_recipe_of_another_study_is_refused(changes, message):
    recipe = to_recipe(space(), space().point("task_arithmetic", (1.0, 1.0, 1.0)))
    with pytest.raises(MergeError, match=message):
        warm_starts(space(starts=(recipe,), **changes))


def test_parameters_of_other_methods_do_not_make_another_recipe():
    points = space()
    one = points.point("task_arithmetic", (0.5, 0.5, 0.5), density=0.2)
    other = points.point("task_arithmetic", (0.5, 0.5, 0.5), density=0.9)
    assert to_recipe(points, one).key == to_recipe(points, other).key
    assert (
        to_recipe(points, one | {"method": "ties"}).key
        != to_recipe(points, other | {"method": "ties"}).key
    )


def test_fixed_parameter_is_not_searched_but_used():
    fixed = space(ranges={"density": (0.3, 0.3)}, scale=(1.0, 1.0))
    assert set(fixed.distributions) == {"method", "mix_1", "mix_2"}
    point = fixed.point("ties", (1.0, 1.0, 1.0))
    assert to_recipe(fixed, point).values("x", 0.0)["density"] == (0.3, 0.3, 0.3)


def test_scale_of_ties_is_its_lambda_and_weights_keep_thebreak_sticks():
    recipe = to_recipe(space(), space().point("ties", (0.4, 0.8, 1.2)))
    values = recipe.values("x", 0.0)
    assert values["lambda_"] == pytest.approx(0.8)
    assert values["weight"] == pytest.approx((0.5, 1.0, 1.5), abs=1e-5)


def test_slerp_walks_between_the_two_donors_that_weigh_most():
    recipe = to_recipe(space(), space().point("slerp", (0.2, 0.9, 0.3)))
    assert [source.model for source in recipe.models] == ["b", "c"]
    assert recipe.base_model == "b"
    assert recipe.values("x", 0.0)["t"] == pytest.approx(0.25, abs=1e-5)


def test_depth_groups_and_splits_have_weights_of_their_own():
    layers = ("layers.0.", "layers.1.", "layers.2.", "layers.3.")
    grouped = space(units=model_units(layers, 2, ("mlp",)))
    point = grouped.point("task_arithmetic", (1.0, 1.0, 1.0))
    for unit, scale in enumerate((0.1, 0.2, 0.3, 0.4)):
        point[f"scale@{unit}"] = scale
    recipe = to_recipe(grouped, point)

    def weight(name):
        return recipe.values(name, 0.0)["weight"][0]

    assert weight("model.layers.1.mlp.up_proj.weight") == pytest.approx(0.1)
    assert weight("model.layers.2.mlp.up_proj.weight") == pytest.approx(0.2)
    assert weight("model.layers.0.self_attn.q_proj.weight") == pytest.approx(0.3)
    assert weight("model.layers.3.self_attn.q_proj.weight") == pytest.approx(0.4)
    assert weight("lm_head.weight") == pytest.approx(0.4)


def test_single_donor_has_a_scale_and_nobreak_sticks():
    alone = space(donors=("a",), methods=("task_arithmetic",), ranges={})
    assert set(alone.distributions) == {"method", "scale"}
    assert alone.weights([{"method": "task_arithmetic", "scale": 0.7}]).tolist() == [[[0.7]]]


def differences(**changes):
    vectors = (ModelDifference(model="a", minus="b"), "c", ModelDifference(model="base", minus="c"))
    return space(donors=vectors, methods=("task_arithmetic",), ranges={}, **changes)


WEIGHTS = st.lists(st.just(0.0) | st.floats(0.3, 1.5), min_size=3, max_size=3)


@given(WEIGHTS)
def test_models_weight_what_all_differences_add_of_them(weights):
    recipe = to_recipe(differences(), differences().point("task_arithmetic", weights))
    first, second, third = weights
    assert [source.model for source in recipe.donors] == ["a", "b", "c"]
    added = pytest.approx((first, -first, second - third), abs=2e-5)
    assert recipe.values("x", 0.0)["weight"] == added


def test_baselines_of_differences_are_the_models_as_they_are():
    inputs = baselines(differences())
    weights = {name: recipe.values("x", 0.0)["weight"] for name, recipe in inputs.items()}
    assert weights["base"] == (0, 0, 0)
    assert weights["b"] == (0, 1, 0)
    assert weights[UNIFORM] == pytest.approx((1 / 3, -1 / 3, 0), abs=1e-6)
    assert "-0.0" not in inputs["base"].to_yaml()


# Below a tenth of the mean a weight is set to zero (``zero_small_weights``).
@given(WEIGHTS.filter(lambda w: any(w) and (w[1] == w[2] or abs(w[1] - w[2]) > 0.06)))
def test_recipe_of_differences_is_tried_first(weights):
    recipe = to_recipe(differences(), differences().point("task_arithmetic", weights))
    again = to_recipe(differences(), warm_starts(differences(starts=(recipe,)))[-1][1])
    given, tried = (one.values("x", 0.0)["weight"] for one in (recipe, again))
    assert tried == pytest.approx(given, abs=1e-4)


def test_recipe_that_differences_cannot_make_is_refused():
    alone = baselines(differences())["a"]
    with pytest.raises(MergeError, match="no sum of a - b, c, base - c"):
        warm_starts(differences(starts=(alone,)))


def test_stages_go_from_one_group_to_all_units():
    assert coarse_to_fine(1, 0) == ()
    assert coarse_to_fine(4, 0) == ((0, 0, 0, 0), (0, 0, 1, 1))
    assert coarse_to_fine(3, 0) == ((0, 0, 0), (0, 0, 1))
    assert coarse_to_fine(1, 2) == ((0, 0, 0),)
    assert coarse_to_fine(2, 1) == ((0, 0, 0, 0), (0, 1, 0, 1))


def test_depths_get_weights_of_their_own_stage_after_stage():
    units = (("0.",), ("1.",), ("2.",), ())
    stages = coarse_to_fine(4, 0)
    deep = Space("b", ("x", "y"), ("task_arithmetic",), (0, 1), {}, units, stages=stages)
    top = np.array([[0.1, 0.9], [0.3, 0.7], [0.7, 0.3], [0.9, 0.1]])
    study = optuna.create_study(direction="maximize")
    for number in range(5 + 2 * STAGE + 20):
        study.sampler = GaussianSampler(deep, number, startup=5)
        trial = study.ask(deep.distributions)
        trial.set_user_attr("variance", 1e-6)
        study.tell(trial, -float(np.square(deep.weights([trial.params])[0] - top).sum()))
    assert [GAIN in t.system_attrs for t in study.trials[4 + 2 * STAGE :]] == [False, *[True] * 20]
    weights = deep.weights([trial.params for trial in study.trials])
    first, second, third = np.split(weights, [5 + STAGE, 5 + 2 * STAGE])
    assert (first == first[:, :1]).all()
    assert (second[:, 0] == second[:, 1]).all()
    assert (second[:, 2] == second[:, 3]).all()
    errors = [np.square(some - top).sum(axis=(1, 2)).min() for some in (first, second, third)]
    assert errors[0] == pytest.approx(0.8, abs=0.02)  # what one weight for all can reach
    assert errors[1] == pytest.approx(0.08, abs=0.02)
    assert errors[2] < 0.05
