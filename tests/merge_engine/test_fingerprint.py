"""A fingerprint differs wherever weights differ."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from merge_engine.models import fingerprint as module
from merge_engine.models.cache_folder import default_folder
from merge_engine.models.checkpoint import Checkpoint
from merge_engine.models.fingerprint import KnownFiles, fingerprint
from merge_engine.models.opening import open_model

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    tensor = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    save_file({NAME: tensor}, path / "model.safetensors")
    return str(path)


def copy_of(model, folder):
    shutil.copytree(model, folder)
    return folder / "model.safetensors"


def test_fingerprint_is_that_of_the_weights(model, tmp_path):
    weights = copy_of(model, tmp_path / "copy")
    os.utime(weights, (0, 0))
    assert Checkpoint(str(tmp_path / "copy")).fingerprint == Checkpoint(model).fingerprint
    (tmp_path / "copy" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert Checkpoint(str(tmp_path / "copy")).fingerprint == Checkpoint(model).fingerprint
    tensors = load_file(weights)
    save_file({NAME.replace("up", "go"): tensors[NAME]}, weights)
    assert Checkpoint(str(tmp_path / "copy")).fingerprint != Checkpoint(model).fingerprint


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
def test_every_bit_counts_though_size_and_date_stay(model, data):
    weights = Path(model, "model.safetensors")
    whole, status = weights.read_bytes(), weights.stat()
    before = Checkpoint(model).fingerprint
    place, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    try:
        flip = bytes([whole[place] ^ (1 << bit)])
        weights.write_bytes(whole[:place] + flip + whole[place + 1 :])
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert fingerprint([weights]) != before
    finally:
        weights.write_bytes(whole)
    assert fingerprint([weights]) == before


def test_files_are_read_once_as_long_as_they_stay(model, monkeypatch):
    monkeypatch.setattr(module, "SETTLED", -1)
    weights, read = Path(model, "model.safetensors"), []
    compute = module.checksum
    monkeypatch.setattr(module, "checksum", lambda file: read.append(file) or compute(file))
    first = fingerprint([weights])
    assert fingerprint([weights]) == first
    assert len(read) == 1
    os.utime(weights, (0, 0))
    assert fingerprint([weights]) == first
    assert len(read) == 2


def test_damaged_note_of_a_checksum_is_not_believed(model, monkeypatch):
    monkeypatch.setattr(module, "SETTLED", -1)
    weights = Path(model, "model.safetensors")
    first = fingerprint([weights])
    for note in (default_folder() / "checksums").iterdir():
        text = note.read_text()
        note.write_text(text.replace('"checksum": "', '"checksum": "f', 1))
    assert fingerprint([weights]) == first


def test_files_that_have_changed_or_are_gone_are_known(model):
    weights = Path(model, "model.safetensors")
    known = KnownFiles([weights])
    weights.touch()
    assert not known.have_changed()
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    assert known.have_changed()
    weights.write_bytes(whole)
    assert not known.have_changed()
    weights.unlink()
    assert known.have_changed()


def test_adapter_is_part_of_the_fingerprint(model, tmp_path):
    path = tmp_path / "adapter"
    path.mkdir()
    key = "base_model.model." + NAME.removesuffix(".weight")
    pair = {f"{key}.lora_A.weight": torch.ones(2, 300), f"{key}.lora_B.weight": torch.ones(300, 2)}
    save_file(pair, path / "adapter_model.safetensors")
    seen = {Checkpoint(model).fingerprint}
    for alpha in (2, 4):
        (path / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "lora_alpha": alpha})
        )
        seen.add(open_model(f"{model}+{path}").fingerprint)
    assert len(seen) == 3
