"""A fingerprint differs wherever weights differ."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_engine.models.checkpoint import Checkpoint, open_model

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    tensor = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    save_file({NAME: tensor}, path / "model.safetensors")
    return str(path)


def test_fingerprint_is_that_of_the_weights(model, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(model, path)
    weights = path / "model.safetensors"
    time = weights.stat().st_mtime_ns
    assert Checkpoint(str(path)).fingerprint == Checkpoint(model).fingerprint
    assert Checkpoint(str(path)).content_hash == Checkpoint(model).content_hash
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert Checkpoint(str(path)).fingerprint == Checkpoint(model).fingerprint

    tensors = load_file(weights)
    tensors[NAME] += 1e-3
    save_file(tensors, weights)
    os.utime(weights, ns=(time, time))  # the bytes alone differ
    assert Checkpoint(str(path)).fingerprint != Checkpoint(model).fingerprint
    changed = Checkpoint(str(path)).fingerprint
    os.utime(weights, ns=(time + 1, time + 1))
    assert Checkpoint(str(path)).fingerprint != changed
    assert Checkpoint(str(path)).content_hash != Checkpoint(model).content_hash


def test_header_counts_where_no_sample_does(model, tmp_path):
    path = tmp_path / "renamed"
    shutil.copytree(model, path)
    tensors = load_file(path / "model.safetensors")
    time = (path / "model.safetensors").stat().st_mtime_ns
    save_file({NAME.replace("up", "go"): tensors[NAME]}, path / "model.safetensors")
    os.utime(path / "model.safetensors", ns=(time, time))
    assert Checkpoint(str(path)).fingerprint != Checkpoint(model).fingerprint


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
