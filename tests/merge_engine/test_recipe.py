import pytest
import yaml

from merge_engine.errors import MergeError
from merge_engine.recipe.recipe_file import load_recipe, parse_recipe

TASK_ARITHMETIC = {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "models": [
        {"model": "a", "parameters": {"weight": 1.0}},
        {"model": "b", "parameters": {"weight": [0.3, 0.7]}},
    ],
}


def parsed(**changes):
    return parse_recipe({**TASK_ARITHMETIC, **changes}, "r.yaml")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parameters": {"normalize": True, "lambda": [0.2, 0.8]}, "dtype": "float32"},
        {"merge_method": "dare_ties", "seed": 7, "out_dtype": "torch.bfloat16"},
        {"parameters": {"weight": [{"filter": "mlp", "value": [0.1, 0.2]}, {"value": 1}]}},
    ],
)
def test_yaml_and_back(changes):
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


def test_flat_parameters_are_applied_and_said():
    recipe, notes = parsed(normalize=True, int8_mask=True)
    assert recipe.values("x", 0.0)["normalize"] is True
    assert any("normalize: True is at the top level" in note for note in notes)
    assert any("'int8_mask' has no effect" in note for note in notes)


def test_settings_under_parameters_win_over_flat_ones():
    recipe, _ = parsed(normalize=True, parameters={"normalize": False})
    assert recipe.values("x", 0.0)["normalize"] is False


def test_a_models_own_setting_wins_unless_it_does_not_match():
    own = {"weight": {"filter": "mlp", "value": 0.9}}
    models = [{"model": "a", "parameters": own}, {"model": "b"}]
    recipe, _ = parsed(models=models, parameters={"weight": 0.2})
    assert recipe.values("layers.0.mlp.w", 0.0)["weight"] == (0.9, 0.2)
    assert recipe.values("layers.0.attn.w", 0.0)["weight"] == (0.2, 0.2)


def test_shared_parameters_do_not_come_from_a_model():
    recipe, notes = parsed(models=[{"model": "a", "parameters": {"weight": 1, "lambda": 0.1}}])
    assert recipe.values("x", 0.0)["lambda_"] == 1.0
    assert any("'lambda' is read only from the recipe's own" in note for note in notes)


def test_numbers_written_as_words_are_numbers():
    recipe, _ = parsed(parameters={"normalize": "false", "lambda": "1e-1"})
    assert recipe.values("x", 0.0)["lambda_"] == 0.1
    assert recipe.values("x", 0.0)["normalize"] is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_method": "tise"}, "unknown merge_method 'tise'; did you mean 'ties'"),
        ({"merge_metod": "ties"}, "unknown key 'merge_metod'; did you mean 'merge_method'"),
        ({"parameters": {"densty": 0.1}}, "unknown key 'densty'; did you mean 'density'"),
        ({"models": [{"modle": "a"}]}, r"models\[0\]: unknown key 'modle'; did you mean 'model'"),
        ({"models": {"model": "a"}}, "'models' has to be a list"),
        ({"models": [{"model": "a"}, {"model": "a"}]}, "listed more than once"),
        ({"base_model": None}, "task_arithmetic needs a base_model"),
        ({"merge_method": "slerp"}, "slerp starts from base_model 'base', which has to be one of"),
        ({"merge_method": "model_stock", "models": [{"model": "a"}]}, "at least 2 models besides"),
        ({"dtype": "int4"}, "dtype: Input should be"),
        ({"slices": []}, "one of models, slices and modules; it has models and slices"),
        ({"models": None}, "one of models, slices and modules; it has none"),
        ({"parameters": {"lambda": {"valeu": 1}}}, "a clause has the keys"),
    ],
)
def test_wrong_recipe_is_refused_with_the_fix(changes, message):
    with pytest.raises(MergeError, match=message):
        parsed(**changes)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"density": 1.5}, r"parameter 'density' for 'x': 1.5 is outside \[0, 1\]"),
        ({"lambda": "high"}, "'high' is not a number"),
        ({"normalize": "maybe"}, "'maybe' is neither true nor false"),
        ({"lambda": float("nan")}, "not a finite number"),
    ],
)
def test_wrong_value_is_refused_where_it_counts(parameters, message):
    recipe, _ = parsed(merge_method="ties", parameters=parameters)
    with pytest.raises(MergeError, match=message):
        recipe.values("x", 0.0)


def test_several_modules_are_refused_for_only_mergekit_knows_which_tensors_are_whose():
    modules = {part: {"models": [{"model": "a"}]} for part in ("text_decoder", "vision_tower")}
    message = "modules text_decoder, vision_tower: several .* write 'models', .* 'filter' entries"
    with pytest.raises(MergeError, match=message):
        parse_recipe({"merge_method": "linear", "modules": modules}, "r.yaml")


def test_missing_parameter_is_named_with_its_model():
    recipe, _ = parsed(models=[{"model": "a"}])
    with pytest.raises(MergeError, match="'a': task_arithmetic needs the parameter 'weight'"):
        recipe.values("x", 0.0)


def test_folders_beside_the_file_are_found_from_anywhere(tmp_path):
    (tmp_path / "base").mkdir()
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(TASK_ARITHMETIC))
    recipe, _ = load_recipe(path)
    assert recipe.base_model == str(tmp_path / "base")
    assert recipe.models[0].model == "a"  # no such folder: left for the hub


@pytest.mark.parametrize(("text", "message"), [("a: [", "not YAML"), ("- a", "a mapping of keys")])
def test_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(MergeError, match=message):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(MergeError, match="No such file"):
        load_recipe(tmp_path / "missing.yaml")
