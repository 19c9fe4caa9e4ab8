"""The inputs of one merging pass: a recipe, tensors, and the models they are read from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_engine.errors import MergeError
from merge_engine.methods.contract import Number, Values
from merge_engine.models.model_set import ModelSet
from merge_engine.numerics.packing import TensorPack
from merge_engine.numerics.transfer import send_numbers, to_device
from merge_engine.recipe.recipe import Recipe


@dataclass(frozen=True)
class PackMerge:
    """A recipe, the tensors that one pass merges, and the models they are read from."""

    recipe: Recipe  # in the `models` form
    pack: TensorPack  # the k tensors
    models: ModelSet
    device: torch.device  # where the result is written
    values: Sequence[Values]  # the method's parameters for each tensor

    @classmethod
    def from_recipe(
        cls, recipe: Recipe, pack: TensorPack, models: ModelSet, device: torch.device
    ) -> PackMerge:
        """Read the method's parameters: once, if all tensors have the same."""
        if recipe.is_uniform:
            values = [recipe.values(pack.names[0], 0.0)] * len(pack.names)
        else:
            values = [
                recipe.values(name, models.depth(name), models.inputs.get(name, {}))
                for name in pack.names
            ]
        return cls(recipe, pack, models, device, values)

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

        All are copied to the device together, and nothing waits for it.
        """
        sent = send_numbers(numbers, self.device)
        return [*sent[:, 0]] if numbers.shape[1] == 1 else [*self.pack.columns(sent)]

    def refused(self, index: int, error: ValueError) -> MergeError:
        """Return a method's error as a MergeError that names method and tensor."""
        return MergeError(f"{self.recipe.merge_method} of {self.pack.names[index]!r}: {error}")
