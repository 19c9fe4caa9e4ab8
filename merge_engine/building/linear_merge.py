"""Weighted sums: linear methods, over packs of tensors or row by row of one tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from merge_engine.building.pack_merge import PackMerge
from merge_engine.methods import Base, Linear
from merge_engine.methods.contract import Values
from merge_engine.methods.linear import sum_of_task_vectors, weighted_sum
from merge_engine.numerics.kernel_runner import CHUNK, CHUNK_ON_GPU
from merge_engine.numerics.transfer import send_numbers, to_device
from merge_engine.recipe.recipe import Recipe


def row_dim(method: Linear, values: Values) -> int | None:
    """Return the dimension along which rows have their own coefficients, if they do."""
    return method.dim(**{name: values[name] for name in method.dim_params})


def _coefficients(method: Linear, gram: Tensor | None, values: Values) -> Tensor:
    """Return the coefficients of tensors with these inner products: (n,), or (rows, n)."""
    options = {name: value for name, value in values.items() if name not in method.dim_params}
    return method.coefficients(gram, **options)


def write_linear(out: Tensor, method: Linear, merge: PackMerge) -> None:
    """Write the result of a linear method; row by row only a pack of one tensor.

    Raises:
        MergeError: The coefficients are undefined; the message names the tensor.
    """
    dim = row_dim(method, merge.values[0])
    if dim is None or not out.dim():
        _write_sum(out, method, merge)
    else:
        _write_sum_by_row(out, method, merge, dim)


def _merged_models(recipe: Recipe) -> tuple[str, ...]:
    """Return the models that have a coefficient, in the order of the coefficients."""
    models = tuple(source.model for source in recipe.donors)
    if recipe.method.base is Base.ENDPOINT and recipe.base is not None:
        return (recipe.base, *models)
    return models


def _write_sum(out: Tensor, method: Linear, merge: PackMerge) -> None:
    """Write a weighted sum; a model whose coefficients are all zero is not read."""
    models, origin = _merged_models(merge.recipe), merge.recipe.origin
    factors = _factors(method, merge)  # (k, n)
    used = [index for index in range(len(models)) if bool(factors[:, index].any())]
    if not used:
        out.copy_(merge.read(origin).view(out.shape)) if origin else out.zero_()
        return
    if len(used) == 1 and bool((factors[:, used] == 1).all()):
        origin = None  # one task vector with coefficient 1: the donor itself, bit for bit
    columns = merge.columns(factors[:, used].T.float())
    merge.models.runner.write(
        out,
        sum_of_task_vectors if origin else weighted_sum,
        (merge.read(origin) if origin else None, [merge.read(models[index]) for index in used]),
        {"factor": columns},
    )


def _factors(method: Linear, merge: PackMerge) -> Tensor:
    """Return each tensor's coefficients, (k, n) float64; one call for equal parameters."""
    models, names, origin = _merged_models(merge.recipe), merge.pack.names, merge.recipe.origin
    grams = merge.models.measurements.grams(names, models, origin) if method.gram else None
    factors = torch.empty(len(names), len(models), dtype=torch.float64)
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, each in enumerate(merge.values):
        groups[tuple(each.items())].append(index)
    for indices in groups.values():
        own, values = None if grams is None else grams[indices], merge.values[indices[0]]
        try:
            factors[indices] = _coefficients(method, own, values)
        except ValueError as error:
            raise merge.refused(indices[0], error) from error
    return factors


def _write_sum_by_row(out: Tensor, method: Linear, merge: PackMerge, dim: int) -> None:
    """Write a weighted sum of one tensor with coefficients of their own for every row."""
    models, origin, (name,) = _merged_models(merge.recipe), merge.recipe.origin, merge.pack.names
    gram = merge.models.measurements.gram(name, models, origin, dim) if method.gram else None
    factors = _coefficients(method, gram, merge.values[0])  # (rows, n)
    tensors = [to_device(merge.models.read(model, name), out.device) for model in models]
    sent = send_numbers(factors.float(), out.device)
    by_row = [_along(column, out.shape, dim) for column in sent.unbind(-1)]
    base = to_device(merge.models.read(origin, name), out.device) if origin else None
    step = max(1, (CHUNK_ON_GPU if out.is_cuda else CHUNK) // max(1, out[:1].numel()))
    for first in range(0, len(out), step):  # of a whole tensor, float copies take several times it
        part = slice(first, first + step)
        ends, factor = [each[part] for each in tensors], [each[part] for each in by_row]
        if base is None:
            out[part] = weighted_sum(None, ends, factor=factor)
        else:
            out[part] = sum_of_task_vectors(base[part], ends, factor=factor)


def _along(factors: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """Repeat one factor per row along ``dim``, in the order of ``gram``, over a tensor's shape."""
    sizes = list(shape)
    sizes[dim], sizes[-1] = sizes[-1], 1
    return factors.reshape(sizes).transpose(dim, -1).expand(*shape)
