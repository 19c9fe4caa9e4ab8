"""The inputs of one merging pass: a recipe, tensors, and the models they are read from."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_engine.errors import MergeError
from merge_engine.methods.contract import Number, Values
from merge_engine.models.model_set import ModelSet
from merge_engine.numerics.packing import TensorPack
from merge_engine.recipe.recipe import Recipe


@dataclass(frozen=True)
class PackMerge:
    """A recipe, the tensors that one pass merges, and the models they are read from."""

    recipe: Recipe  # in the `models` form
    pack: TensorPack  # the k tensors
    models: ModelSet  # the models
    device: torch.device  # where the result is written
    values: Sequence[Values]  # the method's parameters for each tensor

    def read(self, model: str) -> Tensor:
        """Return a model's tensors, packed, on the device."""
        return to_device(self.models.placement.packed(model, self.pack), self.device)

    @property
    def base(self) -> str:
        """The base model, which every elementwise method has."""
        assert self.recipe.base is not None
        return self.recipe.base

    def columns(self, numbers: Tensor) -> list[Number]:
        """Return numbers (c, k) of k tensors as c columns (rows, 1), or as scalars if k is 1.

        All columns are copied to the device together.
        """
        if numbers.shape[1] == 1:
            return [each.item() for each in numbers]
        return [*self.pack.columns(numbers.to(self.device))]

    def refused(self, index: int, error: ValueError) -> MergeError:
        """Return a method's error as a MergeError that names method and tensor."""
        return MergeError(f"{self.recipe.merge_method} of {self.pack.names[index]!r}: {error}")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device.

    Pinned memory is copied to a GPU on a separate stream, so that the next tensors are copied while
    a kernel is still writing the last ones.
    """
    if device.type != "cuda" or not tensor.is_pinned():
        return tensor.to(device)
    work, copies = torch.cuda.current_stream(device), _copy_stream(device)
    with torch.cuda.stream(copies):
        copied = tensor.to(device, non_blocking=True)
    work.wait_stream(copies)
    copied.record_stream(work)  # keeps its memory from being reused before `work` has read it
    return copied


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
