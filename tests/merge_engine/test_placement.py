"""Where tensors live changes no result."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from in_memory import IN_MEMORY, InMemoryTensors
from merge_engine.building.builder import Builder
from merge_engine.models.checkpoint import TensorInfo
from merge_engine.models.model_set import ModelSet
from merge_engine.models.placement import ON_DISK, Budget, Placed, Placement
from merge_engine.numerics.packing import ROWS, WIDTH
from merge_engine.recipe.recipe import Recipe


@pytest.mark.parametrize("method", ["ties", "della"])
def test_tensors_that_stay_are_read_once_and_merge_alike(method, zoo):
    model_set = ModelSet.open(str(zoo / name) for name in ("base", "a", "b"))
    models = [{"model": str(zoo / m), "parameters": {"weight": 0.5}} for m in "ab"]
    fields = {"merge_method": method, "base_model": str(zoo / "base"), "models": models}
    recipe = Recipe.model_validate(fields | {"parameters": {"density": 0.5}})
    results = []
    for budget in (ON_DISK, IN_MEMORY, replace(IN_MEMORY, sharers=2)):
        model_set.place(torch.device("cpu"), budget)
        builder = Builder(AutoModelForCausalLM.from_pretrained(zoo / "base"), model_set)
        builder.build(recipe)
        results.append(dict(builder.tensors()))
    for name, tensor in results[0].items():
        assert all(torch.equal(tensor, other[name]) for other in results[1:])
    name = "model.norm.weight"
    addresses = {model_set.read(str(zoo / "a"), name).data_ptr() for _ in range(2)}
    assert len(addresses) == 1


def test_packs_fill_the_device_then_pinned_memory_and_the_rest_is_read_from_disk():
    shapes = {f"x{number}": (ROWS * WIDTH // 2,) for number in range(8)}  # two fill a pack
    source = NoNumbers(shapes, ("base", "a", "b"))
    whole = 3 * 2 * ROWS * WIDTH  # of a pack in three models of bfloat16
    device = Budget(device=2 * whole + 1, pinned=whole)
    placement = Placement(source, torch.device("cpu"), device)
    assert placement.placed == Placed(2 * whole, whole, whole)
    assert [pack.names for pack in placement.packs] == [("x0", "x1"), ("x2", "x3"), ("x4", "x5")]
    ranked = Placement(source, torch.device("cpu"), Budget(device=2 * whole + 1, per_element=1))
    assert ranked.placed.device == whole * 4 // 3  # a byte for each element of two donors


def test_of_a_shared_pack_in_host_memory_a_part_counts():
    shapes = {"x": (ROWS * WIDTH,), "y": (ROWS * WIDTH,)}
    whole = 3 * 2 * ROWS * WIDTH  # of a pack in three models of bfloat16

    def placed(where, **budget):
        source = NoNumbers(shapes, ("base", "a", "b"), unknown=("y",))
        return Placement(source, torch.device(where), Budget(sharers=4, **budget)).placed

    assert placed("cpu", device=2 * whole) == Placed(device=whole // 4 + whole)
    assert placed("cuda", device=2 * whole) == Placed(device=2 * whole)
    assert placed("cuda", device=whole, pinned=1 << 40).pinned == whole  # nobody knows "y"
    assert placed("cuda", pinned=whole // 4) == Placed(pinned=whole // 4, disk=whole)


def test_pinned_memory_counts_as_the_power_of_two_that_is_allocated():
    source = NoNumbers({"x": (3 * WIDTH,)}, ("base", "a"))
    placed = Placement(source, torch.device("cpu"), Budget(pinned=1 << 30)).placed
    assert placed.pinned == 2 * 2 * 4 * WIDTH


class NoNumbers(InMemoryTensors):
    """Tensors of bfloat16 without numbers."""

    def __init__(self, shapes, models, unknown=()):
        self.unknown = unknown
        self.checkpoints = dict.fromkeys(models)
        self.inputs = {name: dict.fromkeys(models, name) for name in shapes}
        self.tensors = {name: TensorInfo(None, s, torch.bfloat16) for name, s in shapes.items()}

    def dtype_of(self, model, name):
        return torch.bfloat16

    def cache_key(self, model, name):
        return None if name in self.unknown else (model, name)
