"""One pass over the donors: what a recipe says of some tensors, worked out and written.

A page is merged as a whole: its tensors' coefficients, bounds and keys become columns with one
number a row. A single tensor is a page of its own.
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
from merge_engine.methods import Base, Elementwise, Linear, Method
from merge_engine.methods.contract import Values
from merge_engine.methods.linear import sum_of_task_vectors, weighted_sum
from merge_engine.methods.preparation import UNBOUNDED
from merge_engine.methods.task_vectors import kept_masses
from merge_engine.models.model_set import ModelSet
from merge_engine.numerics.noise import Noise, key_of
from merge_engine.numerics.packing import TensorPack
from merge_engine.numerics.statistics import Magnitudes, Variances, row_width
from merge_engine.recipe.recipe import Recipe


def merge_page(out: Tensor, recipe: Recipe, page: TensorPack, family: ModelSet) -> None:
    """Merge tensors that all of a recipe's models have, rounded once where they are written.

    Args:
        out: The page's matrix, or of a page of one tensor that tensor: contiguous, a float dtype.
        recipe: What to merge.
        page: Which tensors.
        family: The models.

    Raises:
        RecipeError: The recipe's numbers do not work for a tensor; the message names it.
    """
    values = _values(recipe, page, family)
    method = recipe.method
    if len(values) > 1 and not _agree(method, values):
        for name in page.names:
            merge_page(page.view(out, name), recipe, TensorPack({name: page.shapes[name]}), family)
    elif isinstance(method, Elementwise):
        _write_elementwise(out, recipe, page, values, family)
    elif isinstance(method, Linear):
        if (dim := _dim(method, values[0])) is None or not out.dim():
            _write_sum(out, recipe, page, values, family)
        else:
            _write_rows(out, recipe, page, values[0], dim, family)


def _values(recipe: Recipe, page: TensorPack, family: ModelSet) -> list[Values]:
    """The method's parameters for each tensor; those of the first for all if none can differ."""
    if recipe.is_uniform:
        return [recipe.values(page.names[0], 0.0)] * len(page.names)
    return [
        recipe.values(name, family.depth(name), family.inputs.get(name, {})) for name in page.names
    ]


def brought(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device.

    What lies in pinned memory is copied to a GPU beside what the GPU does meanwhile: the next
    tensors are on their way while a kernel still writes the last ones.
    """
    if device.type != "cuda" or not tensor.is_pinned():
        return tensor.to(device)
    work, copies = torch.cuda.current_stream(device), _copies(device)
    with torch.cuda.stream(copies):
        there = tensor.to(device, non_blocking=True)
    work.wait_stream(copies)
    there.record_stream(work)  # its memory is not to be given away before that has read it
    return there


@functools.cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _agree(method: Method, values: Sequence[Values]) -> bool:
    """Whether tensors can be merged in one pass: of one kernel, so with the same flags."""
    if isinstance(method, Linear):
        return all(_dim(method, each) is None for each in values)
    flags = [{k: v for k, v in each.items() if isinstance(v, bool)} for each in values]
    return all(each == flags[0] for each in flags)


def _refused(recipe: Recipe, name: str, error: ValueError) -> MergeError:
    return MergeError(f"{recipe.merge_method} of {name!r}: {error}")


# The linear family


def _dim(method: Linear, values: Values) -> int | None:
    return method.dim(**{option: values[option] for option in method.layout})


def _merged_models(recipe: Recipe) -> tuple[str, ...]:
    """The models that have a coefficient, in the order of the method's arguments."""
    models = tuple(source.model for source in recipe.donors)
    if recipe.method.base is Base.ENDPOINT and recipe.base is not None:
        return (recipe.base, *models)
    return models


def _write_sum(
    out: Tensor, recipe: Recipe, page: TensorPack, values: Sequence[Values], family: ModelSet
) -> None:
    """The linear family's one pass; a model whose coefficients are all zero is not read."""
    models = _merged_models(recipe)
    factors = _factors(recipe, page, values, family)  # (k, n)
    used = [place for place in range(len(models)) if bool(factors[:, place].any())]
    # One undiminished task vector is summed up as the donor itself, which it is bit for bit.
    itself = len(used) == 1 and bool((factors[:, used] == 1).all())
    origin = None if itself else recipe.origin

    def read(model: str) -> Tensor:
        return brought(family.matrix(model, page), out.device)

    if not used:
        out.copy_(read(origin).view(out.shape)) if origin else out.zero_()
        return
    columns = [_column(page, factors[:, place].float(), out.device) for place in used]
    family.stream.write(
        out,
        sum_of_task_vectors if origin else weighted_sum,
        (read(origin) if origin else None, [read(models[place]) for place in used]),
        {"factor": columns},
    )


def _factors(
    recipe: Recipe, page: TensorPack, values: Sequence[Values], family: ModelSet
) -> Tensor:
    """Each tensor's coefficients, (k, n) float64: one call for all tensors of equal parameters."""
    method, models = recipe.method, _merged_models(recipe)
    assert isinstance(method, Linear)
    grams = family.grams(page.names, models, recipe.origin) if method.gram else None
    factors = torch.empty(len(values), len(models), dtype=torch.float64)
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for place, each in enumerate(values):
        alike[tuple(each.items())].append(place)
    for key, places in alike.items():
        options = {name: value for name, value in key if name not in method.layout}
        try:
            factors[places] = method.coefficients(
                None if grams is None else grams[places], **options
            )
        except ValueError as error:
            raise _refused(recipe, page.names[places[0]], error) from error
    return factors


def _write_rows(  # of one tensor, so by name
    out: Tensor, recipe: Recipe, page: TensorPack, values: Values, dim: int, family: ModelSet
) -> None:
    """The linear family with coefficients of their own for every row of a page's one tensor."""
    method, models, (name,) = recipe.method, _merged_models(recipe), page.names
    assert isinstance(method, Linear)
    options = {option: value for option, value in values.items() if option not in method.layout}
    gram = family.gram(name, models, recipe.origin, dim) if method.gram else None
    factors = method.coefficients(gram, **options)  # (rows, n)
    tensors = [brought(family.read(model, name), out.device) for model in models]
    base = brought(family.read(recipe.origin, name), out.device) if recipe.origin else None
    by_row = [_along(c, out.shape, dim).to(out.device) for c in factors.float().unbind(-1)]
    kernel = sum_of_task_vectors if recipe.origin else weighted_sum
    out.copy_(kernel(base, tensors, factor=by_row))  # type: ignore[arg-type]  # None or not


def _along(factors: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """One factor for each row along ``dim``, in the order of ``ModelSet.gram``, to multiply by."""
    sizes = list(shape)
    sizes[dim], sizes[-1] = sizes[-1], 1
    return factors.reshape(sizes).transpose(dim, -1)


# The elementwise family


@dataclass(frozen=True)
class _TaskVector:
    """What a donor changes in one tensor, for preparations to ask of."""

    family: ModelSet
    name: str
    base: str
    donor: str
    seed: int
    place: int  # the donor's, among the recipe's

    @property
    def magnitudes(self) -> Magnitudes:
        return self.family.magnitudes(self.name, self.donor, self.base)

    def stretch(self, chance: int) -> float:
        key = key_of(self.seed, self.name, self.place)
        masses = self.family.masses(self.name, self.donor, self.base, key)
        return _restoring(float(masses[-1]), float(masses[chance]))


def _restoring(before: float, after: float) -> float:
    return before / after if min(before, after) >= 1e-7 else 1.0


@dataclass(frozen=True)
class _TaskVectors:
    """What the donors change in one tensor, for preparations to ask of."""

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
        return first.family.variances(first.name, donors, first.base)

    def overlaps(self, epsilon: float) -> Tensor:
        first, *_ = self.members
        donors = tuple(member.donor for member in self.members)
        return first.family.overlaps(first.name, donors, first.base, epsilon)


def _write_elementwise(
    out: Tensor, recipe: Recipe, page: TensorPack, values: Sequence[Values], family: ModelSet
) -> None:
    method, device = recipe.method, out.device
    assert isinstance(method, Elementwise)
    assert recipe.base is not None
    used = _weighted(recipe, values)
    base = brought(family.matrix(recipe.base, page), device)
    if not used or not out.numel():
        out.copy_(base.view(out.shape))
        return
    models = [recipe.donors[place].model for place in used]
    wanted = _joined(page, _prepared(recipe, page, values, used, family), device)
    noise = None
    if wanted.pop("draws", method.random):
        noise = page.noise(recipe.seed, used, device, even=not method.random)
    donors = [brought(family.matrix(model, page), device) for model in models]
    if method.beside:
        beside = [family.beside(method.beside, page, model, recipe.base) for model in models]
        wanted[method.beside] = [brought(each, device) for each in beside]
    if wanted.pop("restored", False):
        stretches = _stretches(page, (base, donors), wanted, noise, family)
        wanted["factor"] = [f * s for f, s in zip(wanted["factor"], stretches, strict=True)]
    family.stream.write(out, method.kernel, (base, donors), wanted, noise)


def _weighted(recipe: Recipe, values: Sequence[Values]) -> tuple[int, ...]:
    """The places of the donors that count in any of the tensors: nobody has to read the others."""
    weights: list[Any] = [each.get("weight", (1,) * len(recipe.donors)) for each in values]
    return tuple(i for i in range(len(recipe.donors)) if any(weight[i] for weight in weights))


def _prepared(
    recipe: Recipe,
    page: TensorPack,
    values: Sequence[Values],
    used: Sequence[int],
    family: ModelSet,
) -> list[dict[str, Any]]:
    """The kernel's values for each tensor."""
    method, base = recipe.method, recipe.base
    assert isinstance(method, Elementwise)
    assert base is not None
    donors = recipe.donors
    members = [(place, donors[place].model) for place in used]
    found = []
    for name, each in zip(page.names, values, strict=True):
        own: dict[str, Any] = {
            key: tuple(value[place] for place in used) if isinstance(value, tuple) else value
            for key, value in each.items()
        }
        if method.prepare is not None:
            deltas = tuple(
                _TaskVector(family, name, base, model, recipe.seed, place)
                for place, model in members
            )
            try:
                own = method.prepare(own, _TaskVectors(deltas, row_width(page.shapes[name])))
            except MergeError:
                raise  # of a model: it says which
            except ValueError as error:
                raise _refused(recipe, name, error) from error
        found.append(own)
    return found


def _joined(
    page: TensorPack, prepared: Sequence[dict[str, Any]], device: torch.device
) -> dict[str, Any]:
    """Values of each tensor as values for the page."""
    names = {name: None for each in prepared for name in each}  # in order
    return {
        name: _joint(page, [each.get(name, UNBOUNDED.get(name)) for each in prepared], device)
        for name in names
    }


def _joint(page: TensorPack, values: list[Any], device: torch.device) -> Any:
    """Flags as one, which is set if any is; tuples as lists; numbers as ``_column`` has them."""
    if isinstance(values[0], bool):
        return any(values)
    if any(isinstance(value, tuple) for value in values):
        count = next(len(value) for value in values if isinstance(value, tuple))
        each = [value if isinstance(value, tuple) else (value,) * count for value in values]
        return [_joint(page, list(numbers), device) for numbers in zip(*each, strict=True)]
    dtype = torch.int32 if all(isinstance(value, int) for value in values) else torch.float32
    return _column(page, torch.tensor(values, dtype=dtype), device)


def _column(page: TensorPack, numbers: Tensor, device: torch.device) -> Any:
    """Numbers (k,) of the tensors as a column (rows, 1), or of a single tensor as it is."""
    return numbers.item() if len(numbers) == 1 else page.column(numbers.to(device))


def _stretches(
    page: TensorPack,
    inputs: tuple[Tensor, Sequence[Tensor]],
    values: dict[str, Any],
    noise: Noise | None,
    family: ModelSet,
) -> list[Any]:
    """What gives each task vector the norm back that it has before its mask, (k,) a donor."""
    names = ("chance", "spread", "shares")
    sums = family.stream.sums(kept_masses, inputs, {n: values[n] for n in names}, noise)
    masses = page.sums(sums).tolist()  # n before the masks and n after, of k tensors
    pairs = zip(masses[: len(masses) // 2], masses[len(masses) // 2 :], strict=True)
    columns = [[_restoring(*both) for both in zip(*pair, strict=True)] for pair in pairs]
    return [_column(page, torch.tensor(each), inputs[0].device) for each in columns]
