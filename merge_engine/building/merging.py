"""Merge by a recipe: all tensors of a plan, one tensor, or a pack of tensors in one pass.

Kernels compute in float32; the only rounding is where a tensor is written. In a pack of k tensors,
coefficients, bounds and keys become columns with one number per row; a single tensor is a pack of
one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from merge_engine.building.elementwise_merge import write_elementwise
from merge_engine.building.linear_merge import row_dim, write_linear
from merge_engine.building.pack_merge import PackMerge
from merge_engine.building.plan import Plan, written_dtype
from merge_engine.errors import MergeError
from merge_engine.methods import Base, Elementwise, Linear
from merge_engine.models.checkpoint import Reader
from merge_engine.models.model_set import ModelSet
from merge_engine.numerics.packing import TensorPack
from merge_engine.numerics.statistics import all_finite
from merge_engine.numerics.transfer import to_device
from merge_engine.recipe.recipe import Recipe

_HELD = 1 << 26  # bytes read from files before they are closed and opened again


def built_tensors(plan: Plan, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Merge the tensors of a plan one by one, in the dtypes of ``plan.shapes()``.

    Raises:
        MergeError: A tensor cannot be merged, or the result has NaN or Inf.
    """
    for part in plan.parts:
        held = 0  # bytes read since the files were opened: mapped pages count as our memory
        for name, tensor in merged_tensors(part.recipe, part.model_set, device):
            held += tensor.nbytes * len(part.model_set.checkpoints)
            yield name, tensor
            del tensor  # before the next is merged
            if held >= _HELD:  # not after every tensor: reopening reads the whole header
                part.model_set.release()
                held = 0
        part.model_set.release()


def merged_tensors(
    recipe: Recipe, models: ModelSet, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Merge the tensors of models one by one, as ``built_tensors`` does part by part."""
    for name in models.names:
        tensor = merge_tensor(recipe, name, models, device, written_dtype(recipe, models, name))
        check_finite(tensor, recipe, name)
        yield name, tensor
        del tensor  # before the next is merged


def check_finite(merged: Tensor, recipe: Recipe, name: str) -> None:
    """Refuse values that overflow their dtype; the models' own are known to be finite."""
    if not all_finite(merged):
        raise MergeError(
            f"{recipe.merge_method} of {name!r} has NaN or Inf in {merged.dtype}; "
            "make the weights smaller, or write float32"
        )


def merge_tensor(
    recipe: Recipe,
    name: str,
    models: ModelSet,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Merge one tensor to ``dtype``, or keep its dtype if that is not a float dtype.

    Raises:
        MergeError: The parameters do not work for the tensor; the message names it.
    """
    info = models.tensors[name]
    stored = dtype if info.dtype.is_floating_point else info.dtype
    out = torch.empty(info.shape, dtype=stored, device=device)
    merge_into(out, recipe, name, models)
    return out


def merge_into(out: Tensor, recipe: Recipe, name: str, models: ModelSet) -> None:
    """Merge one tensor into a contiguous tensor of any dtype, rounding once.

    Models that lack the tensor are left out. A tensor that only the first model has (the one whose
    config the result gets) is copied.

    Raises:
        MergeError: The parameters do not work for the tensor; the message names it.
    """

    def read(model: str) -> Tensor:
        return to_device(models.read(model, name), out.device)

    owners = models.inputs[name]
    first, *others = recipe.models_read
    lacking = any(model not in owners for model in recipe.models_read)
    if lacking and first in owners and not any(model in owners for model in others):
        out.copy_(read(first))
        return
    if lacking:
        recipe = of_owners(recipe, name, owners)
    if not out.dtype.is_floating_point:
        out.copy_(_same_in_all(recipe, name, read))
        return
    if lacking and too_few(recipe):
        out.copy_(read(recipe.models_read[0]))
        return
    merge_pack(out, recipe, TensorPack({name: tuple(out.shape)}), models)


def of_owners(recipe: Recipe, name: str, owners: Mapping[str, str]) -> Recipe:
    """Return the recipe without the models that lack a tensor."""
    if recipe.origin and recipe.origin not in owners:
        raise MergeError(
            f"{name!r} is missing in the base model {recipe.origin!r}, so {recipe.merge_method} "
            f"cannot start; {next(iter(owners))!r} has it: use linear, or another base"
        )
    models = tuple(source for source in recipe.models if source.model in owners)
    base = recipe.base_model if recipe.base_model in owners else None
    if not models and base is None:
        raise MergeError(
            f"{name!r} is in none of the recipe's models; {next(iter(owners))!r} has it"
        )
    return recipe.model_copy(update={"models": models, "base_model": base})


def too_few(recipe: Recipe) -> bool:
    """Return whether a recipe has too few models to merge, so that the first is copied."""
    count = len(recipe.donors) + (recipe.method.base is Base.ENDPOINT and recipe.base is not None)
    return count < recipe.method.donors[0]


def _same_in_all(recipe: Recipe, name: str, read: Reader) -> Tensor:
    """Return a tensor that is equal in all models."""
    first, *others = (read(model) for model in recipe.models_read)
    if not all(torch.equal(first, other) for other in others):
        raise MergeError(
            f"{name!r} is not of a float dtype and differs between the models, so it cannot be "
            "merged; store the base's in all of them"
        )
    return first


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
