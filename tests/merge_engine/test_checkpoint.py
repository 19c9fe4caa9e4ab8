import json
import shutil

import pytest
import torch

from merge_engine.errors import MergeError
from merge_engine.models.checkpoint import Checkpoint
from merge_engine.models.model_set import ModelSet


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_shards_read_like_a_single_file(zoo, make_model, tmp_path):
    sharded = make_model(tmp_path / "sharded", seed=1, base=zoo / "base", shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, other = Checkpoint(str(zoo / "a")), Checkpoint(str(sharded))
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.tensors)


def test_copy_of_a_tied_head_is_not_a_tensor_of_the_model(zoo, tmp_path):
    folder = copy_of(zoo / "base", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert "lm_head.weight" in Checkpoint(str(zoo / "base")).tensors
    assert "lm_head.weight" not in Checkpoint(str(folder)).tensors


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
