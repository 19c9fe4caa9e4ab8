"""What is computed once per donor: the same from the disk, and never somebody else's."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_engine import cache
from merge_engine.donors import Checkpoint, Family, open_model
from merge_engine.pages import Page
from merge_engine.statistics import Magnitudes, Variances

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGESEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two donors with one tensor of 90,000 elements, enough to be kept on disk."""
    generator = torch.Generator().manual_seed(0)
    paths = []
    for name in ("base", "a", "b"):
        path = tmp_path_factory.mktemp("models") / name
        path.mkdir()
        (path / "config.json").write_text("{}")
        save_file({NAME: torch.randn(300, 300, generator=generator)}, path / "model.safetensors")
        paths.append(str(path))
    return paths


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def replace(file, contents):
    file.unlink()  # what has the old one mapped keeps it
    file.write_bytes(contents)


def forbidden(*_):
    raise AssertionError("measured again")


def measured(models):
    family = Family(models)
    base, *donors = models
    return {
        "magnitudes": family.magnitudes(NAME, donors[0], base).tensors(),
        "variances": family.variances(NAME, tuple(donors), base).tensors(),
        "gram": {"": family.gram(NAME, tuple(donors), base)},
        "gram of rows": {"": family.gram(NAME, tuple(donors), None, dim=-1)},
    }


def assert_same(one, other):
    for kind, tensors in one.items():
        assert tensors.keys() == other[kind].keys()
        assert all(torch.equal(tensor, other[kind][name]) for name, tensor in tensors.items())


def test_second_family_measures_nothing(models, folder, monkeypatch):
    first = measured(models)
    assert len(files(folder)) == 4
    assert all(file.suffix == ".safetensors" for file in files(folder))
    monkeypatch.setattr(Magnitudes, "of", forbidden)
    monkeypatch.setattr(Variances, "of", forbidden)
    monkeypatch.setattr("merge_engine.donors._gram", forbidden)
    assert_same(first, measured(models))


def test_each_statistic_has_its_own_file(models, folder):
    family = Family(models)
    base, one, other = models
    family.magnitudes(NAME, one, base)
    family.magnitudes(NAME, other, base)
    family.gram(NAME, (one, other), base)
    family.gram(NAME, (other, one), base)
    family.gram(NAME, (one, other, base), None)
    assert len(files(folder)) == 5


def test_what_is_as_large_as_the_weights_is_kept_for_studies_alone(models, folder, monkeypatch):
    base, donor, _ = models
    delta = Family(models).read(donor, NAME) - Family(models).read(base, NAME)
    order = delta.abs().argsort(dim=1, stable=True).argsort(dim=1)
    page = Page({NAME: tuple(delta.shape)})
    kinds = ("shares", "taken")
    first = [Family(models).beside(kind, page, donor, base) for kind in kinds]
    assert not files(folder)
    study = Family(models, candidates=2)
    for kind, once in zip(kinds, first, strict=True):
        assert torch.equal(study.beside(kind, page, donor, base), once)
    assert len(files(folder)) == 2
    monkeypatch.setattr("merge_engine.donors.row_ranks", forbidden)
    again = Family(models, candidates=2).beside("shares", page, donor, base)
    assert torch.equal(again, (order / (delta.shape[1] - 1)).half())


def test_small_tensors_are_measured_each_time(zoo, folder):
    family = Family([str(zoo / "base"), str(zoo / "a")])
    family.magnitudes(NAME, str(zoo / "a"), str(zoo / "base"))
    assert not files(folder)


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"\x10" * 5000])
def test_damaged_file_is_measured_again(models, folder, damage):
    first = measured(models)
    for file in files(folder):
        replace(file, damage)
    assert_same(first, measured(models))
    assert all(file.read_bytes() != damage for file in files(folder))


def test_file_cut_short_is_measured_again(models, folder):
    first = measured(models)
    for file in files(folder):
        replace(file, file.read_bytes()[:-4])
    assert_same(first, measured(models))


def test_folder_that_cannot_be_written_is_harmless(models, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MERGESEARCH_CACHE", str(tmp_path / "file" / "cache"))
    first = measured(models)
    assert_same(first, measured(models))


def test_failed_write_leaves_nothing(models, folder, monkeypatch):
    def full(_tensors, file):
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    measured(models)
    assert not files(folder)


def test_folder_is_the_users_cache_unless_named(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.folder() != Path("/x/mergesearch")
    monkeypatch.delenv("MERGESEARCH_CACHE")
    assert cache.folder() == Path("/x/mergesearch")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path.home() / ".cache" / "mergesearch"


def test_fingerprint_is_that_of_the_weights(models, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(models[1], path)
    weights = path / "model.safetensors"
    time = weights.stat().st_mtime_ns
    assert Checkpoint(str(path)).fingerprint == Checkpoint(models[1]).fingerprint
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert Checkpoint(str(path)).fingerprint == Checkpoint(models[1]).fingerprint

    tensors = load_file(weights)
    tensors[NAME] += 1e-3
    save_file(tensors, weights)
    os.utime(weights, ns=(time, time))  # the bytes alone differ
    assert Checkpoint(str(path)).fingerprint != Checkpoint(models[1]).fingerprint
    changed = Checkpoint(str(path)).fingerprint
    os.utime(weights, ns=(time + 1, time + 1))
    assert Checkpoint(str(path)).fingerprint != changed


def test_header_counts_where_no_piece_does(models, tmp_path):
    path = tmp_path / "renamed"
    shutil.copytree(models[1], path)
    tensors = load_file(path / "model.safetensors")
    time = (path / "model.safetensors").stat().st_mtime_ns
    save_file({NAME.replace("up", "go"): tensors[NAME]}, path / "model.safetensors")
    os.utime(path / "model.safetensors", ns=(time, time))
    assert Checkpoint(str(path)).fingerprint != Checkpoint(models[1]).fingerprint


def test_adapter_is_part_of_the_fingerprint(models, tmp_path):
    path = tmp_path / "adapter"
    path.mkdir()
    key = "base_model.model." + NAME.removesuffix(".weight")
    pair = {f"{key}.lora_A.weight": torch.ones(2, 300), f"{key}.lora_B.weight": torch.ones(300, 2)}
    save_file(pair, path / "adapter_model.safetensors")
    seen = {Checkpoint(models[0]).fingerprint}
    for alpha in (2, 4):
        (path / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "lora_alpha": alpha})
        )
        seen.add(open_model(f"{models[0]}+{path}").fingerprint)
    assert len(seen) == 3
