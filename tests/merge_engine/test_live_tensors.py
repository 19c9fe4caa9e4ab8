import itertools
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from architectures import make_architecture, save_family
from in_memory import IN_MEMORY
from merge_engine.building.builder import Builder
from merge_engine.building.live_tensors import LiveTensors
from merge_engine.errors import MergeError
from merge_engine.models.architecture import auto_class, load_config
from merge_engine.models.checkpoint import Checkpoint
from merge_engine.models.model_set import ModelSet
from merge_engine.models.placement import ON_DISK
from merge_engine.numerics.packing import WIDTH
from merge_engine.recipe.recipe_file import parse_recipe

WIDE = {"hidden_size": 64, "intermediate_size": 64}  # an expert's matrix fills rows of a pack


def load(folder):
    return auto_class(load_config(folder)).from_pretrained(folder, dtype=torch.float32)


def shapes_of(folder):
    return {name: info.shape for name, info in Checkpoint(str(folder)).tensors.items()}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("experts"), "mixtral", **WIDE)


def test_targets_of_experts_are_parts_of_the_live_stack(experts):
    model = load(experts / "base")
    live = LiveTensors(model, shapes_of(experts / "base"))
    stored = Checkpoint(str(experts / "base"))
    fused = model.model.layers[0].mlp.experts.gate_up_proj
    inside = range(fused.data_ptr(), fused.data_ptr() + fused.nbytes)
    assert live.targets.keys() == stored.tensors.keys()
    for name, target in live.targets.items():
        assert torch.equal(target, stored.read(name))
        if "layers.0" in name and name.endswith(("w1.weight", "w3.weight")):
            assert target.data_ptr() in inside


def test_runs_are_in_the_order_of_the_live_stack(experts):
    live = LiveTensors(load(experts / "base"), shapes_of(experts / "base"))
    assert len(live.runs) == 4  # of two layers, gate beside up and down
    for run in live.runs:
        ends = [live.targets[name].data_ptr() for name in run]
        sizes = [live.targets[name].nbytes for name in run]
        assert [b - a for a, b in itertools.pairwise(ends)] == sizes[:-1]
        assert all(size % (4 * WIDTH) == 0 for size in sizes)


@pytest.mark.parametrize("mixed", [False, True])
def test_experts_merge_to_the_same_bits_packed_and_one_by_one(experts, mixed, tmp_path):
    models = [str(experts / name) for name in ("base", "a", "b")]
    if mixed:  # a donor of which some experts are in another dtype, so that packs are cut through
        shutil.copytree(experts / "b", tmp_path / "b")
        stored = load_file(experts / "b" / "model.safetensors")
        changed = {n: t.bfloat16() if "experts.1.w" in n else t for n, t in stored.items()}
        save_file(changed, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
        models[2] = str(tmp_path / "b")
    entries = [{"model": m, "parameters": {"weight": 0.5, "density": 0.6}} for m in models[1:]]
    mapping = {"merge_method": "dare_ties", "base_model": models[0], "models": entries}
    recipe, _ = parse_recipe(mapping, "r.yaml")
    built = []
    for budget in (ON_DISK, IN_MEMORY):
        model_set = ModelSet.open(models)
        model_set.place(torch.device("cpu"), budget)
        builder = Builder(load(experts / "base"), model_set)
        builder.build(recipe)
        built.append(builder.model.state_dict())
    assert built[0].keys() == built[1].keys()
    assert all(torch.equal(tensor, built[1][name]) for name, tensor in built[0].items())


@pytest.mark.parametrize("model_type", ["gemma3", "llava"])
def test_layout_of_the_hub_is_the_layout_of_the_targets(model_type, tmp_path):
    folder = save_family(tmp_path, model_type, ()) / "base"
    file = folder / "model.safetensors"
    old = "vision_tower.vision_model."  # as these were published
    stored = {n.replace("vision_tower.", old): each for n, each in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    live = LiveTensors(load(folder), shapes_of(folder))
    assert live.targets.keys() == stored.keys()
    assert all(torch.equal(live.targets[name], tensor) for name, tensor in stored.items())


def test_stored_tensors_that_the_model_does_not_read_have_no_target():
    shapes = {name: tuple(p.shape) for name, p in make_architecture("llama").named_parameters()}
    live = LiveTensors(make_architecture("llama"), shapes | {"mtp.head.weight": (4, 4)})
    assert live.targets.keys() == shapes.keys()


def test_live_tensor_without_a_stored_one_is_refused():
    model = make_architecture("llama")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    del shapes["model.norm.weight"]
    with pytest.raises(MergeError, match=r"has 'model.norm.weight', which the donors lack"):
        LiveTensors(model, shapes)


def test_other_shape_than_the_live_models_is_refused():
    model = make_architecture("llama")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with pytest.raises(MergeError, match=r"its shape is \[32\], theirs make \[33\]"):
        LiveTensors(model, shapes | {"model.norm.weight": (33,)})


def test_other_rows_than_the_live_models_need_a_tokenizer():
    model = make_architecture("llama")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    rows = {"model.embed_tokens.weight": (101, 32)}
    with pytest.raises(MergeError, match=r"\[99, 32\].*\[101, 32\]; say .* 'tokenizer: "):
        LiveTensors(model, shapes | rows)


def test_plain_module_has_its_own_names():
    live = LiveTensors(nn.Linear(2, 3), {"weight": (3, 2), "bias": (3,)})
    assert [*live.targets] == ["weight", "bias"]
