"""Build a recipe: one tensor, all tensors of a plan, or a live model in place.

Kernels compute in float32; the only rounding is where a tensor is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from merge_engine.building.merging import merge_pack
from merge_engine.building.pack_merge import to_device
from merge_engine.building.plan import Part, Plan, plan_parts, written_dtype
from merge_engine.errors import MergeError
from merge_engine.methods import Base
from merge_engine.models.checkpoint import Reader
from merge_engine.models.model_set import ModelSet
from merge_engine.models.tensor_names import is_head_weight, layer_counts
from merge_engine.numerics.packing import TensorPack
from merge_engine.numerics.statistics import all_finite
from merge_engine.recipe.recipe import Recipe


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

    Models that lack the tensor are left out.

    Raises:
        MergeError: The parameters do not work for the tensor; the message names it.
    """

    def read(model: str) -> Tensor:
        return to_device(models.read(model, name), out.device)

    owners = models.inputs[name]
    lacking = any(model not in owners for model in recipe.models_read)
    if lacking:
        recipe = _of_owners(recipe, name, owners)
    if not out.dtype.is_floating_point:
        out.copy_(_same_in_all(recipe, name, read))
        return
    if lacking and _too_few(recipe):
        out.copy_(read(recipe.models_read[0]))
        return
    merge_pack(out, recipe, TensorPack({name: tuple(out.shape)}), models)


def _of_owners(recipe: Recipe, name: str, owners: Mapping[str, str]) -> Recipe:
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


def _too_few(recipe: Recipe) -> bool:
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


def built_tensors(plan: Plan, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Merge the tensors of a plan one by one, in the dtypes of ``plan.shapes()``.

    Raises:
        MergeError: A tensor cannot be merged, or the result has NaN or Inf.
    """
    for part in plan.parts:
        for named in merged_tensors(part.recipe, part.model_set, device):
            yield named
            del named  # before the next is merged
            part.model_set.release()


def merged_tensors(
    recipe: Recipe, models: ModelSet, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Merge the tensors of models one by one, as ``built_tensors`` does part by part."""
    for name in models.names:
        tensor = merge_tensor(recipe, name, models, device, written_dtype(recipe, models, name))
        _check_finite(tensor, recipe, name)
        yield name, tensor
        del tensor  # before the next is merged


def _check_finite(merged: Tensor, recipe: Recipe, name: str) -> None:
    """Refuse values beyond the range of their dtype: those of the models are known to be finite."""
    if not all_finite(merged):
        raise MergeError(
            f"{recipe.merge_method} of {name!r} has NaN or Inf in {merged.dtype}; "
            "make the weights smaller, or write float32"
        )


class Builder:
    """Builds recipes in one live model, whose parameters keep their storage.

    Args:
        model: The live model, of the models' shape; its dtype is that of the result.
        model_set: Base and donors.

    Attributes:
        loaded: The recipe whose weights the live model has; None after a failed build.
        version: Number of builds so far: what is derived from the weights is valid for one version.

    Raises:
        MergeError: The live model is not of the models' shape.
    """

    def __init__(self, model: nn.Module, model_set: ModelSet) -> None:
        self.model = model
        self.model_set = model_set
        self.loaded: Recipe | None = None
        self.version = 0
        self._targets = dict(_stored_tensors(model))
        _check_covered(self._targets, model_set.names)
        self._packs = list(self._pack())
        packed = {name for pack, _ in self._packs for name in pack.names}
        self._unpacked = [name for name in self._targets if name not in packed]

    def _pack(self) -> Iterator[tuple[TensorPack, Tensor]]:
        """Move the live model's tensors into matrices that are packed like the donors'."""
        for pack in self.model_set.placement.packs:
            live = [self._targets.get(name) for name in pack.names]
            kinds = {(each.dtype, each.device) if each is not None else None for each in live}
            if len(kinds) == 1 and (kind := kinds.pop()) and kind[0].is_floating_point:
                matrix = pack.empty(*kind)
                for name in pack.names:
                    pack.view(matrix, name).copy_(self._targets[name].detach())
                    self._targets[name].data = pack.view(matrix, name)
                yield pack, matrix

    @torch.no_grad()
    def build(self, recipe: Recipe, *, force: bool = False) -> None:
        """Write a recipe's weights into the model, in place, unless it has them already.

        With ``force``, also if it was built last.

        Raises:
            MergeError: The recipe cannot be built; the live model then has no recipe's weights.
        """
        if not force and self.loaded is not None and self.loaded.key == recipe.key:
            return
        self.loaded = None  # a failed build leaves parts of two recipes, which must never be scored
        self.version += 1
        parts = self._parts(recipe)
        owners = {name: part for part in parts for name in part.model_set.names}
        _check_covered(self._targets, owners)
        whole = parts[0].model_set is self.model_set  # else layers are stacked, as in no donor
        done: list[torch.cuda.Event] = []
        for pack, matrix in self._packs if whole else ():
            merge_pack(matrix, parts[0].recipe, pack, self.model_set)
            if matrix.is_cuda:  # copies may be one pack ahead of the kernels, not all
                done.append(torch.cuda.current_stream(matrix.device).record_event())
                if len(done) > 1:
                    done.pop(0).synchronize()
            if matrix.dtype == torch.float16:  # other dtypes do not overflow
                for name in pack.names:
                    _check_finite(pack.view(matrix, name), parts[0].recipe, name)
        for name in self._unpacked if whole else self._targets:
            merge_into(self._targets[name], owners[name].recipe, name, owners[name].model_set)
            _check_finite(self._targets[name], owners[name].recipe, name)
        self.loaded = recipe

    def _parts(self, recipe: Recipe) -> tuple[Part, ...]:
        """Return the recipe's runs of layers."""
        if recipe.vocabulary is not None:
            raise MergeError(
                "a recipe with a tokenizer changes the vocabulary, which a live model cannot; "
                "build it as a checkpoint (mergesearch build)"
            )
        first, *_ = recipe.parts
        if first.layers is None:
            return (Part(first.recipe, self.model_set),)
        return plan_parts(recipe, self.model_set.checkpoints)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the live model's tensors by name."""
        for name, target in self._targets.items():
            yield name, target.detach()


def _check_covered(live: Iterable[str], merged: Iterable[str]) -> None:
    """Compare the live model's tensors with those of the merge."""
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
    """Yield the parameters, tied ones once, and the buffers that are stored in checkpoints."""
    yield from model.named_parameters()
    stored = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)
