"""A recipe into weights: one tensor, or a whole live model in place.

Kernels compute in float32; the one rounding happens where a tensor is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from merge_engine.donors import Family
from merge_engine.methods import METHODS, Base, Linear
from merge_engine.methods.contract import Elementwise, Values
from merge_engine.methods.linear import sum_of_task_vectors, weighted_sum
from merge_engine.noise import key_of, uniform
from merge_engine.recipe import Recipe, RecipeError
from merge_engine.statistics import Magnitudes

Read = Callable[[str], Tensor]  # a model's tensor, on the device


def merge_tensor(
    recipe: Recipe,
    name: str,
    family: Family,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Merge one tensor: of ``dtype``, or as stored if it is not of a float dtype.

    Raises:
        RecipeError: The recipe's numbers do not work for this tensor; the message names it.
    """
    info = family.reference.tensors[name]
    stored = dtype if info.dtype.is_floating_point else info.dtype
    out = torch.empty(info.shape, dtype=stored, device=device)
    merge_into(out, recipe, name, family)
    return out


def merge_into(out: Tensor, recipe: Recipe, name: str, family: Family) -> None:
    """Merge one tensor and write it, rounded once, where it is to be: contiguous, any dtype.

    Raises:
        RecipeError: As ``merge_tensor``.
    """

    def read(model: str) -> Tensor:
        return family.read(model, name).to(out.device, non_blocking=True)

    if not out.dtype.is_floating_point:
        out.copy_(_same_in_all(recipe, name, read))
        return
    method, values = METHODS[recipe.merge_method], recipe.values(name, family.depth(name))
    try:
        if isinstance(method, Linear):
            factors = _coefficients(recipe, method, name, values, family)
            _write_sum(out, recipe, factors, read, family)
        else:
            assert isinstance(method, Elementwise)
            _write_elementwise(out, recipe, method, name, values, family)
    except ValueError as error:
        raise RecipeError(f"{recipe.merge_method} of {name!r}: {error}") from error


Factors = dict[str, float | Tensor]  # a model's coefficient, or one per row, to multiply by


def _coefficients(
    recipe: Recipe, method: Linear, name: str, values: Values, family: Family
) -> Factors:
    """The factor of each model, those that are zero left out: nobody has to read them."""
    models = tuple(source.model for source in recipe.donors)
    if method.base is Base.ENDPOINT and recipe.base is not None:
        models = (recipe.base, *models)
    options = dict(values)
    shape = family.reference.tensors[name].shape
    dim = method.dim(**{option: options.pop(option) for option in method.layout})
    dim = dim if shape else None
    gram = family.gram(name, models, recipe.origin, dim) if method.gram else None
    factors = method.coefficients(gram, **options)  # (n,) or (rows, n)
    if dim is None:
        return {model: c for model, c in zip(models, factors.tolist(), strict=True) if c != 0}
    columns = factors.float().unbind(-1)
    return {model: _along(c, shape, dim) for model, c in zip(models, columns, strict=True)}


def _along(factors: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """One factor for each row along ``dim``, in the order of ``Family.gram``, to multiply by."""
    sizes = list(shape)
    sizes[dim], sizes[-1] = sizes[-1], 1
    return factors.reshape(sizes).transpose(dim, -1)


def _write_sum(out: Tensor, recipe: Recipe, factors: Factors, read: Read, family: Family) -> None:
    """The linear family's one pass."""
    plain = [factor for factor in factors.values() if isinstance(factor, float)]
    # One undiminished task vector is summed up as the donor itself, which it is bit for bit.
    origin = None if plain == [1.0] else recipe.origin
    if not factors:
        out.copy_(read(origin)) if origin else out.zero_()
        return
    kernel = sum_of_task_vectors if origin else weighted_sum
    base = read(origin) if origin else None
    tensors = [read(model) for model in factors]
    if len(plain) == len(factors):
        family.stream.write(out, kernel, (base, tensors), {"factor": plain})
    else:
        by_row = [factor.to(out.device) for factor in factors.values() if torch.is_tensor(factor)]
        out.copy_(kernel(base, tensors, factor=by_row))  # type: ignore[arg-type]  # None or not


@dataclass(frozen=True)
class _TaskVector:
    """What a donor changes in one tensor, for preparations to ask of."""

    family: Family
    name: str
    base: str
    donor: str
    key: int
    device: torch.device

    @cached_property
    def magnitudes(self) -> Magnitudes:
        return self.family.magnitudes(self.name, self.donor, self.base)

    def stretch(self, chance: float) -> float:
        start, end = (
            self.family.read(model, self.name).to(self.device) for model in (self.base, self.donor)
        )
        before, after = self.family.stream.kept_mass(start, end, self.key, chance)
        return before / after if min(before, after) >= 1e-7 else 1.0


def _write_elementwise(
    out: Tensor, recipe: Recipe, method: Elementwise, name: str, values: Values, family: Family
) -> None:
    assert recipe.base is not None
    places = [i for i, w in enumerate(values.get("weight", [1] * len(recipe.donors))) if w != 0]  # type: ignore[arg-type]
    base = family.read(recipe.base, name).to(out.device)
    if not places:
        out.copy_(base)
        return
    keys = [key_of(recipe.seed, name, place) for place in places]
    models = [recipe.donors[place].model for place in places]
    wanted: dict[str, Any] = {
        key: tuple(value[place] for place in places) if isinstance(value, tuple) else value
        for key, value in values.items()
    }
    if method.prepare is not None:
        deltas = [
            _TaskVector(family, name, recipe.base, model, key, out.device)
            for model, key in zip(models, keys, strict=True)
        ]
        wanted = method.prepare(wanted, deltas)
    draws = wanted.pop("draws", method.random)
    donors = [family.read(model, name).to(out.device) for model in models]
    if method.whole:
        noise = [uniform(key, base.shape, base.device) for key in keys] if draws else None
        drawn = {"noise": noise} if draws else {}
        out.copy_(method.kernel(base, donors, **wanted, **drawn))
    else:
        inputs, even = (base, donors), not method.random
        family.stream.write(out, method.kernel, inputs, wanted, keys if draws else None, even)


def _same_in_all(recipe: Recipe, name: str, read: Read) -> Tensor:
    first, *others = (read(model) for model in recipe.models_read)
    if not all(torch.equal(first, other) for other in others):
        raise RecipeError(f"{name!r} is not of a float dtype and differs between the models")
    return first


def check_values(recipe: Recipe, family: Family) -> None:
    """Resolve every parameter of every tensor, reading none of them.

    Raises:
        RecipeError: A value is missing, of the wrong type or out of range.
    """
    for name in family.names:
        recipe.values(name, family.depth(name))


def merged_tensors(
    recipe: Recipe, family: Family, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Merge tensor by tensor, in the recipe's dtype, or else the one its models promote to."""
    named = recipe.out_dtype or recipe.dtype
    for name in family.names:
        stored = family.stored_dtype(name)
        yield (
            name,
            merge_tensor(recipe, name, family, device, getattr(torch, named) if named else stored),
        )


class Builder:
    """Writes recipes into one live model, which keeps its parameters' storage throughout.

    Args:
        model: What to write into, of the family's shape; its dtype is that of the result.
        family: The donors.

    Raises:
        RecipeError: The model has a tensor that the family lacks.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model = model
        self.family = family
        self.loaded: Recipe | None = None
        self.version = 0  # grows with every build: what else depends on the weights is keyed by it
        self._targets = dict(_stored_tensors(model))
        if missing := sorted(set(self._targets) - set(family.names)):
            raise RecipeError(f"the live model has {missing[0]!r}, which the donors lack")

    @torch.no_grad()
    def build(self, recipe: Recipe) -> None:
        """Write the recipe's weights into the model, in place.

        Raises:
            RecipeError: It cannot be built; the model is then of no recipe.
        """
        self.loaded = None  # a failed build leaves parts of two recipes: never score it
        self.version += 1
        for name, target in self._targets.items():
            merge_into(target, recipe, name, self.family)
            if not target.isfinite().all():
                raise RecipeError(
                    f"{recipe.merge_method} of {name!r} has NaN or Inf in {target.dtype}; "
                    "make the weights smaller, or look for a damaged donor"
                )
        self.loaded = recipe

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What the model holds now, by name."""
        for name, target in self._targets.items():
            yield name, target.detach()


def _stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, a tied one once, and the buffers that a checkpoint has."""
    yield from model.named_parameters()
    stored = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)
