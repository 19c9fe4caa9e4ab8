"""A recipe into weights: one tensor, or a whole live model in place.

Kernels compute in float32; the one rounding happens where a tensor is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from merge_engine.building.merging import merge_pack, to_device
from merge_engine.building.plan import Part, Plan, stack, written_dtype
from merge_engine.errors import MergeError
from merge_engine.methods import Base
from merge_engine.models.model_set import ModelSet
from merge_engine.models.tensor_names import is_head_weight, layer_counts
from merge_engine.numerics.packing import TensorPack
from merge_engine.numerics.statistics import all_finite
from merge_engine.recipe.recipe import Recipe

Read = Callable[[str], Tensor]  # a model's tensor, on the device


def merge_tensor(
    recipe: Recipe,
    name: str,
    family: ModelSet,
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


def merge_into(out: Tensor, recipe: Recipe, name: str, family: ModelSet) -> None:
    """Merge one tensor and write it, rounded once, where it is to be: contiguous, any dtype.

    Raises:
        RecipeError: As ``merge_tensor``.
    """

    def read(model: str) -> Tensor:
        return to_device(family.read(model, name), out.device)

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
    merge_pack(out, recipe, TensorPack({name: tuple(out.shape)}), family)


def _of_holders(recipe: Recipe, name: str, inputs: Mapping[str, str]) -> Recipe:
    """The recipe without the models that lack a tensor.

    Raises:
        RecipeError: What is left has no meaning.
    """
    if recipe.origin and recipe.origin not in inputs:
        raise MergeError(
            f"{name!r} is missing in the base model {recipe.origin!r}, so {recipe.merge_method} "
            f"cannot start; {next(iter(inputs))!r} has it: use linear, or another base"
        )
    models = tuple(source for source in recipe.models if source.model in inputs)
    base = recipe.base_model if recipe.base_model in inputs else None
    if not models and base is None:
        raise MergeError(
            f"{name!r} is in none of the recipe's models; {next(iter(inputs))!r} has it"
        )
    return recipe.model_copy(update={"models": models, "base_model": base})


def _too_few(recipe: Recipe) -> bool:
    """Whether only one model, or with an ORIGIN the base alone, is left to a method of several."""
    count = len(recipe.donors) + (recipe.method.base is Base.ENDPOINT and recipe.base is not None)
    return count < recipe.method.donors[0]


def _same_in_all(recipe: Recipe, name: str, read: Read) -> Tensor:
    first, *others = (read(model) for model in recipe.models_read)
    if not all(torch.equal(first, other) for other in others):
        raise MergeError(
            f"{name!r} is not of a float dtype and differs between the models, so it cannot be "
            "merged; store the base's in all of them"
        )
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
    recipe: Recipe, family: ModelSet, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Merge a family tensor by tensor, as ``built_tensors`` does part by part."""
    for name in family.names:
        tensor = merge_tensor(recipe, name, family, device, written_dtype(recipe, family, name))
        _check_finite(tensor, recipe, name)
        yield name, tensor
        del tensor  # before the next is merged


def _check_finite(merged: Tensor, recipe: Recipe, name: str) -> None:
    """Refuse what has outgrown its dtype: the models' own numbers were looked through."""
    if not all_finite(merged):
        raise MergeError(
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

    def __init__(self, model: nn.Module, family: ModelSet) -> None:
        self.model = model
        self.family = family
        self.loaded: Recipe | None = None
        self.version = 0  # grows with every build: what else depends on the weights is keyed by it
        self._targets = dict(_stored_tensors(model))
        _check_covered(self._targets, family.names)
        self._pages = list(self._laid_out())
        laid = {name for page, _ in self._pages for name in page.names}
        self._alone = [name for name in self._targets if name not in laid]

    def _laid_out(self) -> Iterator[tuple[TensorPack, Tensor]]:
        """Move the live model's tensors to where they lie in the donors' pages."""
        for page in self.family.placement.packs:
            live = [self._targets.get(name) for name in page.names]
            kinds = {(each.dtype, each.device) if each is not None else None for each in live}
            if len(kinds) == 1 and (kind := kinds.pop()) and kind[0].is_floating_point:
                matrix = page.empty(*kind)
                for name in page.names:
                    page.view(matrix, name).copy_(self._targets[name].detach())
                    self._targets[name].data = page.view(matrix, name)
                yield page, matrix

    @torch.no_grad()
    def build(self, recipe: Recipe, *, force: bool = False) -> None:
        """Write a recipe's weights into the model, in place, unless it has them already.

        Args:
            recipe: What to build.
            force: Build it even if it was built last.

        Raises:
            RecipeError: It cannot be built; the model is then of no recipe.
        """
        if not force and self.loaded is not None and self.loaded.key == recipe.key:
            return
        self.loaded = None  # a failed build leaves parts of two recipes: never score it
        self.version += 1
        parts = self._parts(recipe)
        owners = {name: part for part in parts for name in part.family.names}
        _check_covered(self._targets, owners)
        whole = parts[0].family is self.family  # else layers are stacked as no donor has them
        done: list[torch.cuda.Event] = []
        for page, matrix in self._pages if whole else ():
            merge_pack(matrix, parts[0].recipe, page, self.family)
            if matrix.is_cuda:  # the copies of one page may be ahead of it, not those of all
                done.append(torch.cuda.current_stream(matrix.device).record_event())
                if len(done) > 1:
                    done.pop(0).synchronize()
            if matrix.dtype == torch.float16:  # the others hold all that finite donors come to
                for name in page.names:
                    _check_finite(page.view(matrix, name), parts[0].recipe, name)
        for name in self._alone if whole else self._targets:
            merge_into(self._targets[name], owners[name].recipe, name, owners[name].family)
            _check_finite(self._targets[name], owners[name].recipe, name)
        self.loaded = recipe

    def _parts(self, recipe: Recipe) -> tuple[Part, ...]:
        if recipe.vocabulary is not None:
            raise MergeError(
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
            raise MergeError(
                f"the merge has {get[stack_name]} layers and the live model {have[stack_name]}; "
                "a merge of another shape can only be built as a checkpoint (mergesearch build)"
            )
    if missing := sorted(set(live) - set(merged)):
        raise MergeError(
            f"the live model has {missing[0]!r}, which the donors lack; fetch the base again, or "
            "name donors that were fine-tuned from it"
        )
    if heads := [name for name in set(merged) - set(live) if is_head_weight(name)]:
        raise MergeError(
            f"the merge has {heads[0]!r}, which the live model ties to its embedding; take an "
            "untied model for the base, or build a checkpoint (mergesearch build)"
        )


def _stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, a tied one once, and the buffers that a checkpoint has."""
    yield from model.named_parameters()
    stored = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)
