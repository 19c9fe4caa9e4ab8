"""Merging by a recipe: one pass over the models for one tensor, or for a pack of tensors at once.

In a pack the coefficients, bounds and keys of its k tensors become columns with one number per row.
A single tensor is a pack of its own.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merge_engine.errors import MergeError
from merge_engine.methods import Base, Elementwise, Linear
from merge_engine.methods.contract import KernelValues, Number, Parameters, Values
from merge_engine.methods.linear import sum_of_task_vectors, weighted_sum
from merge_engine.methods.preparation import UNBOUNDED
from merge_engine.methods.task_vectors import kept_masses
from merge_engine.models.model_set import ModelSet
from merge_engine.numerics.noise import Noise, key_of
from merge_engine.numerics.order_statistics import Magnitudes, Variances
from merge_engine.numerics.packing import TensorPack
from merge_engine.numerics.statistics import row_width
from merge_engine.recipe.recipe import Recipe


@dataclass(frozen=True)
class _Merge:
    """A recipe, the tensors that one pass merges, and the models they are read from.

    Args:
        recipe: In the ``models`` form.
        pack: The k tensors.
        models: The models.
        device: Where the result is written.
        values: The method's parameters for each tensor.
    """

    recipe: Recipe
    pack: TensorPack
    models: ModelSet
    device: torch.device
    values: Sequence[Values]

    def read(self, model: str) -> Tensor:
        """Return a model's tensors, packed, on the device."""
        return to_device(self.models.placement.packed(model, self.pack), self.device)

    @property
    def base(self) -> str:
        """The base model, which every elementwise method has."""
        assert self.recipe.base is not None
        return self.recipe.base

    def column(self, numbers: Tensor) -> Number:
        """Return numbers (k,) of the tensors as a column (rows, 1), or that of a single tensor."""
        if len(numbers) == 1:
            return numbers.item()
        return self.pack.column(numbers.to(self.device))

    def refused(self, index: int, error: ValueError) -> MergeError:
        """Return the error of a method's function with the names of method and tensor."""
        return MergeError(f"{self.recipe.merge_method} of {self.pack.names[index]!r}: {error}")


def merge_pack(out: Tensor, recipe: Recipe, pack: TensorPack, models: ModelSet) -> None:
    """Merge tensors that all models of a recipe have, and round once, on writing.

    Args:
        out: The packed result, or of a pack of one tensor that tensor: contiguous, a float dtype.
        recipe: In the ``models`` form.
        pack: The tensors.
        models: The models.

    Raises:
        MergeError: The parameters do not work for a tensor; the message names it.
    """
    merge = _Merge(recipe, pack, models, out.device, _values(recipe, pack, models))
    method = recipe.method
    if len(pack.names) > 1 and not _fits_one_pass(merge):
        for name in pack.names:
            merge_pack(pack.view(out, name), recipe, TensorPack({name: pack.shapes[name]}), models)
    elif isinstance(method, Elementwise):
        _write_elementwise(out, method, merge)
    elif isinstance(method, Linear):
        dim = _row_dim(method, merge.values[0])
        if dim is None or not out.dim():
            _write_sum(out, method, merge)
        else:
            _write_sum_by_row(out, method, merge, dim)


def _values(recipe: Recipe, pack: TensorPack, models: ModelSet) -> list[Values]:
    """Return the method's parameters for each tensor; worked out once if they cannot differ."""
    if recipe.is_uniform:
        return [recipe.values(pack.names[0], 0.0)] * len(pack.names)
    return [
        recipe.values(name, models.depth(name), models.inputs.get(name, {})) for name in pack.names
    ]


def _fits_one_pass(merge: _Merge) -> bool:
    """Return whether all tensors of a pack can be merged by one call of one kernel."""
    method = merge.recipe.method
    if isinstance(method, Linear):
        return all(_row_dim(method, each) is None for each in merge.values)
    flags = [name for name, each in merge.values[0].items() if isinstance(each, bool)]
    return all(each[name] == merge.values[0][name] for each in merge.values for name in flags)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device.

    Pinned memory is copied to a GPU on a stream of its own, so that the next tensors are copied
    while a kernel still writes the last ones.
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


# Linear methods


def _row_dim(method: Linear, values: Values) -> int | None:
    """Return the dimension along which rows have their own coefficients, if they do."""
    return method.dim(**{name: values[name] for name in method.layout})


def _merged_models(recipe: Recipe) -> tuple[str, ...]:
    """Return the models that have a coefficient, in the order of the coefficients."""
    models = tuple(source.model for source in recipe.donors)
    if recipe.method.base is Base.ENDPOINT and recipe.base is not None:
        return (recipe.base, *models)
    return models


def _write_sum(out: Tensor, method: Linear, merge: _Merge) -> None:
    """Write a weighted sum; a model whose coefficients are all zero is not read."""
    models, origin = _merged_models(merge.recipe), merge.recipe.origin
    factors = _factors(method, merge)  # (k, n)
    used = [index for index in range(len(models)) if bool(factors[:, index].any())]
    if not used:
        out.copy_(merge.read(origin).view(out.shape)) if origin else out.zero_()
        return
    if len(used) == 1 and bool((factors[:, used] == 1).all()):
        origin = None  # one task vector with coefficient 1: the donor itself, bit for bit
    columns = [merge.column(factors[:, index].float()) for index in used]
    merge.models.runner.write(
        out,
        sum_of_task_vectors if origin else weighted_sum,
        (merge.read(origin) if origin else None, [merge.read(models[index]) for index in used]),
        {"factor": columns},
    )


def _factors(method: Linear, merge: _Merge) -> Tensor:
    """Return each tensor's coefficients, (k, n) float64; one call for equal parameters."""
    models, names = _merged_models(merge.recipe), merge.pack.names
    grams = (
        merge.models.measurements.grams(names, models, merge.recipe.origin) if method.gram else None
    )
    factors = torch.empty(len(names), len(models), dtype=torch.float64)
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, each in enumerate(merge.values):
        groups[tuple(each.items())].append(index)
    for values, indices in groups.items():
        options = {name: value for name, value in values if name not in method.layout}
        try:
            factors[indices] = method.coefficients(
                None if grams is None else grams[indices], **options
            )
        except ValueError as error:
            raise merge.refused(indices[0], error) from error
    return factors


def _write_sum_by_row(out: Tensor, method: Linear, merge: _Merge, dim: int) -> None:
    """Write a weighted sum of one tensor with coefficients of their own for every row."""
    models, origin, (name,) = _merged_models(merge.recipe), merge.recipe.origin, merge.pack.names
    options = {name: each for name, each in merge.values[0].items() if name not in method.layout}
    gram = merge.models.measurements.gram(name, models, origin, dim) if method.gram else None
    factors = method.coefficients(gram, **options)  # (rows, n)
    tensors = [to_device(merge.models.read(model, name), out.device) for model in models]
    by_row = [_along(c, out.shape, dim).to(out.device) for c in factors.float().unbind(-1)]
    if origin:
        base = to_device(merge.models.read(origin, name), out.device)
        out.copy_(sum_of_task_vectors(base, tensors, factor=by_row))
    else:
        out.copy_(weighted_sum(None, tensors, factor=by_row))


def _along(factors: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """Shape one factor per row along ``dim``, in the order of ``gram``, to multiply a tensor by."""
    sizes = list(shape)
    sizes[dim], sizes[-1] = sizes[-1], 1
    return factors.reshape(sizes).transpose(dim, -1)


# Elementwise methods


@dataclass(frozen=True)
class _TaskVector:
    """A donor's task vector in one tensor, for preparations (``contract.TaskVector``)."""

    models: ModelSet
    name: str
    base: str
    donor: str
    key: int  # of the donor's random mask

    @property
    def magnitudes(self) -> Magnitudes:
        return self.models.measurements.magnitudes(self.name, self.donor, self.base)

    def rescale_factor(self, chance: int) -> float:
        masses = self.models.measurements.masses(self.name, self.donor, self.base, self.key)
        return _norm_ratio(float(masses[-1]), float(masses[chance]))


def _norm_ratio(before: float, after: float) -> float:
    return before / after if min(before, after) >= 1e-7 else 1.0


@dataclass(frozen=True)
class _TaskVectors:
    """The donors' task vectors in one tensor, for preparations (``contract.TaskVectors``)."""

    members: tuple[_TaskVector, ...]
    width: int

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[_TaskVector]:
        return iter(self.members)

    @property
    def variances(self) -> Variances:
        first, *_ = self.members
        donors = tuple(member.donor for member in self.members)
        return first.models.measurements.variances(first.name, donors, first.base)

    def overlaps(self, epsilon: float) -> Tensor:
        first, *_ = self.members
        donors = tuple(member.donor for member in self.members)
        return first.models.measurements.overlaps(first.name, donors, first.base, epsilon)


def _write_elementwise(out: Tensor, method: Elementwise, merge: _Merge) -> None:
    recipe = merge.recipe
    parameters = [Parameters.from_values(each) for each in merge.values]
    used = _used_donors(len(recipe.donors), parameters)
    base = merge.read(merge.base)
    if not used or not out.numel():
        out.copy_(base.view(out.shape))
        return
    kernel_values = _prepared(method, merge, parameters, used)
    scalars, per_donor = _joined(merge, kernel_values)
    noise = None
    if method.random or any(each.has_ties for each in kernel_values):
        noise = merge.pack.noise(recipe.seed, used, merge.device, even=not method.random)
    models = [recipe.donors[index].model for index in used]
    inputs = base, [merge.read(model) for model in models]
    if stat := method.elementwise_stat:
        found = [
            merge.models.measurements.elementwise(stat, merge.pack, model, merge.base)
            for model in models
        ]
        per_donor[stat] = [to_device(each, merge.device) for each in found]
    if any(each.rescales for each in kernel_values):
        ratios = _rescale_factors(merge, inputs, per_donor, noise)
        per_donor["factor"] = [f * r for f, r in zip(per_donor["factor"], ratios, strict=True)]
    merge.models.runner.write(out, method.kernel, inputs, {**scalars, **per_donor}, noise)


def _used_donors(count: int, parameters: Sequence[Parameters]) -> tuple[int, ...]:
    """Return the indices of the donors with a weight in any tensor; the others are not read."""
    weights = [each.per_donor.get("weight", (1,) * count) for each in parameters]
    return tuple(index for index in range(count) if any(weight[index] for weight in weights))


def _prepared(
    method: Elementwise, merge: _Merge, parameters: Sequence[Parameters], used: Sequence[int]
) -> list[KernelValues]:
    """Return the kernel's values for each tensor."""
    recipe, pack = merge.recipe, merge.pack
    found = []
    for index, name in enumerate(pack.names):
        own = parameters[index].of_donors(used)
        if method.prepare is None:
            found.append(KernelValues(own.shared, own.per_donor))
            continue
        deltas = tuple(
            _TaskVector(
                merge.models,
                name,
                merge.base,
                recipe.donors[donor].model,
                key_of(recipe.seed, name, donor),
            )
            for donor in used
        )
        try:
            found.append(method.prepare(own, _TaskVectors(deltas, row_width(pack.shapes[name]))))
        except MergeError:
            raise  # of a model, which the message names
        except ValueError as error:
            raise merge.refused(index, error) from error
    return found


def _joined(
    merge: _Merge, kernel_values: Sequence[KernelValues]
) -> tuple[dict[str, Number], dict[str, list[Number]]]:
    """Join the kernel's values of each tensor to those of the pack: scalars, and per donor."""

    def column(numbers: Sequence[float]) -> Number:
        dtype = torch.int32 if all(isinstance(each, int) for each in numbers) else torch.float32
        return merge.column(torch.tensor(numbers, dtype=dtype))

    scalars = {
        name: column([each.scalars[name] for each in kernel_values])
        for name in kernel_values[0].scalars
    }
    per_donor = {}
    for name in dict.fromkeys(name for each in kernel_values for name in each.per_donor):
        lists = [
            each.per_donor.get(name) or (UNBOUNDED[name],) * len(each.per_donor["low"])
            for each in kernel_values
        ]
        per_donor[name] = [column(numbers) for numbers in zip(*lists, strict=True)]
    return scalars, per_donor


def _rescale_factors(
    merge: _Merge,
    inputs: tuple[Tensor, Sequence[Tensor]],
    per_donor: dict[str, list[Number]],
    noise: Noise | None,
) -> list[Number]:
    """Return what restores each task vector's L1 norm under its mask, (k,) for each donor."""
    values = {name: per_donor[name] for name in ("chance", "spread", "rank_share")}
    sums = merge.models.runner.sums(kept_masses, inputs, values, noise)
    masses = merge.pack.sums(sums).tolist()  # n before the masks and n after, of k tensors
    pairs = zip(masses[: len(masses) // 2], masses[len(masses) // 2 :], strict=True)
    ratios = [[_norm_ratio(*both) for both in zip(*pair, strict=True)] for pair in pairs]
    return [merge.column(torch.tensor(each)) for each in ratios]
