"""A set of models that are merged together: tensors aligned, placed and measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, reduce
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from merge_engine.errors import MergeError
from merge_engine.models.alignment import is_multimodal, match_names
from merge_engine.models.checkpoint import Checkpoint, TensorInfo
from merge_engine.models.measurements import Measurements
from merge_engine.models.opening import open_models
from merge_engine.models.placement import Budget, Inputs, Placement, TensorSource
from merge_engine.models.tensor_names import (
    depth_in,
    is_head_weight,
    is_vocabulary,
    layer_counts,
    layer_filters,
    layer_position,
)
from merge_engine.models.vocabulary import Vocabulary, make_vocabulary
from merge_engine.numerics.kernel_runner import KernelRunner, compiling_pays
from merge_engine.numerics.statistics import all_finite
from merge_engine.recipe.recipe import Tokenizer


class Layout(NamedTuple):
    """The tensors of the result, and the tensors of each model that they are merged from."""

    inputs: Inputs
    depths: Mapping[str, float]  # relative depth in the result, 0 to 1

    @classmethod
    def aligned(cls, checkpoints: Mapping[str, Checkpoint]) -> Layout:
        """Return the layout that merges corresponding tensors, under the first model's names.

        If multimodal and text-only models are mixed, the multimodal parts are merged from the
        multimodal models alone, and only if the first model is multimodal.
        """
        first = next(iter(checkpoints.values()))
        multimodal = {m: is_multimodal(each.config) for m, each in checkpoints.items()}
        alike = {m for m, kind in multimodal.items() if kind == multimodal[first.model]}
        own = {model: _names_in(each, first) for model, each in checkpoints.items()}
        names = sorted(set().union(*own.values()))
        inputs = {
            name: {
                model: own[model].get(name, name)
                for model in checkpoints
                if name in own[model] or model in alike or is_head_weight(name)
            }
            for name in names
        }
        counts = layer_counts(names)
        positions = {name: layer_position(name) for name in names}
        return cls(
            inputs,
            {n: depth_in(p.layer, counts[p.stack]) if p else 0.0 for n, p in positions.items()},
        )


def _names_in(checkpoint: Checkpoint, first: Checkpoint) -> Mapping[str, str]:
    """Return a model's names of its tensors, by the names that the first model has for them."""
    same = {name: name for name in checkpoint.tensors}
    if checkpoint.layer_kinds == first.layer_kinds:
        return same
    found = match_names(first.folder, first.tensors, checkpoint.tensors)
    matched = {name: own for own, name in found.items()}
    if is_multimodal(checkpoint.config) != is_multimodal(first.config):
        return matched
    return {own: own for own in same if own not in found} | matched


class AlignedTensors(TensorSource):
    """Tensors of checkpoints under the names they have in the result, read from disk.

    Args:
        checkpoints: The models.
        layout: The result's tensors; None: all of them (``Layout.aligned``).
        vocabulary: The result's, if the models do not share one.
        base: The model whose rows replace those that another model lacks.

    Raises:
        MergeError: The models' tensors differ in shape, or a model lacks one that it must have.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        layout: Layout | None = None,
        vocabulary: Vocabulary | None = None,
        base: str | None = None,
    ) -> None:
        self.vocabulary, self._base = vocabulary, base
        self._known_finite: set[tuple[str, str]] = set()
        inputs, self._depths = layout or Layout.aligned(checkpoints)
        self.checkpoints = dict(checkpoints)
        self.inputs = {name: _own_names(of, checkpoints) for name, of in inputs.items()}
        self.tensors = {name: self._info(name) for name in self.inputs}

    def _info(self, name: str) -> TensorInfo:
        """Return the result's shape, and the dtype that the models' dtypes promote to."""
        owners = [(self.checkpoints[model], own) for model, own in self.inputs[name].items()]
        rows = self._rows_of(name)
        _check_shapes(name, owners, resized=rows is not None)
        infos = [checkpoint.tensors[own] for checkpoint, own in owners]
        dtype = reduce(torch.promote_types, (info.dtype for info in infos))
        shape = infos[0].shape
        return replace(infos[0], dtype=dtype, shape=(rows.size, *shape[1:]) if rows else shape)

    def _rows_of(self, name: str) -> Vocabulary | None:
        """Return what maps a tensor's rows to the result's vocabulary; None if they stay."""
        return self.vocabulary if is_vocabulary(name) else None

    @override
    def depth(self, name: str) -> float:
        return self._depths[name]

    @override
    def dtype_of(self, model: str, name: str) -> torch.dtype:
        if self._rows_of(name):
            return torch.float32
        return self.checkpoints[model].read_dtype(self.inputs[name][model])

    @override
    def read(self, model: str, name: str) -> Tensor:
        own = self.inputs[name]
        if rows := self._rows_of(name):
            return rows.align(model, tuple(own), self._base, lambda m: self._read_own(m, own[m]))
        return self._read_own(model, own[model])

    def _read_own(self, model: str, own: str) -> Tensor:
        """Read a tensor by the model's own name, and check on first use that it is finite."""
        checkpoint = self.checkpoints[model]
        tensor = checkpoint.read(own)
        if (model, own) not in self._known_finite:
            if not all_finite(tensor):
                raise MergeError(
                    f"{checkpoint.file_of(own)}: {own!r} has NaN or Inf in it; "
                    f"fetch or train {model!r} again"
                )
            self._known_finite.add((model, own))
        return tensor

    @override
    def cache_key(self, model: str, name: str) -> tuple[str, str] | None:
        if self._rows_of(name):  # rows of another vocabulary are not the model's own
            return None
        return self.checkpoints[model].fingerprint, self.inputs[name][model]

    @override
    def release(self, model: str) -> None:
        self.checkpoints[model].release()


class ModelSet:
    """Models that can be merged. The first is the reference: its config is the result's.

    Without a ``runner``, kernels are compiled if that pays for ``candidates`` candidates.

    Attributes:
        placement: Where the tensors live.
        measurements: Statistics of the tensors.
    """

    def __init__(
        self, source: TensorSource, candidates: int = 1, runner: KernelRunner | None = None
    ) -> None:
        self.source = source
        self.runner = runner or KernelRunner(compiling_pays(self.parameters, candidates))
        self._repeated = candidates > 1
        self.placement = Placement(source)
        self.measurements = Measurements(self.placement, self.runner, repeated=self._repeated)

    @classmethod
    def open(
        cls,
        models: Iterable[str],
        candidates: int = 1,
        runner: KernelRunner | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> ModelSet:
        """Open models by name, and compare their tensors by name and shape.

        ``tokenizer`` is the vocabulary to give them, in which the first model is the base.
        """
        checkpoints = open_models(models)
        base = next(iter(checkpoints))
        rows = make_vocabulary(tokenizer, checkpoints, base) if tokenizer else None
        return cls(AlignedTensors(checkpoints, vocabulary=rows, base=base), candidates, runner)

    def place(self, device: torch.device, budget: Budget) -> None:
        """Decide where tensors live from now on (``Placement``)."""
        self.placement = Placement(self.source, device, budget)
        self.measurements = Measurements(self.placement, self.runner, repeated=self._repeated)

    def arrange(self, groups: Iterable[Sequence[str]]) -> None:
        """Set which tensors share packs, before any tensor is read."""
        if self.placement.groups == (groups := [tuple(group) for group in groups]):
            return
        self.placement = Placement(
            self.source, self.placement.device, self.placement.budget, groups
        )
        self.measurements = Measurements(self.placement, self.runner, repeated=self._repeated)

    @property
    def checkpoints(self) -> Mapping[str, Checkpoint]:
        """The models' files, by model."""
        return self.source.checkpoints

    @property
    def reference(self) -> Checkpoint:
        """The model whose config and tokenizer the result gets."""
        return next(iter(self.checkpoints.values()))

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The vocabulary that the models' rows are mapped to; None: they share one."""
        return self.source.vocabulary

    @property
    def inputs(self) -> Inputs:
        """For each tensor of the result the models that have it, and its name in each."""
        return self.source.inputs

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of each tensor of the result."""
        return self.source.tensors

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the result's tensors."""
        return tuple(self.source.tensors)

    @property
    def parameters(self) -> int:
        """Number of parameters of the result."""
        return sum(math.prod(info.shape) for info in self.source.tensors.values())

    @cached_property
    def layer_filters(self) -> tuple[str, ...]:
        """For each layer, the part of tensor names that only its tensors contain."""
        return layer_filters(self.names)

    def depth(self, name: str) -> float:
        """Return a tensor's relative depth: 0 first layer or outside the layers, 1 last layer."""
        return self.source.depth(name)

    def read(self, model: str, name: str) -> Tensor:
        """Return a model's tensor from where it lives."""
        return self.placement.read(model, name)

    def check_finite(self) -> None:
        """Read all tensors now, instead of when a recipe first needs them.

        Raises:
            MergeError: There is NaN or Inf in one.
        """
        for model in self.checkpoints:
            for name, owners in self.inputs.items():
                if model in owners:
                    self.placement.read(model, name)
            self.source.release(model)

    def release(self) -> None:
        """Close files and free memory: no tensor read so far is needed again."""
        self.measurements.release()
        self.placement.release()
        for model in self.checkpoints:
            self.source.release(model)


def _own_names(wanted: Mapping[str, str], checkpoints: Mapping[str, Checkpoint]) -> dict[str, str]:
    """Return the models that have a tensor and its name in each; refuse one that must have it."""
    found = {model: checkpoints[model].name_in(own) for model, own in wanted.items()}
    for model, own in wanted.items():
        if found[model] is None and checkpoints[model].must_have(own):
            owner = next(m for m in found if found[m])
            raise MergeError(
                f"model {model!r} lacks {wanted[owner]!r}, which {owner!r} has: fetch it again if "
                "it should have that, or merge models of one shape, or stack layers with 'slices'"
            )
    return {model: own for model, own in found.items() if own}


def _check_shapes(name: str, owners: Sequence[tuple[Checkpoint, str]], *, resized: bool) -> None:
    """Refuse models in which a tensor's shapes differ; ``resized`` rows may differ."""
    (first, own), *others = owners
    mine = first.tensors[own].shape
    for other, its in others:
        theirs = other.tensors[its].shape
        if mine != theirs and not (resized and mine[1:] == theirs[1:]):
            only_rows = is_vocabulary(name) and mine[1:] == theirs[1:]
            raise MergeError(
                f"models {first.model!r} and {other.model!r} differ in the shape of {name!r}: "
                f"{list(mine)} against {list(theirs)}; "
                + (
                    "their vocabularies differ: say with 'tokenizer_source: union' (or base, or "
                    "a model) which one the result is to have"
                    if only_rows
                    else "merge models fine-tuned from one base"
                )
            )
