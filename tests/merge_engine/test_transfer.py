"""Copies to a device, here to the CPU by the code that copies to a GPU."""

import pytest
import torch

from merge_engine.models.weights_file import open_weights
from merge_engine.numerics import transfer
from merge_engine.numerics.transfer import Copier, to_device

NAME = "model.layers.0.mlp.up_proj.weight"
CPU = torch.device("cpu")
SHAPES = {
    "none": (0, 3),
    "number": (),
    "part of a buffer": (5,),
    "one buffer": (4, 4),
    "buffers and a rest": (9, 7),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.bool])
def test_tensor_comes_whole_through_the_staging_buffers(shape, dtype, monkeypatch):
    monkeypatch.setattr(transfer, "STAGED", 16 * dtype.itemsize)
    tensor = torch.randint(0, 2, shape).to(dtype)
    copier = Copier(CPU)
    found = [copier.copy(tensor), copier.copy(1 - tensor.int())]  # the buffers are used again
    assert torch.equal(found[0], tensor)
    assert found[0].dtype == dtype
    assert torch.equal(found[1], 1 - tensor.int())


def test_transposed_and_mapped_tensors_come_as_they_are(zoo, monkeypatch):
    monkeypatch.setattr(transfer, "STAGED", 64)
    copier = Copier(CPU)
    mapped = open_weights(zoo / "a" / "model.safetensors").get_tensor(NAME)
    for tensor in (mapped, mapped.mT):
        assert torch.equal(copier.copy(tensor), tensor)


def test_tensor_on_the_device_already_is_not_copied():
    tensor = torch.ones(3)
    assert to_device(tensor, CPU) is tensor
