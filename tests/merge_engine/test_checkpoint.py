import json
import shutil

import pytest
import torch

from merge_engine.errors import MergeError
from merge_engine.models.checkpoint import Checkpoint
from merge_engine.models.model_set import ModelSet
from merge_engine.models.tensor_names import layer_position


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_shards_read_like_a_single_file(zoo, make_model, tmp_path):
    sharded = make_model(tmp_path / "sharded", seed=1, base=zoo / "base", shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, other = Checkpoint(str(zoo / "a")), Checkpoint(str(sharded))
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.tensors)


def test_layers_and_depth_come_from_names(zoo):
    family = ModelSet.open([str(zoo / "base"), str(zoo / "a")])
    assert family.layer_filters == ("layers.0.", "layers.1.", "layers.2.")
    assert [family.depth(f"model.layers.{i}.mlp.up_proj.weight") for i in range(3)] == [0, 0.5, 1]
    assert family.depth("model.norm.weight") == 0.0
    assert layer_position("transformer.h.11.attn.weight") == ("transformer.h.", 11, "attn.weight")


def test_gram_is_that_of_the_task_vectors(zoo):
    models = tuple(str(zoo / name) for name in "ab")
    family = ModelSet.open([str(zoo / "base"), *models])
    name = "model.layers.1.mlp.up_proj.weight"
    base = family.read(str(zoo / "base"), name).double()
    rows = torch.stack([family.read(model, name).double() - base for model in models])  # (n, r, c)
    expected = torch.einsum("irc,jrc->rij", rows, rows)
    by_row = family.measurements.gram(name, models, str(zoo / "base"), dim=-1)
    torch.testing.assert_close(by_row, expected)
    whole = family.measurements.gram(name, models, str(zoo / "base"))
    torch.testing.assert_close(whole, expected.sum(0))


def test_copy_of_a_tied_head_is_not_a_tensor_of_the_model(zoo, tmp_path):
    folder = copy_of(zoo / "base", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert "lm_head.weight" in Checkpoint(str(zoo / "base")).tensors
    assert "lm_head.weight" not in Checkpoint(str(folder)).tensors


def test_other_shapes_are_refused_by_name(zoo, make_model, tmp_path):
    other = make_model(tmp_path / "wide", seed=0, intermediate_size=96)
    with pytest.raises(MergeError, match=r"differ in the shape of 'model.layers.0.mlp.down_proj"):
        ModelSet.open([str(zoo / "base"), str(other)])


def test_other_architectures_are_refused_by_name(zoo, make_model, tmp_path):
    other = make_model(tmp_path / "deep", seed=0, num_hidden_layers=4)
    with pytest.raises(MergeError, match=r"only '.*deep' has 'model.layers.3.input_layernorm"):
        ModelSet.open([str(zoo / "base"), str(other)])


@pytest.mark.parametrize(
    ("model", "message"),
    [("no/such/folder", "not a hub id"), ("nobody/nothing", "not to be had from the hub")],
)
def test_missing_model_is_refused_by_name(model, message):
    with pytest.raises(MergeError, match=f"model '{model}': no such folder, and {message}"):
        Checkpoint(model)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(MergeError, match="convert it to safetensors"):
        ModelSet.open([str(tmp_path)])
