import json
import shutil

import pytest

from merge_engine.building.plan import plan_merge
from merge_engine.models.checkpoint import Checkpoint
from merge_engine.models.config_differences import config_notes
from merge_engine.recipe.recipe_file import parse_recipe


@pytest.fixture
def changed(zoo, tmp_path):
    """Copies the donor ``a`` with other values in its config; None removes a key."""

    def change(**values):
        folder = tmp_path / "changed"
        shutil.copytree(zoo / "a", folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text()) | values
        kept = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))
        return str(folder)

    return change


def notes(zoo, model):
    models = [Checkpoint(str(zoo / "base")), Checkpoint(model)]
    return config_notes(models[0], models)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"num_attention_heads": 2}, "num_attention_heads 2 (4)"),
        ({"rms_norm_eps": 0.1}, "rms_norm_eps 0.1 (1e-06)"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' ('silu')"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_theta 500000.0"),
        ({"rope_parameters": None, "rope_theta": 5e5}, "rope_theta 500000.0 (10000.0)"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
    ],
)
def test_model_that_computes_something_else_is_noted_with_its_keys(zoo, changed, values, text):
    if "rope_scaling" in values:
        values |= {"rope_parameters": None, "rope_theta": 10000.0}
    (note,) = notes(zoo, changed(**values))
    assert text in note
    assert "changed' has in its config.json" in note


@pytest.mark.parametrize(
    "values",
    [
        {"transformers_version": "4.1", "use_cache": False, "eos_token_id": 7},
        {"rope_parameters": None, "rope_theta": 10000},
        {"rope_parameters": None},
        {"attention_bias": None, "hidden_act": None, "rms_norm_eps": None},
        {"max_position_embeddings": 4096, "unsloth_fixed": True, "_name_or_path": "x"},
    ],
)
def test_ways_to_write_one_config_are_not_noted(zoo, changed, values):
    assert notes(zoo, changed(**values)) == []


def test_plan_of_a_recipe_has_the_note(zoo, changed):
    models = [{"model": changed(num_attention_heads=2), "parameters": {"weight": 1}}]
    mapping = {"merge_method": "linear", "base_model": str(zoo / "base"), "models": models}
    mapping["models"].append({"model": str(zoo / "base"), "parameters": {"weight": 1}})
    assert "num_attention_heads 2 (4)" in plan_merge(parse_recipe(mapping, "r")[0]).notes()[0]
