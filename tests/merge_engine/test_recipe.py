import pytest
import yaml

from merge_engine.errors import MergeError
from merge_engine.recipe.recipe_file import parse_recipe
from task_arithmetic import parsed


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parameters": {"normalize": True, "lambda": [0.2, 0.8]}, "dtype": "float32"},
        {"merge_method": "dare_ties", "seed": 7, "out_dtype": "torch.bfloat16"},
        {"parameters": {"weight": [{"filter": "mlp", "value": [0.1, 0.2]}, {"value": 1}]}},
    ],
)
def test_a_recipe_written_as_yaml_is_read_back_equal(changes):
    recipe, _ = parsed(**changes)
    again, notes = parse_recipe(yaml.safe_load(recipe.to_yaml()), "again")
    assert again == recipe
    assert again.key == recipe.key
    assert not notes


def test_key_tells_recipes_apart_but_not_the_dtype_of_mergekits_arithmetic():
    recipe, _ = parsed()
    assert parsed(dtype="float32")[0].key == recipe.key
    assert parsed(seed=3)[0].key == recipe.key  # nothing random in it
    assert parsed(parameters={"lambda": 0.5})[0].key != recipe.key
    assert (
        parsed(merge_method="dare_linear", seed=3)[0].key
        != parsed(merge_method="dare_linear")[0].key
    )


def test_a_changed_copy_forgets_what_was_derived_from_the_recipe():
    recipe, _ = parsed()
    key, donors = recipe.key, recipe.donors
    changed = recipe.model_copy(update={"models": recipe.models[:1]})
    assert changed.key != key
    assert changed.donors == donors[:1]


def test_a_models_own_setting_overrides_the_recipes_where_it_matches():
    own = {"weight": {"filter": "mlp", "value": 0.9}}
    models = [{"model": "a", "parameters": own}, {"model": "b"}]
    recipe, _ = parsed(models=models, parameters={"weight": 0.2})
    assert recipe.values("layers.0.mlp.w", 0.0)["weight"] == (0.9, 0.2)
    assert recipe.values("layers.0.attn.w", 0.0)["weight"] == (0.2, 0.2)


def test_numbers_and_booleans_written_as_strings_are_converted():
    recipe, _ = parsed(parameters={"normalize": "false", "lambda": "1e-1"})
    assert recipe.values("x", 0.0)["lambda_"] == 0.1
    assert recipe.values("x", 0.0)["normalize"] is False


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"density": 1.5}, r"parameter 'density' for 'x': 1.5 is outside \[0, 1\]"),
        ({"lambda": "high"}, "'high' is not a number"),
        ({"normalize": "maybe"}, "'maybe' is neither true nor false"),
        ({"lambda": float("nan")}, "not a finite number"),
    ],
)
def test_wrong_value_is_refused_when_it_is_read(parameters, message):
    recipe, _ = parsed(merge_method="ties", parameters=parameters)
    with pytest.raises(MergeError, match=message):
        recipe.values("x", 0.0)


def test_missing_parameter_is_named_with_its_model():
    recipe, _ = parsed(models=[{"model": "a"}])
    with pytest.raises(MergeError, match="'a': task_arithmetic needs the parameter 'weight'"):
        recipe.values("x", 0.0)
