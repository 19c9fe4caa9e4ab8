"""Points and recipes: any point of any method gives a recipe that is legal and builds."""

from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution

from merge_engine.building.merging import merged_tensors
from merge_engine.methods import METHODS
from merge_engine.models.model_set import ModelSet
from merge_engine.recipe.recipe_file import parse_recipe
from search.proposing.recipes import to_recipe
from search.proposing.space import Space, model_units
from search.study.parameters import allowed_methods
from search.study.reading import parse_study
from spaces import METHODS as SOME_METHODS
from spaces import differences, small_space

DONORS = ("a", "b", "c")
TASKS = {"tasks": ["t"]}


def space_of(root: Path, methods=None, **search) -> Space:
    search |= {"methods": list(methods)} if methods else {}
    mapping = {"base_model": str(root / "base"), "models": [str(root / name) for name in DONORS]}
    spec = parse_study(mapping | {"search": search, "objective": TASKS}, Path(), where="test")
    return Space.from_spec(spec, ("layers.0.", "layers.1.", "layers.2."), "float32")


def point_at(space: Space, method: str, draw) -> dict:
    return {
        name: method if isinstance(axis, CategoricalDistribution) else draw(axis.low, axis.high)
        for name, axis in space.distributions.items()
    }


@given(st.lists(st.just(0.0) | st.floats(0.15, 1.5), min_size=3, max_size=3))
def test_point_of_weights_has_the_recipe_of_those_weights(weights):
    point = small_space().point("task_arithmetic", weights)
    assert small_space().weights([point])[0, 0] == pytest.approx(weights, abs=2e-5)


@pytest.mark.parametrize("method", SOME_METHODS)
@given(data=st.data())
def test_every_point_is_a_legal_recipe_that_mergekit_would_read(method, data):
    points = small_space(methods=(method,))
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


def test_parameters_of_other_methods_do_not_make_another_recipe():
    points = small_space()
    one = points.point("task_arithmetic", (0.5, 0.5, 0.5), density=0.2)
    other = points.point("task_arithmetic", (0.5, 0.5, 0.5), density=0.9)
    assert to_recipe(points, one).key == to_recipe(points, other).key
    assert (
        to_recipe(points, one | {"method": "ties"}).key
        != to_recipe(points, other | {"method": "ties"}).key
    )


def test_fixed_parameter_is_not_searched_but_used():
    fixed = small_space(ranges={"density": (0.3, 0.3)}, scale=(1.0, 1.0))
    assert set(fixed.distributions) == {"method", "mix_1", "mix_2"}
    point = fixed.point("ties", (1.0, 1.0, 1.0))
    assert to_recipe(fixed, point).values("x", 0.0)["density"] == (0.3, 0.3, 0.3)


def test_scale_of_ties_is_its_lambda_and_weights_keep_the_mixture():
    recipe = to_recipe(small_space(), small_space().point("ties", (0.4, 0.8, 1.2)))
    values = recipe.values("x", 0.0)
    assert values["lambda_"] == pytest.approx(0.8)
    assert values["weight"] == pytest.approx((0.5, 1.0, 1.5), abs=1e-5)


def test_slerp_walks_between_the_two_donors_that_weigh_most():
    recipe = to_recipe(small_space(), small_space().point("slerp", (0.2, 0.9, 0.3)))
    assert [source.model for source in recipe.models] == ["b", "c"]
    assert recipe.base_model == "b"
    assert recipe.values("x", 0.0)["t"] == pytest.approx(0.25, abs=1e-5)


def test_depth_groups_and_splits_have_weights_of_their_own():
    layers = ("layers.0.", "layers.1.", "layers.2.", "layers.3.")
    grouped = small_space(units=model_units(layers, 2, ("mlp",)))
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


WEIGHTS = st.lists(st.just(0.0) | st.floats(0.3, 1.5), min_size=3, max_size=3)


@given(WEIGHTS)
def test_weight_of_a_model_is_the_sum_over_its_differences(weights):
    recipe = to_recipe(differences(), differences().point("task_arithmetic", weights))
    first, second, third = weights
    assert [source.model for source in recipe.donors] == ["a", "b", "c"]
    added = pytest.approx((first, -first, second - third), abs=2e-5)
    assert recipe.values("x", 0.0)["weight"] == added


def test_a_study_that_names_no_method_gets_all_but_the_one_that_changes_nothing():
    assert set(space_of(Path("/zoo")).methods) == set(METHODS) - {"passthrough"}


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:numpy.core is deprecated")  # mergekit's own imports
@pytest.mark.parametrize("layer_groups", [1, 2])
@pytest.mark.parametrize("method", allowed_methods("abc"))
@settings(max_examples=15)
@given(data=st.data())
def test_every_point_is_a_legal_recipe(method, layer_groups, data):
    from mergekit.config import MergeConfiguration

    space = space_of(Path("/zoo"), METHODS, layer_groups=layer_groups)
    point = point_at(space, method, lambda low, high: data.draw(st.floats(low, high)))
    recipe = to_recipe(space, point)
    mapping = yaml.safe_load(recipe.to_yaml())
    parsed, notes = parse_recipe(mapping, where="test")
    assert parsed == recipe
    assert all(note.endswith(f"has no effect in {method}") for note in notes)
    values = recipe.values("model.layers.1.mlp.up_proj.weight", 0.5)
    if "della" in method:
        for density, half in zip(values["density"], values["epsilon"], strict=True):
            assert density >= 1 or 0 < density - half <= density + half < 1
    MergeConfiguration.model_validate(mapping)  # mergekit's own reading of the file


@pytest.mark.parametrize("own_study", [True, False])
@pytest.mark.parametrize("method", allowed_methods("abc"))
def test_a_point_builds(zoo, method, own_study):
    space = space_of(zoo, [method] if own_study else None)
    generator = torch.Generator().manual_seed(len(method))
    point = point_at(
        space,
        method,
        lambda low, high: low + (high - low) * torch.rand(1, generator=generator).item(),
    )
    recipe = to_recipe(space, point)
    family = ModelSet.open(recipe.models_read)
    for _, tensor in merged_tensors(recipe, family, torch.device("cpu")):
        assert tensor.isfinite().all()


@pytest.mark.parametrize(
    ("method", "base", "models"),
    [
        ("nuslerp", "/zoo/base", ["/zoo/a", "/zoo/c"]),
        ("slerp", "/zoo/a", ["/zoo/a", "/zoo/c"]),
        ("nearswap", "/zoo/base", ["/zoo/c"]),
        ("arcee_fusion", "/zoo/base", ["/zoo/c"]),
        ("passthrough", None, ["/zoo/c"]),
        ("karcher", None, ["/zoo/a", "/zoo/b", "/zoo/c"]),
        ("sce", "/zoo/base", ["/zoo/a", "/zoo/b", "/zoo/c"]),
    ],
)
def test_methods_of_few_models_take_the_donors_that_weigh_most(method, base, models):
    space = space_of(Path("/zoo"))
    recipe = to_recipe(space, space.point(method, (0.5, 0.1, 0.9)))
    assert recipe.base_model == base
    assert [source.model for source in recipe.models] == models


def test_nuslerp_interpolates_by_the_mixture():
    space = space_of(Path("/zoo"))
    first, second = to_recipe(space, space.point("nuslerp", (0.5, 0.1, 0.9))).values("x", 0)[
        "weight"
    ]
    assert second / (first + second) == pytest.approx(0.9 / 1.4)


def test_epsilon_is_bounded_by_the_density():
    space = space_of(Path("/zoo"), ["della"], density=0.95, epsilon=0.3)
    values = to_recipe(space, space.point("della", (1.0, 1.0, 1.0))).values("x", 0)
    assert values["epsilon"] == (0.049999,) * 3 or values["epsilon"] == (0.049998,) * 3


def test_one_name_of_two_meanings_follows_the_method_that_searches_it():
    both = space_of(Path("/zoo"), ["della", "ram"])
    assert to_recipe(both, both.point("ram", (1.0,) * 3)).values("x", 0) == {"epsilon": 1e-5}
    alone = space_of(Path("/zoo"), ["ram"], epsilon=2e-4)
    assert to_recipe(alone, alone.point("ram", (1.0,) * 3)).values("x", 0) == {"epsilon": 2e-4}
