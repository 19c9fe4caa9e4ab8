"""Models that fit one another: layers, depths, and what does not fit."""

import pytest

from merge_engine.errors import MergeError
from merge_engine.models.model_set import ModelSet
from merge_engine.models.tensor_names import layer_filters, layer_position


def test_layers_and_depth_come_from_names(zoo):
    model_set = ModelSet.open([str(zoo / "base"), str(zoo / "a")])
    assert model_set.layer_filters == ("layers.0.", "layers.1.", "layers.2.")
    assert [model_set.depth(f"model.layers.{i}.mlp.up_proj.weight") for i in range(3)] == [
        0,
        0.5,
        1,
    ]
    assert model_set.depth("model.norm.weight") == 0.0
    assert layer_position("transformer.h.11.attn.weight") == ("transformer.h.", 11, "attn.weight")


def test_other_shapes_are_refused_by_name(zoo, make_model, tmp_path):
    other = make_model(tmp_path / "wide", seed=0, intermediate_size=96)
    with pytest.raises(MergeError, match=r"differ in the shape of 'model.layers.0.mlp.down_proj"):
        ModelSet.open([str(zoo / "base"), str(other)])


def test_other_architectures_are_refused_by_name(zoo, make_model, tmp_path):
    other = make_model(tmp_path / "deep", seed=0, num_hidden_layers=4)
    with pytest.raises(
        MergeError, match=r"lacks 'model.layers.3.input_layernorm.*', which '.*deep' has"
    ):
        ModelSet.open([str(zoo / "base"), str(other)])


@pytest.mark.parametrize(
    ("stacks", "first"),
    [
        (["model.layers."], "layers.0."),
        (["encoder.block.", "decoder.block."], "block.0."),
        (["vision_tower.encoder.layers.", "language_model.model.layers."], "model.layers.0."),
        (
            ["vision_model.model.layers.", "language_model.model.layers."],
            "language_model.model.layers.0.",
        ),
        (["model.visual.blocks.", "model.language_model.layers."], "layers.0."),
    ],
)
def test_layer_filters_are_those_of_the_text(stacks, first):
    names = [f"{stack}{layer}.w" for stack in stacks for layer in range(2)]
    text = [stack for stack in stacks if "language_model" in stack] or stacks
    filters = layer_filters(names)
    assert filters[0] == first
    for layer, part in enumerate(filters):
        assert [name for name in names if part in name] == [f"{each}{layer}.w" for each in text]
