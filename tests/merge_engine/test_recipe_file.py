import pytest
import yaml

from merge_engine.errors import MergeError
from merge_engine.recipe.recipe_file import load_recipe, parse_recipe
from task_arithmetic import TASK_ARITHMETIC, parsed


def test_parameters_at_the_top_level_are_applied_and_noted():
    recipe, notes = parsed(normalize=True, int8_mask=True)
    assert recipe.values("x", 0.0)["normalize"] is True
    assert any("normalize: True is at the top level" in note for note in notes)
    assert any("'int8_mask' has no effect" in note for note in notes)


def test_settings_under_parameters_override_those_at_the_top_level():
    recipe, _ = parsed(normalize=True, parameters={"normalize": False})
    assert recipe.values("x", 0.0)["normalize"] is False


def test_shared_parameters_are_not_read_from_a_model():
    recipe, notes = parsed(models=[{"model": "a", "parameters": {"weight": 1, "lambda": 0.1}}])
    assert recipe.values("x", 0.0)["lambda_"] == 1.0
    assert any("'lambda' is read only from the recipe's own" in note for note in notes)


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
        ({"merge_method": "slerp"}, "slerp takes exactly 2 models, got 3"),
        ({"parameters": {"weight": {"filter": {"a": 1}, "value": 1}}}, "a filter is a part of"),
        ({"base_model": {"model": "a", "override_architecture": "X"}}, "override_architecture is"),
        ({"merge_method": "model_stock", "models": [{"model": "a"}]}, "at least 2 models besides"),
        ({"dtype": "int4"}, "dtype: Input should be"),
        (
            {"slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]},
            "one of models, slices and modules; it has models and slices",
        ),
        ({"models": None}, "one of models, slices and modules; it has none"),
        ({"models": []}, "one of models, slices and modules; it has none"),
        ({"models": None, "modules": {"t": {}}}, "modules need 'slices' or 'models'"),
        ({"models": None, "modules": {"t": None}}, "modules.t has to be a mapping with 'models'"),
        ({"models": None, "modules": [1]}, r"'modules' has to be a mapping \(got \[1\]\)"),
        ({"models": None, "slices": [{}]}, r"slices.0.sources: Field required"),
        (
            {"models": None, "slices": [{"sources": []}]},
            r"slices.0.sources: Input should be a list with an entry \(got \[\]\)",
        ),
        ({"models": None, "slices": [None]}, r"'slices' has to be a list of '- sources:"),
        ({"models": [None]}, "'models' has to be a list of '- model: NAME' entries"),
        ({"models": [{"model": None}]}, r"models.0.model: Input should be .* string \(got None"),
        ({"models": [{"model": "a", "parameters": [1]}]}, r"parameters: Input should be a mapping"),
        ({"parameters": []}, r"parameters: Input should be a mapping \(got \[\]\)"),
        ({"parameters": {"lambda": None}}, "parameters.lambda: None: expected a number, a list"),
        ({"tokenizer": []}, "tokenizer has to be a mapping"),
        ({"tokenizer": {"tokens": []}}, r"tokenizer: 'tokens' has to be a mapping \(got \[\]\)"),
        ({"tokenizer": {"tokens": {"x": 3}}}, r"tokenizer.tokens.x: Input should be a mapping"),
        ({"tokenizer": {"tokens": {"x": {"source": []}}}}, r"x.source: Input should be a mapping"),
        ({"parameters": {"lambda": {"valeu": 1}}}, "a clause has the keys"),
    ],
)
def test_wrong_recipe_is_refused_with_the_fix(changes, message):
    with pytest.raises(MergeError, match=message):
        parsed(**changes)


@pytest.mark.parametrize(
    "empty",
    [
        {"slices": None, "modules": None},
        {"slices": [], "modules": {}},
        {"tokenizer": None, "tokenizer_source": None, "dtype": None, "seed": None},
        {"tokenizer": {"source": None, "tokens": None}},
        {"models": [{"model": "a", "parameters": None}]},
    ],
)
def test_key_with_nothing_behind_it_is_as_if_left_out(empty):
    assert parsed(**empty) == parsed(**_without_empty(empty))


def _without_empty(part):
    if isinstance(part, list):
        return [_without_empty(entry) for entry in part]
    if not isinstance(part, dict):
        return part
    return {key: _without_empty(value) for key, value in part.items() if value}


def test_several_modules_are_refused():
    modules = {part: {"models": [{"model": "a"}]} for part in ("text_decoder", "vision_tower")}
    message = "modules text_decoder, vision_tower: several .* write 'models', .* 'filter' entries"
    with pytest.raises(MergeError, match=message):
        parse_recipe({"merge_method": "linear", "modules": modules}, "r.yaml")


def test_folders_beside_the_file_are_found_from_anywhere(tmp_path):
    (tmp_path / "base").mkdir()
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(TASK_ARITHMETIC))
    recipe, _ = load_recipe(path)
    assert recipe.base_model == str(tmp_path / "base")
    assert recipe.models[0].model == "a"  # no such folder: left for the hub


@pytest.mark.parametrize(("text", "message"), [("a: [", "not YAML"), ("- a", "a mapping of keys")])
def test_a_file_without_a_recipe_is_refused(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(MergeError, match=message):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(MergeError, match="No such file"):
        load_recipe(tmp_path / "missing.yaml")


def test_every_folder_that_a_recipe_names_becomes_absolute_but_no_word_of_its_vocabulary(tmp_path):
    for name in ("base", "union", "a", "lora"):
        (tmp_path / name).mkdir()
    a, base = str(tmp_path / "a"), str(tmp_path / "base")
    tokens = {
        "<x>": {"source": "base"},
        "<y>": {"source": {"kind": "model_token", "model": "a", "token": "y"}},
    }
    slices = [{"base_model": "base", "sources": [{"model": "a+lora", "layer_range": [0, 1]}]}]
    mapping = {"merge_method": "linear", "slices": slices}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(mapping | {"tokenizer": {"source": "union", "tokens": tokens}}))
    recipe, _ = load_recipe(path)
    assert recipe.slices[0].base_model == base
    assert recipe.slices[0].sources[0].model == f"{a}+{tmp_path / 'lora'}"
    assert recipe.tokenizer.source == "union"
    assert recipe.tokenizer.tokens["<x>"].source == base
    assert recipe.tokenizer.tokens["<y>"].source.model == a
    for source, found in (("base", "base"), ("a", a)):
        path.write_text(yaml.safe_dump(mapping | {"tokenizer_source": source}))
        assert load_recipe(path)[0].tokenizer_source == found


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"base_model": "b", "gate_mode": "hidden", "experts": []}, "'gate_mode' .* mergekit-moe"),
        ({"base_model": "b", "experts": [{"source_model": "a"}]}, "'experts' .* of mergekit-moe"),
        ({"genome": {"models": ["a"]}, "tasks": []}, "'genome' .* mergekit-evolve; .* init"),
    ],
)
def test_configuration_of_another_tool_is_refused_by_its_name(mapping, message):
    with pytest.raises(MergeError, match=message):
        parse_recipe(mapping, "r.yaml")


def test_prefix_of_old_recipes_is_taken_off_a_source_of_the_vocabulary():
    assert parsed(tokenizer_source="model:a")[0].tokenizer_source == "a"
    assert parsed(tokenizer={"source": "model:org/name"})[0].tokenizer.source == "org/name"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-8"])
def test_recipe_is_read_in_any_encoding_of_unicode(tmp_path, encoding):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(TASK_ARITHMETIC) + "# é\n", encoding=encoding)
    assert load_recipe(path)[0].base_model == "base"


@pytest.mark.parametrize("encoding", ["utf-16-le", "latin-1"])
def test_text_in_an_unknown_encoding_is_to_be_saved_again(tmp_path, encoding):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(TASK_ARITHMETIC) + "# é\n", encoding=encoding)
    with pytest.raises(MergeError, match=r"not YAML: .*; save it as UTF-8 text"):
        load_recipe(path)


def test_several_documents_are_no_single_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    text = yaml.safe_dump(TASK_ARITHMETIC)
    path.write_text(f"---\n{text}---\n")
    assert load_recipe(path)[0].base_model == "base"  # the second is empty
    path.write_text(f"{text}---\n{text}")
    with pytest.raises(MergeError, match=r"2 documents, .* are built by `mergesearch build`"):
        load_recipe(path)
