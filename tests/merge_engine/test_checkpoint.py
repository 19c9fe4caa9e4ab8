import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_engine.errors import MergeError
from merge_engine.models.checkpoint import Checkpoint
from merge_engine.models.model_set import ModelSet
from tiny_models import pickled_twin


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_shards_read_like_a_single_file(zoo, make_model, tmp_path):
    sharded = make_model(tmp_path / "sharded", seed=1, base=zoo / "base", shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, other = Checkpoint(str(zoo / "a")), Checkpoint(str(sharded))
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.tensors)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("is_copy", [False, True])
def test_copy_of_a_tied_head_is_no_tensor_of_the_model_but_another_head_is(
    zoo, tmp_path, is_copy, pickled
):
    folder = copy_of(zoo / "base", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert "lm_head.weight" in Checkpoint(str(zoo / "base")).tensors
    tensors = load_file(folder / "model.safetensors")
    if is_copy:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    (folder / "model.safetensors").unlink()
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    assert ("lm_head.weight" not in Checkpoint(str(folder)).tensors) == is_copy


TWINS = {"single": {}, "shards": {"shards": 3}, "legacy": {"legacy": True}}


@pytest.fixture(scope="module")
def tied(make_model, tmp_path_factory):
    """A base and a donor whose heads are their embeddings."""
    folder = tmp_path_factory.mktemp("tied")
    base = make_model(folder / "base", seed=0, tie_word_embeddings=True)
    make_model(folder / "a", seed=1, base=base)
    return folder


@pytest.mark.parametrize("kind", TWINS)
@pytest.mark.parametrize("family", ["zoo", "tied"])
def test_pickled_twins_build_the_same_bits(request, tmp_path, build, family, kind):
    models = request.getfixturevalue(family)
    twins = {n: pickled_twin(models / n, tmp_path / n, **TWINS[kind]) for n in ("base", "a")}

    def recipe(base, donor):
        return {
            "merge_method": "ties",
            "base_model": str(base),
            "models": [{"model": str(donor), "parameters": {"weight": 0.7, "density": 0.5}}],
        }

    expected = build(recipe(models / "base", models / "a"), tmp_path / "expected")
    for base, donor in [(twins["base"], twins["a"]), (models / "base", twins["a"])]:
        built = build(recipe(base, donor), tmp_path / f"of_{base.parent.name}")
        assert built.keys() == expected.keys()
        assert all(torch.equal(built[name], expected[name]) for name in expected)


def test_pickled_model_has_a_fingerprint_that_a_copy_shares(zoo, tmp_path):
    twin = Checkpoint(str(pickled_twin(zoo / "a", tmp_path / "a")))
    other = Checkpoint(str(pickled_twin(zoo / "b", tmp_path / "b")))
    copy = Checkpoint(str(copy_of(tmp_path / "a", tmp_path)))
    os.utime(copy.folder / "pytorch_model.bin", (0, 0))
    assert twin.fingerprint == copy.fingerprint != other.fingerprint


def test_release_unmaps_a_pickled_file(zoo, tmp_path):
    checkpoint = Checkpoint(str(pickled_twin(zoo / "a", tmp_path / "a")))
    file = str(tmp_path / "a" / "pytorch_model.bin")
    total = sum(checkpoint.read(name).sum().item() for name in checkpoint.tensors)
    assert file in Path("/proc/self/maps").read_text()
    checkpoint.release()
    assert file not in Path("/proc/self/maps").read_text()
    assert sum(checkpoint.read(name).sum().item() for name in checkpoint.tensors) == total


@pytest.mark.parametrize(
    ("rename", "shown"),
    [
        (lambda name: f"module.{name}", "'module.'"),
        (lambda name: f"_orig_mod.{name}", "'_orig_mod.'"),
        (lambda name: name.replace("layers.1.", "layers.1._orig_mod."), "'_orig_mod.'"),
    ],
)
def test_names_with_a_wrapper_are_refused_by_it(zoo, tmp_path, rename, shown):
    folder = copy_of(zoo / "a", tmp_path)
    file = folder / "model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(MergeError, match=f"have {shown} in them, of a wrapper in training"):
        ModelSet.open([str(zoo / "base"), str(folder)])


def test_quantised_donor_is_refused_by_kind_before_shapes_are_compared(zoo, tmp_path):
    folder = copy_of(zoo / "a", tmp_path)
    file = folder / "model.safetensors"
    name = "model.layers.0.mlp.up_proj.weight"
    packed = {name: torch.zeros(8, 1, dtype=torch.uint8), f"{name}.absmax": torch.zeros(3)}
    save_file(load_file(file) | packed, file)
    for models in ([zoo / "base", folder], [folder, zoo / "base"]):
        with pytest.raises(MergeError, match=r"copy' is quantised \(bitsandbytes 4-bit: it has"):
            ModelSet.open(map(str, models))
