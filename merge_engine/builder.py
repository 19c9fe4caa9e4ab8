"""A recipe into weights: one tensor, or a whole live model in place.

Kernels compute in float32; the one rounding happens where a tensor is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from merge_engine.donors import Family
from merge_engine.layout import is_head_weight, layer_counts
from merge_engine.methods import METHODS, Base, Linear
from merge_engine.methods.contract import Elementwise, Values
from merge_engine.methods.linear import sum_of_task_vectors, weighted_sum
from merge_engine.noise import key_of
from merge_engine.plan import Part, Plan, stack, written_dtype
from merge_engine.recipe import Recipe, RecipeError
from merge_engine.statistics import Magnitudes, Variances, row_width, widened

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
    info = family.tensors[name]
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

    inputs = family.inputs.get(name, {})
    lacking = bool(inputs) and any(model not in inputs for model in recipe.models_read)
    if lacking:
        recipe = _of_holders(recipe, name, inputs)
    if not out.dtype.is_floating_point:
        out.copy_(_same_in_all(recipe, name, read))
        return
    if lacking and _too_few(recipe):
        out.copy_(read(recipe.models_read[0]))
        return
    method = METHODS[recipe.merge_method]
    values = recipe.values(name, family.depth(name), inputs)
    try:
        if isinstance(method, Linear):
            factors = _coefficients(recipe, method, name, values, family)
            _write_sum(out, recipe, factors, read, family)
        else:
            assert isinstance(method, Elementwise)
            _write_elementwise(out, recipe, method, name, values, family)
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


Factors = dict[str, float | Tensor]  # a model's coefficient, or one per row, to multiply by


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

    @cached_property
    def ranks(self) -> Tensor:
        ranks = self.family.ranks(self.name, self.donor, self.base).to(self.device)
        # The compiler has vectors of 32-bit integers alone: on a CPU a pass more costs far less.
        vectors = self.family.stream.compiled and self.device.type == "cpu"
        return widened(ranks) if vectors else ranks

    @cached_property
    def salient(self) -> Tensor:
        return self.family.salient(self.name, self.donor, self.base).to(self.device)

    def stretch(self, chance: float, spread: float = 0.0) -> float:
        start, end = (
            self.family.read(model, self.name).to(self.device) for model in (self.base, self.donor)
        )
        last = row_width(end.shape) - 1
        by_rank = {"ranks": [self.ranks], "spread": spread, "last": last} if spread else {}
        before, after = self.family.stream.kept_mass(start, end, self.key, chance, by_rank)
        return before / after if min(before, after) >= 1e-7 else 1.0


@dataclass(frozen=True)
class _TaskVectors:
    """What the donors change in one tensor, for preparations to ask of."""

    members: tuple[_TaskVector, ...]

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
    out: Tensor, recipe: Recipe, method: Elementwise, name: str, values: Values, family: Family
) -> None:
    assert recipe.base is not None
    places = [i for i, w in enumerate(values.get("weight", [1] * len(recipe.donors))) if w != 0]  # type: ignore[arg-type]
    base = family.read(recipe.base, name).to(out.device)
    if not places or not out.numel():
        out.copy_(base)
        return
    keys = [key_of(recipe.seed, name, place) for place in places]
    models = [recipe.donors[place].model for place in places]
    wanted: dict[str, Any] = {
        key: tuple(value[place] for place in places) if isinstance(value, tuple) else value
        for key, value in values.items()
    }
    if method.prepare is not None:
        deltas = tuple(
            _TaskVector(family, name, recipe.base, model, key, out.device)
            for model, key in zip(models, keys, strict=True)
        )
        wanted = method.prepare(wanted, _TaskVectors(deltas))
    draws = wanted.pop("draws", method.random)
    donors = [family.read(model, name).to(out.device) for model in models]
    inputs, even = (base, donors), not method.random
    family.stream.write(out, method.kernel, inputs, wanted, keys if draws else None, even)


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
        tensor = merge_tensor(recipe, name, family, device, written_dtype(recipe, family, name))
        _check_finite(tensor, recipe, name, family)
        yield name, tensor
        del tensor  # before the next is merged


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
            merge_into(target, part.recipe, name, part.family)
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
