"""Elementwise methods over packs of tensors: statistics, kernel values, noise, one kernel call."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from merge_engine.building.pack_merge import PackMerge
from merge_engine.errors import MergeError
from merge_engine.methods import Elementwise
from merge_engine.methods.contract import KernelValues, Number, Parameters, TaskVectors
from merge_engine.methods.preparation import UNBOUNDED
from merge_engine.methods.task_vectors import l1_norms
from merge_engine.numerics.noise import Noise, key_of
from merge_engine.numerics.order_statistics import Magnitudes, Variances
from merge_engine.numerics.statistics import LEAST_NORM, norm_ratio, row_width
from merge_engine.numerics.transfer import to_device

_OF_THE_SUM = ("factor", "weight")  # values that a method's `sparsify` does not take


@dataclass(frozen=True)
class _TaskVectors(TaskVectors):
    """The task vectors of some of the recipe's donors in one tensor."""

    merge: PackMerge
    name: str
    indices: Sequence[int]  # of the donors in the recipe
    models: tuple[str, ...]  # those donors

    @property
    @override
    def width(self) -> int:
        return row_width(self.merge.pack.shapes[self.name])

    @property
    @override
    def variances(self) -> Variances:
        return self.merge.models.measurements.variances(self.name, self.models, self.merge.base)

    @override
    def magnitudes(self, donor: int) -> Magnitudes:
        model = self.models[donor]
        return self.merge.models.measurements.magnitudes(self.name, model, self.merge.base)

    @override
    def rescale_factor(self, donor: int, keep_probability: int) -> float:
        key = key_of(self.merge.recipe.seed, self.name, self.indices[donor])
        measurements, model = self.merge.models.measurements, self.models[donor]
        masses = measurements.masses(self.name, model, self.merge.base, key)
        return norm_ratio(float(masses[-1]), float(masses[keep_probability]))

    @override
    def overlaps(self, epsilon: float) -> Tensor:
        measurements = self.merge.models.measurements
        return measurements.overlaps(self.name, self.models, self.merge.base, epsilon)


def write_elementwise(out: Tensor, method: Elementwise, merge: PackMerge) -> None:
    """Write the result of an elementwise method; donors with weight zero are not read.

    Raises:
        MergeError: The parameters do not work for a tensor; the message names it.
    """
    recipe = merge.recipe
    weights = [w for each in merge.values if isinstance(w := each.get("weight"), tuple)]
    used = tuple(
        index
        for index in range(len(recipe.donors))
        if not weights or any(weight[index] for weight in weights)
    )
    base = merge.read(merge.base)
    if not used or not out.numel():
        out.copy_(base.view(out.shape))
        return
    arguments = kernel_arguments(method, merge, base, used)
    values = {**arguments.scalars, **arguments.per_donor}
    merge.models.runner.write(out, method.kernel, (base, arguments.donors), values, arguments.noise)


@dataclass(frozen=True)
class KernelArguments:
    """What a kernel is given besides the base."""

    donors: Sequence[Tensor]  # n of them, packed
    scalars: dict[str, Number]
    per_donor: dict[str, list[Number]]  # n numbers, or n tensors with a number for every element
    noise: Noise | None


def kernel_arguments(
    method: Elementwise,
    merge: PackMerge,
    base: Tensor,
    used: tuple[int, ...],
    *,
    combine: bool = True,
) -> KernelArguments:
    """Return a kernel's arguments for the donors ``used``, given by their indices.

    Without ``combine``, the values of the sum are left out, and ``factor`` is the weight times the
    factor that restores the task vector's norm.
    """
    models = tuple(merge.recipe.donors[index].model for index in used)
    kernel_values = _prepared(method, merge, used, models, combine=combine)
    scalars, per_donor = _joined(merge, kernel_values, len(used))
    noise = None
    if method.random or any(each.has_ties for each in kernel_values):
        noise = merge.pack.noise(merge.recipe.seed, used, merge.device, even=not method.random)
    donors = [merge.read(model) for model in models]
    if stat := method.elementwise_stat:
        found = [
            merge.models.measurements.elementwise(stat, merge.pack, model, merge.base)
            for model in models
        ]
        per_donor[stat] = [to_device(each, merge.device) for each in found]
    if any(each.rescales for each in kernel_values):
        assert method.sparsify is not None
        values = {name: each for name, each in per_donor.items() if name not in _OF_THE_SUM}
        norms = merge.models.runner.sums(l1_norms(method.sparsify), (base, donors), values, noise)
        ratios = _rescale_factors(merge, norms)
        per_donor["factor"] = [f * r for f, r in zip(per_donor["factor"], ratios, strict=True)]
    return KernelArguments(donors, scalars, per_donor, noise)


def _prepared(
    method: Elementwise,
    merge: PackMerge,
    used: Sequence[int],
    models: tuple[str, ...],
    *,
    combine: bool,
) -> list[KernelValues]:
    found = []
    for index, name in enumerate(merge.pack.names):
        own = Parameters.from_values(merge.values[index], used)
        values = KernelValues(own.shared, own.per_donor)
        try:
            if method.prepare:
                values = method.prepare(own, _TaskVectors(merge, name, used, models))
            if method.combine and combine:
                values = method.combine(own, values)
        except MergeError:
            raise  # of a model, which the message names
        except ValueError as error:
            raise merge.refused(index, error) from error
        found.append(values)
    return found


def _joined(
    merge: PackMerge, kernel_values: Sequence[KernelValues], n: int
) -> tuple[dict[str, Number], dict[str, list[Number]]]:
    """Join the kernel's values of each tensor to those of the pack: scalars, and n per donor."""
    scalars = tuple(kernel_values[0].scalars)
    per_donor = dict.fromkeys(name for each in kernel_values for name in each.per_donor)
    rows = [[each.scalars[name] for each in kernel_values] for name in scalars]  # k numbers each
    for name in per_donor:
        lists = [each.per_donor.get(name) or (UNBOUNDED[name],) * n for each in kernel_values]
        rows += map(list, zip(*lists, strict=True))
    columns = iter(_columns(merge, rows))
    return (
        {name: next(columns) for name in scalars},
        {name: [*itertools.islice(columns, n)] for name in per_donor},
    )


def _columns(merge: PackMerge, rows: Sequence[Sequence[float]]) -> list[Number]:
    """Return rows of k numbers as columns, int32 if all are whole: one copy for each dtype."""
    columns: dict[int, Number] = {}
    integral = [all(isinstance(each, int) for each in numbers) for numbers in rows]
    for dtype in (torch.int32, torch.float32):
        own = [index for index, whole in enumerate(integral) if whole == (dtype is torch.int32)]
        if own:
            numbers = torch.tensor([rows[index] for index in own], dtype=dtype)
            columns |= zip(own, merge.columns(numbers), strict=True)
    return [columns[index] for index in range(len(rows))]


def _rescale_factors(merge: PackMerge, norms: Tensor) -> list[Number]:
    """Return n factors that restore each task vector's L1 norm, from its norms in rows."""
    before, after = merge.pack.sums(norms).chunk(2)  # n norms each, without and with the masks
    kept = torch.minimum(before, after) >= LEAST_NORM
    return merge.columns(torch.where(kept, before / after, 1.0).float())
