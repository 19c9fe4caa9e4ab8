"""A recipe into weights: one tensor, or a whole live model in place.

Kernels compute in float32; the one rounding happens where a tensor is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from merge_engine.donors import Family
from merge_engine.layout import is_head_weight, layer_counts
from merge_engine.methods import METHODS, Base, Linear
from merge_engine.methods.contract import Elementwise, Values
from merge_engine.noise import key_of, uniform
from merge_engine.plan import Part, Plan, stack, written_dtype
from merge_engine.recipe import Recipe, RecipeError

Read = Callable[[str], Tensor]  # a model's tensor, on the device


def merge_tensor(recipe: Recipe, name: str, family: Family, device: torch.device) -> Tensor:
    """Merge one tensor: float32 on ``device``, or as stored if it is not of a float dtype.

    Raises:
        RecipeError: The recipe's numbers do not work for this tensor; the message names it.
    """

    def read(model: str) -> Tensor:
        return family.read(model, name).to(device)

    inputs = family.inputs.get(name, {})
    lacking = bool(inputs) and any(model not in inputs for model in recipe.models_read)
    if lacking:
        recipe = _of_holders(recipe, name, inputs)
    if not family.tensors[name].dtype.is_floating_point:
        return _same_in_all(recipe, name, read)
    if lacking and _too_few(recipe):
        return read(recipe.models_read[0]).float()
    method = METHODS[recipe.merge_method]
    values = recipe.values(name, family.depth(name), inputs)
    try:
        if isinstance(method, Linear):
            return _weighted_sum(recipe, _coefficients(recipe, method, name, values, family), read)
        assert isinstance(method, Elementwise)
        return _elementwise(recipe, method, name, values, read)
    except ValueError as error:
        raise RecipeError(f"{recipe.merge_method} of {name!r}: {error}") from error


def _of_holders(recipe: Recipe, name: str, inputs: Mapping[str, str]) -> Recipe:
    """The recipe without the models that lack a tensor.

    Raises:
        RecipeError: What is left has no meaning.
    """
    if recipe.origin and recipe.origin not in inputs:
        raise RecipeError(
            f"{name!r} is missing in the base model {recipe.origin!r}, so {recipe.merge_method} "
            f"cannot start; {next(iter(inputs))!r} has it: use linear, or another base"
        )
    models = tuple(source for source in recipe.models if source.model in inputs)
    base = recipe.base_model if recipe.base_model in inputs else None
    if not models and base is None:
        raise RecipeError(
            f"{name!r} is in none of the recipe's models; {next(iter(inputs))!r} has it"
        )
    return recipe.model_copy(update={"models": models, "base_model": base})


def _too_few(recipe: Recipe) -> bool:
    """Whether only one model, or with an ORIGIN the base alone, is left to a method of several."""
    count = len(recipe.donors) + (recipe.method.base is Base.ENDPOINT and recipe.base is not None)
    return count < recipe.method.donors[0]


Factors = dict[str, float | Tensor]  # a model's coefficient, or one per row: (*rows, 1)


def _coefficients(
    recipe: Recipe, method: Linear, name: str, values: Values, family: Family
) -> Factors:
    """The factor of each model, those that are zero left out: nobody has to read them."""
    models = tuple(source.model for source in recipe.donors)
    if method.base is Base.ENDPOINT and recipe.base is not None:
        models = (recipe.base, *models)
    options = dict(values)
    shape = family.tensors[name].shape
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


def built_tensors(plan: Plan, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Merge all that is planned, tensor by tensor, in the dtypes of ``plan.shapes()``.

    Raises:
        RecipeError: A tensor cannot be merged, or comes out with NaN or Inf.
    """
    for part in plan.parts:
        for named in merged_tensors(part.recipe, part.family, device):
            yield named
            del named  # before the next is merged
            part.family.release()


def merged_tensors(
    recipe: Recipe, family: Family, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Merge a family tensor by tensor, as ``built_tensors`` does part by part."""
    for name in family.names:
        yield name, _finished(recipe, name, family, device)


def _finished(recipe: Recipe, name: str, family: Family, device: torch.device) -> Tensor:
    tensor = merge_tensor(recipe, name, family, device).to(written_dtype(recipe, family, name))
    _check_finite(tensor, recipe, name, family)
    return tensor


def _check_finite(merged: Tensor, recipe: Recipe, name: str, family: Family) -> None:
    """Refuse NaN and Inf, and say where they are from."""
    if bool(merged.isfinite().all()):
        return
    for model, own in family.inputs.get(name, {}).items():
        if not bool(family.read(model, name).isfinite().all()):
            file = family.checkpoints[model].tensors[own].file
            raise RecipeError(
                f"{file}: {own!r} has NaN or Inf in it; fetch or train {model!r} again"
            )
    raise RecipeError(
        f"{recipe.merge_method} of {name!r} has NaN or Inf in {merged.dtype}; "
        "make the weights smaller, or write float32"
    )


class Builder:
    """Writes recipes into one live model, which keeps its parameters' storage throughout.

    Args:
        model: What to write into, of the family's shape; its dtype is that of the result.
        family: The donors.

    Raises:
        RecipeError: The model is not of the family's shape.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model = model
        self.family = family
        self.loaded: Recipe | None = None
        self.version = 0  # grows with every build: what else depends on the weights is keyed by it
        self._targets = dict(_stored_tensors(model))
        _check_covered(self._targets, family.names)

    @torch.no_grad()
    def build(self, recipe: Recipe) -> None:
        """Write the recipe's weights into the model, in place.

        Raises:
            RecipeError: It cannot be built; the model is then of no recipe.
        """
        self.loaded = None  # a failed build leaves parts of two recipes: never score it
        self.version += 1
        owners = {name: part for part in self._parts(recipe) for name in part.family.names}
        _check_covered(self._targets, owners)
        for name, target in self._targets.items():
            part = owners[name]
            target.copy_(merge_tensor(part.recipe, name, part.family, target.device))
            _check_finite(target, part.recipe, name, part.family)
        self.loaded = recipe

    def _parts(self, recipe: Recipe) -> tuple[Part, ...]:
        if recipe.vocabulary is not None:
            raise RecipeError(
                "a recipe with a tokenizer changes the vocabulary, which a live model cannot; "
                "build it as a checkpoint (mergesearch build)"
            )
        first, *_ = recipe.parts
        if first.layers is None:
            return (Part(first.recipe, self.family),)
        return stack(recipe, self.family.checkpoints)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What the model holds now, by name."""
        for name, target in self._targets.items():
            yield name, target.detach()


def _check_covered(live: Iterable[str], merged: Iterable[str]) -> None:
    """Compare the live model's tensors with what is written into it.

    Raises:
        RecipeError: It has more or fewer layers, a tensor that is not written, or no head of its
            own for one that is.
    """
    have, get = layer_counts(live), layer_counts(merged)
    for stack_name in have.keys() & get.keys():
        if have[stack_name] != get[stack_name]:
            raise RecipeError(
                f"the merge has {get[stack_name]} layers and the live model {have[stack_name]}; "
                "a merge of another shape can only be built as a checkpoint (mergesearch build)"
            )
    if missing := sorted(set(live) - set(merged)):
        raise RecipeError(f"the live model has {missing[0]!r}, which the donors lack")
    if heads := [name for name in set(merged) - set(live) if is_head_weight(name)]:
        raise RecipeError(
            f"the merge has {heads[0]!r}, which the live model ties to its embedding; take an "
            "untied model for the base, or build a checkpoint (mergesearch build)"
        )


def _stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, a tied one once, and the buffers that a checkpoint has."""
    yield from model.named_parameters()
    stored = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)
