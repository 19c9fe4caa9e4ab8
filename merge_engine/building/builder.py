"""Build recipes in a live model, in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from merge_engine.building.live_tensors import LiveTensors, lie_end_to_end
from merge_engine.building.merging import check_finite, merge_into, merge_pack, merge_tensor
from merge_engine.building.plan import Part, plan_parts, written_dtype
from merge_engine.errors import MergeError
from merge_engine.models.model_set import ModelSet
from merge_engine.models.tensor_names import layer_counts
from merge_engine.numerics.heap import trim_heap
from merge_engine.numerics.packing import TensorPack
from merge_engine.recipe.recipe import Recipe, Tokenizer


class Builder:
    """Builds recipes in one live model, whose parameters keep their storage from then on.

    Args:
        model: The live model, of the models' shape; its dtype is that of the result.
        model_set: Base and donors.

    Attributes:
        live: Where each stored tensor is written.
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
        shapes = {name: info.shape for name, info in model_set.tensors.items()}
        self.live = LiveTensors(model, shapes)
        self._owners: Mapping[str, Part] = {}  # of the recipe that was built last
        model_set.arrange([*self.live.separate.values(), *self.live.runs])
        self._packs = list(self._pack())
        trim_heap()  # of what the live model's tensors were before
        packed = {name for pack, _ in self._packs for name in pack.names}
        self._unpacked = [name for name in self.live.targets if name not in packed]

    def _pack(self) -> Iterator[tuple[TensorPack, Tensor]]:
        """Move the live model's tensors into matrices that are packed like the donors'.

        Tensors that lie end to end in one live tensor already form such a matrix.
        """
        in_runs = {name for run in self.live.runs for name in run}
        for pack in self.model_set.placement.packs:
            live = [self.live.targets[name] for name in pack.names]
            if not live[0].dtype.is_floating_point:
                continue
            if pack.names[0] in in_runs:
                if lie_end_to_end(live):  # not if models store parts of it in different dtypes
                    yield pack, pack.laid_on(live[0])
                continue
            matrix = pack.empty(live[0].dtype, live[0].device)
            for name, target in zip(pack.names, live, strict=True):
                pack.view(matrix, name).copy_(target.detach())
                target.data = pack.view(matrix, name)
            yield pack, matrix

    @torch.no_grad()
    def build(self, recipe: Recipe, *, force: bool = False) -> None:
        """Write a recipe's weights into the model, in place, unless it has them already.

        With ``force``, write them in any case.

        Raises:
            MergeError: The recipe cannot be built; the live model then has no recipe's weights.
        """
        if not force and self.loaded is not None and self.loaded.key == recipe.key:
            return
        self.loaded = None  # a failed build leaves parts of two recipes, which must never be scored
        self.version += 1
        parts = self._parts(recipe)
        self._owners = {name: part for part in parts for name in part.model_set.names}
        whole = parts[0].model_set is self.model_set  # else the recipe stacks layers
        if whole:
            self._merge_packs(parts[0].recipe)
        else:
            _check_same_layers(self.model_set.names, self._owners)
        for name in self._unpacked if whole else self.live.targets:
            self._merge_one(name)
        for name, target in self.live.targets.items():
            if (dtype := self._written_dtype(name)) != target.dtype:
                target.copy_(target.to(dtype))  # transformers keeps it in a wider one
        self.live.convert()
        self.loaded = recipe
        self.model_set.measurements.end_build()

    def _merge_packs(self, recipe: Recipe) -> None:
        """Merge the tensors that lie in packs, one pass for each."""
        done: list[torch.cuda.Event] = []
        for pack, matrix in self._packs:
            merge_pack(matrix, recipe, pack, self.model_set)
            if matrix.is_cuda:  # copies may be one pack ahead of the kernels, not all
                done.append(torch.cuda.current_stream(matrix.device).record_event())
                if len(done) > 1:
                    done.pop(0).synchronize()
            if matrix.dtype == torch.float16:  # other dtypes do not overflow
                for name in pack.names:
                    check_finite(pack.view(matrix, name), recipe, name)

    def _merge_one(self, name: str) -> None:
        """Merge one tensor into the live model, where it need not be contiguous."""
        part, target = self._owners[name], self.live.targets[name]
        out = target if target.is_contiguous() else torch.empty(target.shape).to(target)
        merge_into(out, part.recipe, name, part.model_set)
        check_finite(out, part.recipe, name)
        if out is not target:
            target.copy_(out)

    def _written_dtype(self, name: str) -> torch.dtype:
        """Return the dtype to write a tensor in: the recipe's, or the live model's if narrower."""
        part, target = self._owners[name], self.live.targets.get(name)
        dtype = written_dtype(part.recipe, part.model_set, name)
        named = part.recipe.out_dtype or part.recipe.dtype
        if target is not None and not (named and dtype.itemsize < target.dtype.itemsize):
            return target.dtype
        return dtype

    def _parts(self, recipe: Recipe) -> tuple[Part, ...]:
        """Return the recipe's runs of layers."""
        vocabulary = self.model_set.vocabulary
        _check_vocabulary(recipe, self.model_set, vocabulary.settings if vocabulary else None)
        first, *_ = recipe.parts
        if first.layers is None:
            return (Part(first.recipe, self.model_set),)
        return plan_parts(recipe, self.model_set.checkpoints, vocabulary)

    def shapes(self) -> dict[str, Tensor]:
        """Return the tensors of ``tensors()`` on the meta device: shapes and dtypes."""
        return {
            name: torch.empty(
                part.model_set.tensors[name].shape, dtype=self._written_dtype(name), device="meta"
            )
            for name, part in self._owners.items()
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights of the loaded recipe under their stored names.

        Tensors that the live model does not read are merged now.
        """
        for name, part in self._owners.items():
            dtype, target = self._written_dtype(name), self.live.targets.get(name)
            if target is not None:
                yield name, target.detach().to(dtype).contiguous()
            else:
                yield (
                    name,
                    merge_tensor(
                        part.recipe, name, part.model_set, part.model_set.placement.device, dtype
                    ),
                )


def _check_vocabulary(recipe: Recipe, models: ModelSet, live: Tokenizer | None) -> None:
    """Refuse a recipe whose checkpoint would have another vocabulary than the live model's."""
    if recipe.vocabulary != live:
        raise MergeError(
            f"the recipe's tokenizer is {_said(recipe.vocabulary)} and that of the live model, "
            f"which cannot change its vocabulary, {_said(live)}; build the recipe as a checkpoint "
            "(mergesearch build)"
        )
    models_read = (recipe.base_model, *recipe.models_read[1:])
    if live and models_read != tuple(models.checkpoints):
        raise MergeError(
            f"the live model's vocabulary is made of the base and models {[*models.checkpoints]}, "
            f"and the recipe names {[*models_read]}; build it as a checkpoint (mergesearch build)"
        )


def _said(tokenizer: Tokenizer | None) -> str:
    return repr(tokenizer.source) if tokenizer else "the base's as it is"


def _check_same_layers(have: Iterable[str], merged: Iterable[str]) -> None:
    """Refuse a merge of another number of layers than the live model's."""
    counts, others = layer_counts(have), layer_counts(merged)
    for stack in counts.keys() & others.keys():
        if counts[stack] != others[stack]:
            raise MergeError(
                f"the merge has {others[stack]} layers and the live model {counts[stack]}; "
                "a merge of another shape can only be built as a checkpoint (mergesearch build)"
            )
