"""A recipe into weights: one tensor, or a whole live model in place.

Kernels compute in float32; the one rounding happens where a tensor is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from merge_engine.donors import Family
from merge_engine.methods import METHODS, Base, Linear
from merge_engine.methods.contract import Elementwise, Values
from merge_engine.noise import key_of, uniform
from merge_engine.recipe import Recipe, RecipeError

Read = Callable[[str], Tensor]  # a model's tensor, on the device


def merge_tensor(recipe: Recipe, name: str, family: Family, device: torch.device) -> Tensor:
    """Merge one tensor: float32 on ``device``, or as stored if it is not of a float dtype.

    Raises:
        RecipeError: The recipe's numbers do not work for this tensor; the message names it.
    """

    def read(model: str) -> Tensor:
        return family.read(model, name).to(device)

    if not family.reference.tensors[name].dtype.is_floating_point:
        return _same_in_all(recipe, name, read)
    method, values = METHODS[recipe.merge_method], recipe.values(name, family.depth(name))
    try:
        if isinstance(method, Linear):
            return _weighted_sum(recipe, _coefficients(recipe, method, name, values, family), read)
        assert isinstance(method, Elementwise)
        return _elementwise(recipe, method, name, values, read)
    except ValueError as error:
        raise RecipeError(f"{recipe.merge_method} of {name!r}: {error}") from error


Factors = dict[str, float | Tensor]  # a model's coefficient, or one per row: (*rows, 1)


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


def _weighted_sum(recipe: Recipe, factors: Factors, read: Read) -> Tensor:
    """The linear family's one pass: ``sum c x``, or ``origin + sum c (x - origin)``."""
    # One undiminished task vector is summed up as the donor itself, which it is bit for bit.
    whole = [factor for factor in factors.values() if isinstance(factor, float)] == [1.0]
    origin = None if whole else recipe.origin
    start = read(origin or recipe.models_read[0]).float()
    total = torch.zeros_like(start)
    for model, factor in factors.items():
        tensor = read(model).float()
        total += (tensor - start if origin else tensor) * _on(factor, total.device)
    return start + total if origin else total


def _on(factor: float | Tensor, device: torch.device) -> float | Tensor:
    return factor.to(device) if isinstance(factor, Tensor) else factor


def _elementwise(
    recipe: Recipe, method: Elementwise, name: str, values: Values, read: Read
) -> Tensor:
    assert recipe.base is not None
    base = read(recipe.base)
    donors = [read(source.model) for source in recipe.donors]
    if not donors:
        return base.float()
    if not method.random:
        return method.kernel(base, donors, **values)
    keys = [key_of(recipe.seed, name, place) for place in range(len(donors))]
    noise = [uniform(key, base.shape, base.device) for key in keys]
    return method.kernel(base, donors, noise=noise, **values)


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
        dtype = getattr(torch, named) if named and stored.is_floating_point else stored
        yield name, merge_tensor(recipe, name, family, device).to(dtype)


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
            target.copy_(merge_tensor(recipe, name, self.family, target.device))
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
