"""Several models that fit one another: their tensors side by side, and what depends on them alone.

Where they live is decided once, by ``place``: on the device, in memory or on disk. Statistics of
them are worked out when they are first asked for, and kept.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from merge_engine.errors import MergeError
from merge_engine.models import statistics_cache as cache
from merge_engine.models.checkpoint import Checkpoint, TensorInfo, open_models
from merge_engine.models.tensor_names import depth_in, is_vocabulary, layer_counts, place_of
from merge_engine.numerics.kernel_runner import KernelRunner, compiling_pays
from merge_engine.numerics.noise import masses_below
from merge_engine.numerics.packing import TensorPack
from merge_engine.numerics.statistics import (
    Magnitudes,
    Variances,
    all_finite,
    overlaps,
    row_ranks,
    row_width,
    salient,
)

WORTH_KEEPING = 65_536  # elements from which on reading a statistic is quicker than measuring it

Known = TypeVar("Known")
Inputs = Mapping[str, Mapping[str, str]]  # a tensor's name in the result: model: its own name


class Rows(Protocol):
    """Brings a tensor with one row per token to the rows of the result (``Vocabulary``)."""

    @property
    def size(self) -> int:
        """Rows of the result."""

    def align(
        self, model: str, models: Sequence[str], base: str | None, read: Callable[[str], Tensor]
    ) -> Tensor:
        """One model's tensor with the result's rows."""


class ModelSet:
    """Checkpoints that fit one another, and what depends on them alone.

    The first model is the reference: the result gets its config and tokenizer.
    """

    # Of a tensor not named here: the same name in every model.
    inputs: Inputs = MappingProxyType({})
    repeated = False  # whether several recipes are to be built
    _device, _tier = torch.device("cpu"), "disk"

    def __init__(
        self,
        models: Iterable[str] | Mapping[str, Checkpoint],
        rows: Rows | None = None,
        base: str | None = None,
        candidates: int = 1,
    ) -> None:
        """Compare the models' tensors by name and shape.

        Args:
            models: Names of models to open, or models opened before.
            rows: The result's vocabulary, if it is not that of all models.
            base: The model whose rows stand in for those that another lacks.
            candidates: How many recipes are to be built: compiling kernels pays for many.

        Raises:
            RecipeError: A model is missing or damaged, or is not of the others' shape.
        """
        self.rows, self.base = rows, base
        checkpoints = models if isinstance(models, Mapping) else open_models(models)
        names = sorted({name for checkpoint in checkpoints.values() for name in checkpoint.tensors})
        counts = layer_counts(names)
        places = {name: place_of(name) for name in names}
        self._hold(
            checkpoints,
            {name: dict.fromkeys(checkpoints, name) for name in names},
            {n: depth_in(p.layer, counts[p.stack]) if p else 0.0 for n, p in places.items()},
        )
        self.stream = KernelRunner(compiling_pays(self.parameters, candidates))
        self.repeated = candidates > 1

    def _hold(
        self, checkpoints: Mapping[str, Checkpoint], wanted: Inputs, depths: Mapping[str, float]
    ) -> None:
        """Take what there is of ``wanted`` from the checkpoints, in the order of its names."""
        self.checkpoints = dict(checkpoints)
        self.reference = next(iter(self.checkpoints.values()))
        self.inputs = {name: _own_names(of, checkpoints) for name, of in wanted.items()}
        for name, of in self.inputs.items():
            holders = [(checkpoints[model], own) for model, own in of.items()]
            _check_shapes(name, holders, resized=self._is_resized(name))
        self.tensors = {name: self._info(name) for name in self.inputs}
        self._depths = depths
        self.stream = KernelRunner(compiling_pays(self.parameters, candidates=1))

    def _info(self, name: str) -> TensorInfo:
        """One of the holders' tensors, of the dtype that all of theirs promote to."""
        infos = [self.checkpoints[m].tensors[own] for m, own in self.inputs[name].items()]
        dtype = reduce(torch.promote_types, (info.dtype for info in infos))
        shape = infos[0].shape
        if self._is_resized(name) and self.rows is not None:
            shape = (self.rows.size, *shape[1:])
        return replace(infos[0], dtype=dtype, shape=shape)

    def _is_resized(self, name: str) -> bool:
        return self.rows is not None and is_vocabulary(name)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of the result."""
        return tuple(self.tensors)

    @cached_property
    def layer_filters(self) -> tuple[str, ...]:
        """For each layer the piece of its tensors' names that no other layer's have."""
        found = {p.layer: p for name in self.names if (p := place_of(name))}
        pieces = {i: f"{p.stack.rstrip('.').split('.')[-1]}.{i}." for i, p in found.items()}
        return tuple(pieces.get(layer, "") for layer in range(max(found, default=-1) + 1))

    def depth(self, name: str) -> float:
        """Where a tensor stands: 0 first layer or outside the layers, 1 last or only layer."""
        return self._depths[name]

    @property
    def parameters(self) -> int:
        """How many numbers a member has."""
        return sum(math.prod(info.shape) for info in self.tensors.values())

    def place(self, device: torch.device, tier: str) -> None:
        """Say where tensors stay once they were read.

        Args:
            device: Where candidates are built.
            tier: "device" there, "pinned" in page-locked host memory, "disk" nowhere.
        """
        self._device, self._tier = device, tier
        for laid in ("pages", "_page_of", "_kept"):  # where they were until now
            self.__dict__.pop(laid, None)

    def read(self, model: str, name: str) -> Tensor:
        """A model's tensor, as stored or in float32 with the result's rows, from where it lives."""
        page = self._page_of.get(name)
        return page.view(self.matrix(model, page), name) if page else self._stored(model, name)

    def matrix(self, model: str, page: TensorPack) -> Tensor:
        """A model's tensors of a page, (rows, WIDTH); of a page not laid its one tensor itself."""
        if page not in self.pages:
            (name,) = page.names
            return self.read(model, name)
        if (wanted := (model, page.names)) not in self._kept:
            stored = (self._stored(model, name) for name in page.names)
            room = self._room(page, self._stored_dtype(model, page.names[0]))
            self._kept[wanted] = page.fill(room, stored)
            self.checkpoints[model].release()
        return self._kept[wanted]

    def _room(self, page: TensorPack, dtype: torch.dtype) -> Tensor:
        """An empty matrix where those that stay in memory are."""
        host = self._tier == "pinned"
        return page.empty(dtype, torch.device("cpu") if host else self._device, host)

    @cached_property
    def pages(self) -> tuple[TensorPack, ...]:
        """The tensors that stay in memory, of all models at the same places: those all have.

        Memory of our own is read half as fast again as a mapped file, and one pass merges a page.
        """
        if self._tier == "disk":
            return ()
        kinds: dict[tuple[torch.dtype, ...], dict[str, tuple[int, ...]]] = defaultdict(dict)
        for name, info in self.tensors.items():
            if len(self.inputs[name]) == len(self.checkpoints) and info.dtype.is_floating_point:
                dtypes = tuple(self._stored_dtype(model, name) for model in self.checkpoints)
                kinds[dtypes][name] = info.shape
        return tuple(page for shapes in kinds.values() for page in TensorPack.cut(shapes))

    @cached_property
    def _page_of(self) -> dict[str, TensorPack]:
        return {name: page for page in self.pages for name in page.names}

    @cached_property
    def _kept(self) -> dict[tuple[str, tuple[str, ...]], Tensor]:
        return {}

    def _stored_dtype(self, model: str, name: str) -> torch.dtype:
        """The dtype of what ``_stored`` gives."""
        if self._is_resized(name):
            return torch.float32
        return self.checkpoints[model].read_dtype(self.inputs[name][model])

    def _stored(self, model: str, name: str) -> Tensor:
        own = self.inputs[name]

        def stored(model: str) -> Tensor:
            return self._checked(model, own[model])

        if self._is_resized(name) and self.rows is not None:
            return self.rows.align(model, tuple(own), self.base, stored)
        return stored(model)

    def _checked(self, model: str, own: str) -> Tensor:
        """A model's own tensor, looked through when it is read first.

        Raises:
            RecipeError: There is NaN or Inf in it, which some methods would hide.
        """
        checkpoint = self.checkpoints[model]
        tensor = checkpoint.read(own)
        if (model, own) not in self._finite:
            if not all_finite(tensor):
                raise MergeError(
                    f"{checkpoint.file_of(own)}: {own!r} has NaN or Inf in it; "
                    f"fetch or train {model!r} again"
                )
            self._finite.add((model, own))
        return tensor

    def look_through(self) -> None:
        """Read all tensors now, to where they stay, and not when a recipe first needs them.

        Raises:
            RecipeError: There is NaN or Inf in one.
        """
        for model, checkpoint in self.checkpoints.items():
            for name, holders in self.inputs.items():
                if model in holders:
                    self.read(model, name)
            checkpoint.release()

    @cached_property
    def _finite(self) -> set[tuple[str, str]]:
        return set()

    def release(self) -> None:
        """Let go of open files and of what was computed: no tensor read so far is needed again."""
        self._known.clear()
        self._kept.clear()
        for checkpoint in self.checkpoints.values():
            checkpoint.release()

    def gram(
        self, name: str, models: tuple[str, ...], origin: str | None, dim: int | None = None
    ) -> Tensor:
        """Inner products of the models' tensors, less ``origin``'s if given.

        They depend on the members alone, so each is computed once.

        Returns:
            (n, n) over all elements; with ``dim`` (rows, n, n), each over that dimension alone,
            the rows in the tensor's order with ``dim`` and the last dimension swapped. float64.
        """
        members = (*models, origin) if origin else models

        def measure() -> dict[str, Tensor]:
            tensors = [self.read(model, name) for model in models]
            start = self.read(origin, name) if origin else torch.zeros_like(tensors[0])
            gram = _gram([_rows(tensor, dim) for tensor in tensors], _rows(start, dim))
            return {"gram": gram if dim is not None else gram.sum(0)}

        kind = f"gram, dim {dim}, {'from the last' if origin else 'from zero'}"
        return self._once(kind, name, members, measure, lambda found: found["gram"])

    def magnitudes(self, name: str, donor: str, base: str) -> Magnitudes:
        """Order statistics of a donor's task vector; sorted once, on first use."""

        def measure() -> dict[str, Tensor]:
            return Magnitudes.of(self._delta(name, donor, base)).tensors()

        return self._once("magnitudes", name, (donor, base), measure, Magnitudes.from_tensors)

    def variances(self, name: str, donors: tuple[str, ...], base: str) -> Variances:
        """Where donors' task vectors differ; sorted once, on first use."""

        def measure() -> dict[str, Tensor]:
            ends = [self.read(donor, name) for donor in donors]
            return Variances.of(self.read(base, name), ends).tensors()

        return self._once("variances", name, (*donors, base), measure, Variances.from_tensors)

    def overlaps(self, name: str, donors: tuple[str, ...], base: str, epsilon: float) -> Tensor:
        """How many elements each donor changed alone, and how many others did, too: (2, n)."""

        def measure() -> dict[str, Tensor]:
            inputs = self.read(base, name), [self.read(donor, name) for donor in donors]
            sums = self.stream.sums(overlaps, inputs, {"epsilon": epsilon})
            return {"overlaps": sums.sum(1).cpu()}

        kind, members = f"overlaps beyond {epsilon!r}", (*donors, base)
        return self._once(
            kind, name, members, measure, lambda found: found["overlaps"].view(2, len(donors))
        )

    def beside(self, kind: str, page: TensorPack, donor: str, base: str) -> Tensor:
        """What a method takes for every element of a donor, laid as ``matrix`` lays the donor.

        Args:
            kind: "rank_share": where each magnitude stands in its row of the task vector, from 0,
                the smallest, to 1, float16; "salience_mask": which elements are ``salient``, bool.
            page: Of which tensors.
            donor: Whose.
            base: What it is compared with.
        """
        if page not in self.pages:
            (name,) = page.names
            return self._by_element[kind](name, donor, base)

        def lay() -> Tensor:
            found = (self._by_element[kind](name, donor, base) for name in page.names)
            first = next(found)
            return page.fill(self._room(page, first.dtype), itertools.chain([first], found))

        return self._remembered((kind, page.names, donor, base), lay)

    @cached_property
    def _by_element(self) -> dict[str, Callable[[str, str, str], Tensor]]:
        return {"rank_share": self._shares, "salience_mask": self._salient}

    def _shares(self, name: str, donor: str, base: str) -> Tensor:
        def measure() -> dict[str, Tensor]:
            ranks = row_ranks(self._delta(name, donor, base))
            return {"shares": (ranks / max(1, row_width(ranks.shape) - 1)).half()}

        return self._once(
            "shares", name, (donor, base), measure, lambda found: found["shares"], large=True
        )

    def _salient(self, name: str, donor: str, base: str) -> Tensor:
        """Which of a donor's elements matter most, (*s) bool, as ``statistics.salient`` has it."""

        def measure() -> dict[str, Tensor]:
            return {"salient": salient(self.read(base, name), self.read(donor, name))}

        return self._once(
            "salient", name, (donor, base), measure, lambda found: found["salient"], large=True
        )

    def masses(self, name: str, donor: str, base: str, key: int) -> Tensor:
        """What each random mask keeps of a donor's task vector, as ``masses_below`` has it."""
        return self._remembered(
            ("masses", name, donor, base, key),
            lambda: masses_below(self._delta(name, donor, base).abs(), key).float(),
        )

    def grams(self, names: tuple[str, ...], models: tuple[str, ...], origin: str | None) -> Tensor:
        """``gram`` of several tensors over all their elements, (k, n, n)."""
        return self._remembered(
            ("grams", names, models, origin),
            lambda: torch.stack([self.gram(name, models, origin) for name in names]),
        )

    def _delta(self, name: str, donor: str, base: str) -> Tensor:
        """A donor's task vector in one tensor, float32."""
        return self.read(donor, name).float() - self.read(base, name).float()

    def _once(
        self,
        kind: str,
        name: str,
        models: tuple[str, ...],
        measure: Callable[[], dict[str, Tensor]],
        form: Callable[[dict[str, Tensor]], Known],
        large: bool = False,
    ) -> Known:
        """What follows from some models' tensor alone: from memory, from the disk, or measured.

        Args:
            kind: Which statistic, with all that it depends on besides the weights.
            name: The tensor.
            models: In an order that matters.
            measure: Makes what is stored.
            form: Makes of it what is asked for.
            large: It takes as much room as the weights, which one build alone is not worth.
        """

        def make() -> Known:
            place = None if large and not self.repeated else self._place_of(kind, name, models)
            return form(cache.kept(place, measure) if place else measure())

        return self._remembered((kind, name, models), make)

    def _remembered(self, key: tuple[object, ...], make: Callable[[], Known]) -> Known:
        """What was made before under a key, or is made now."""
        if key not in self._known:
            self._known[key] = make()
        found: Known = self._known[key]
        return found

    @cached_property
    def _known(self) -> dict[tuple[object, ...], Any]:
        return {}

    def _place_of(self, kind: str, name: str, models: tuple[str, ...]) -> Path | None:
        """Where on disk a statistic belongs; None if it is measured as soon as it is read.

        The rows of another vocabulary are not the models' own, so they are known to no fingerprint.
        """
        own = self.inputs.get(name)
        small = math.prod(self.tensors[name].shape) < WORTH_KEEPING
        if own is None or small or self._is_resized(name):
            return None
        return cache.place_for(kind, [(self.checkpoints[m].fingerprint, own[m]) for m in models])


def _rows(tensor: Tensor, dim: int | None) -> Tensor:
    """The tensor as rows along ``dim``, or as one row: (rows, width)."""
    if dim is None or not tensor.dim():
        return tensor.reshape(1, -1)
    return tensor.transpose(dim, -1).reshape(-1, tensor.shape[dim])


def _gram(tensors: list[Tensor], start: Tensor, chunk: int = 1 << 20) -> Tensor:
    """Inner products row by row, (rows, n, n), in float64 and in pieces that fit the cache."""
    rows, width = start.shape
    shape = (rows, len(tensors), len(tensors))
    total = torch.zeros(shape, dtype=torch.float64, device=start.device)
    for column in range(0, width, chunk):
        step = max(1, chunk // width)
        for row in range(0, rows, step):
            part = (slice(row, row + step), slice(column, column + chunk))
            block = (
                torch.stack([t[part].double() for t in tensors], 1) - start[part].double()[:, None]
            )
            total[part[0]] += block @ block.mT
    return total.cpu()


def _own_names(wanted: Mapping[str, str], checkpoints: Mapping[str, Checkpoint]) -> dict[str, str]:
    """The models that have a tensor, and its name in each.

    Raises:
        RecipeError: A model lacks it that ought to have it.
    """
    found = {model: checkpoints[model].own_name(own) for model, own in wanted.items()}
    for model, own in wanted.items():
        if found[model] is None and checkpoints[model].ought_to_have(own):
            owner = next(m for m in found if found[m])
            raise MergeError(
                f"models {owner!r} and {model!r} are of different architectures: only {owner!r} "
                f"has {wanted[owner]!r}; merge models of one shape, or stack layers with 'slices'"
            )
    return {model: own for model, own in found.items() if own}


def _check_shapes(name: str, holders: list[tuple[Checkpoint, str]], *, resized: bool) -> None:
    (first, own), *others = holders
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
