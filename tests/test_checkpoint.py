import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from merge_engine.checkpoint import write_checkpoint
from merge_engine.donors import Checkpoint
from merge_engine.recipe import Recipe, RecipeError, load_recipe


@pytest.fixture
def source(zoo):
    return Checkpoint(str(zoo / "a"))


@pytest.fixture
def recipe(zoo):
    models = [{"model": str(zoo / "a"), "parameters": {"weight": 1.0}}]
    return Recipe.model_validate({"merge_method": "linear", "models": models})


@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
def test_what_is_written_loads_in_transformers_as_it_was(source, recipe, tmp_path, shard_bytes):
    tensors = [(name, source.read(name).bfloat16()) for name in source.tensors]
    out = tmp_path / "out"
    write_checkpoint(tensors, out, like=source, recipe=recipe, shard_bytes=shard_bytes)
    assert len(list(out.glob("*.safetensors"))) == 1 if shard_bytes > 10**8 else 3
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    live = model.state_dict()
    assert all(torch.equal(live[name], tensor) for name, tensor in tensors)
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"]
    assert (out / "generation_config.json").exists()
    assert load_recipe(out / "mergekit_config.yml")[0] == recipe
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_interrupted_write_leaves_no_folder_that_looks_whole(source, recipe, tmp_path):
    def failing():
        yield "model.norm.weight", source.read("model.norm.weight")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_checkpoint(failing(), tmp_path / "out", like=source, recipe=recipe)
    assert not (tmp_path / "out").exists()


def test_existing_folder_is_not_overwritten(source, recipe, tmp_path):
    with pytest.raises(RecipeError, match="exists; choose another folder"):
        write_checkpoint([], tmp_path, like=source, recipe=recipe)
