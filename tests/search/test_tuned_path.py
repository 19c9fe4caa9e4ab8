"""Paths of tuned weights: their units, positions between their points, and their recipes."""

from dataclasses import replace

import numpy as np
import pytest

from architectures import save_family
from merge_engine.models.model_set import ModelSet
from search.proposing.encoding import RecipeEncoding
from search.proposing.recipes import to_recipe
from search.proposing.space import Space, with_points
from search.proposing.tuned_path import TunedUnits, tuned_units

UNITS = TunedUnits((("layers.0.",), ("layers.1.",), ()), (0, 0, 0))
POINTS = np.array(
    [
        [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]],
        [[1.0, 0.0], [0.2, 0.4], [-0.3, 0.9]],
    ]
)


@pytest.fixture
def space():
    plain = Space("base", ("a", "b"), ("task_arithmetic", "linear", "ties"), (0.0, 1.5), {})
    return with_points(plain, UNITS, [np.stack([each] * 4) for each in POINTS])


def weights_of(recipe, model):
    """A model's weight in each unit."""
    source = next(one for one in recipe.donors if one.model == model)
    index = recipe.donors.index(source)
    names = ("model.layers.0.w", "model.layers.1.w", "lm_head.w")
    return [recipe.values(name, 0.0)["weight"][index] for name in names]


def test_space_has_strength_and_position_once_there_is_a_point_besides_the_start(space):
    assert space.bounds["position"] == (0.0, 1.0)
    assert {"strength", "position"} <= space.distributions.keys()
    plain = with_points(replace(space, tuned=None), UNITS, [np.stack([POINTS[0]] * 4)])
    assert "strength" not in plain.distributions


def test_recipe_blends_flat_and_tuned_weights(space):
    point = space.point("task_arithmetic", (0.2, 0.6), strength=0.5, position=0.5)
    recipe = to_recipe(space, point)
    expected = 0.5 * np.array([0.2, 0.6]) + 0.5 * POINTS.mean(axis=0)
    for model, column in (("a", 0), ("b", 1)):
        assert weights_of(recipe, model) == pytest.approx(expected[:, column].tolist(), abs=1e-6)


def test_strength_zero_is_the_flat_recipe(space):
    tuned = space.point("task_arithmetic", (0.2, 0.6), strength=0.0, position=1.0)
    plain = replace(space, tuned=None)
    flat = plain.point("task_arithmetic", (0.2, 0.6))
    assert to_recipe(space, tuned).key == to_recipe(plain, flat).key


def test_averages_take_no_weights_below_zero(space):
    point = {**space.point("linear", (0.2, 0.6)), "strength": 1.0, "position": 1.0}
    recipe = to_recipe(space, point)
    assert weights_of(recipe, "a")[-1] == 0.0
    assert min(weights_of(recipe, "b")) >= 0.0


def test_recipes_that_merge_alike_have_like_features(space):
    encoding = RecipeEncoding(space)
    ends = [
        {**space.point("task_arithmetic", flat), "strength": 1.0, "position": 1.0}
        for flat in ((0.2, 0.6), (0.9, 0.1))
    ]
    features = encoding.encode(encoding.candidates(ends))
    assert features[0] == pytest.approx(features[1])


def test_points_survive_their_encoding(space):
    encoding = RecipeEncoding(space)
    some = encoding.random(30, np.random.default_rng(0))
    some = encoding.perturb(some, 0.3, np.random.default_rng(1))
    for row in range(len(some)):
        point = encoding.point(some[[row]])
        assert space.contains(point)
        assert encoding.candidates([point]).tuned[0] == pytest.approx(some.tuned[row])


@pytest.mark.parametrize("by", ["tensor", "layer", "group"])
def test_every_tensor_is_in_a_unit(by, tmp_path):
    family = save_family(tmp_path, "qwen3_moe")
    models = ModelSet.open([str(family / name) for name in ("base", "a", "b")])
    units = tuned_units(by, models, ((),))
    assert len(units.filters) == len(units.unit_of)
    experts = [one for one in units.filters if any("experts" in part for part in one)]
    assert all(part.endswith(".experts.") for one in experts for part in one)
    assert len(experts) == (len(models.layer_filters) if by == "tensor" else 0)
