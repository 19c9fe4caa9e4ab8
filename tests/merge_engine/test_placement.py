"""Where tensors live changes no result."""

import torch
from transformers import AutoModelForCausalLM

from merge_engine.building.builder import Builder
from merge_engine.models.model_set import ModelSet
from merge_engine.recipe.recipe import Recipe


def test_tensors_that_stay_are_read_once_and_merge_alike(zoo):
    model_set = ModelSet.open(str(zoo / name) for name in ("base", "a", "b"))
    models = [{"model": str(zoo / m), "parameters": {"weight": 0.5}} for m in "ab"]
    fields = {"merge_method": "ties", "base_model": str(zoo / "base"), "models": models}
    recipe = Recipe.model_validate(fields | {"parameters": {"density": 0.5}})
    results = []
    for tier in ("disk", "device"):
        model_set.place(torch.device("cpu"), tier)
        builder = Builder(AutoModelForCausalLM.from_pretrained(zoo / "base"), model_set)
        builder.build(recipe)
        results.append(dict(builder.tensors()))
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
    name = "model.norm.weight"
    addresses = {model_set.read(str(zoo / "a"), name).data_ptr() for _ in range(2)}
    assert len(addresses) == 1
