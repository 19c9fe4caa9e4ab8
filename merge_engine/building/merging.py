"""Merging by a recipe: one pass over the models for one tensor, or for a pack of tensors at once.

In a pack of k tensors, coefficients, bounds and keys become columns with one number per row. A
single tensor is a pack of one.
"""

from __future__ import annotations

from torch import Tensor

from merge_engine.building.elementwise_merge import write_elementwise
from merge_engine.building.linear_merge import row_dim, write_linear
from merge_engine.building.pack_merge import PackMerge
from merge_engine.methods import Elementwise, Linear
from merge_engine.models.model_set import ModelSet
from merge_engine.numerics.packing import TensorPack
from merge_engine.recipe.recipe import Recipe


def merge_pack(out: Tensor, recipe: Recipe, pack: TensorPack, models: ModelSet) -> None:
    """Merge tensors that all models of a recipe have, and round once, on writing.

    ``out`` is the packed result: contiguous, of a float dtype.

    Raises:
        MergeError: The parameters do not work for a tensor; the message names it.
    """
    merge = PackMerge.from_recipe(recipe, pack, models, out.device)
    method = recipe.method
    if len(pack.names) > 1 and not _fits_one_pass(merge):
        for name in pack.names:
            merge_pack(pack.view(out, name), recipe, TensorPack({name: pack.shapes[name]}), models)
    elif isinstance(method, Elementwise):
        write_elementwise(out, method, merge)
    elif isinstance(method, Linear):
        write_linear(out, method, merge)


def _fits_one_pass(merge: PackMerge) -> bool:
    """Return whether all tensors of a pack can be merged by one call of one kernel."""
    method = merge.recipe.method
    if isinstance(method, Linear):
        return all(row_dim(method, each) is None for each in merge.values)
    # Flags choose which values a kernel takes.
    flags = [name for name, each in merge.values[0].items() if isinstance(each, bool)]
    return all(each[name] == merge.values[0][name] for each in merge.values for name in flags)
