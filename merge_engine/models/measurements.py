"""Statistics of the models' tensors. They do not depend on a recipe, so each is measured once.

Notation: n models, a tensor of shape s or k tensors of a pack.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from merge_engine.models.placement import Placement
from merge_engine.models.statistics_cache import StatisticsCache
from merge_engine.numerics.heap import trim_heap
from merge_engine.numerics.kernel_runner import KernelRunner
from merge_engine.numerics.noise import masses_below
from merge_engine.numerics.order_statistics import Magnitudes, Variances
from merge_engine.numerics.packing import TensorPack
from merge_engine.numerics.statistics import gram_by_row, overlaps, row_ranks, row_width, salient
from merge_engine.numerics.transfer import to_device

CACHED_FROM = 65_536  # elements from which reading a statistic is faster than measuring it
MEASURING = 4  # bytes per element of the tensor being measured
TEMPORARIES = 48 << 20  # bytes at most on top: of pieces, and of what is not yet trimmed
IDLE_BUILDS = 16  # builds without use, after which a weight-sized statistic is freed
_PIECE = 1 << 18  # elements of temporaries
_TRIM_EVERY = 1 << 22  # measured elements, whose temporaries fragment the heap

T = TypeVar("T")


class Measurements:
    """Statistics of models' tensors, kept in memory and, if large enough, cached on disk.

    Statistics as large as the weights are cached only if several recipes are built (``repeated``).
    """

    def __init__(self, placement: Placement, runner: KernelRunner, *, repeated: bool) -> None:
        self.kept: dict[tuple[object, ...], Any] = {}
        self._cache = StatisticsCache()
        self._placement = placement
        self._runner = runner
        self._repeated = repeated
        self._since_trim = 0  # elements measured since the heap was trimmed
        self._idle: dict[str, int] = {}  # builds since a key of ELEMENTWISE was used

    def gram(
        self, name: str, models: tuple[str, ...], origin: str | None, dim: int | None = None
    ) -> Tensor:
        """Return inner products of the models' tensors, less ``origin``'s if it is given.

        Returns:
            (n, n) over all elements; with ``dim`` (rows, n, n), each over that dimension alone,
            the rows in the tensor's order with ``dim`` and the last dimension swapped. float64.
        """
        members = (*models, origin) if origin else models

        def measure() -> dict[str, Tensor]:
            tensors = [self._read(model, name) for model in models]
            start = self._read(origin, name) if origin else torch.zeros_like(tensors[0])
            gram = gram_by_row([_rows(tensor, dim) for tensor in tensors], _rows(start, dim))
            return {"gram": gram if dim is not None else gram.sum(0)}

        kind = f"gram, dim {dim}, {'from the last' if origin else 'from zero'}"
        return self._cached(kind, name, members, measure, lambda found: found["gram"])

    def grams(self, names: tuple[str, ...], models: tuple[str, ...], origin: str | None) -> Tensor:
        """Return ``gram`` of k tensors over all their elements, (k, n, n)."""
        return self._kept(
            ("grams", names, models, origin),
            lambda: torch.stack([self.gram(name, models, origin) for name in names]),
        )

    def magnitudes(self, name: str, donor: str, base: str) -> Magnitudes:
        """Return order statistics of the magnitudes of a donor's task vector."""

        def measure() -> dict[str, Tensor]:
            return Magnitudes.of(self._magnitudes(name, donor, base)).tensors()

        return self._cached("magnitudes", name, (donor, base), measure, Magnitudes.from_tensors)

    def variances(self, name: str, donors: tuple[str, ...], base: str) -> Variances:
        """Return order statistics of the variance over the donors' task vectors."""

        def measure() -> dict[str, Tensor]:
            ends = [self._read(donor, name) for donor in donors]
            return Variances.of(self._read(base, name), ends).tensors()

        return self._cached("variances", name, (*donors, base), measure, Variances.from_tensors)

    def overlaps(self, name: str, donors: tuple[str, ...], base: str, epsilon: float) -> Tensor:
        """Count the elements that each donor changed alone, and together with others, (2, n)."""

        def measure() -> dict[str, Tensor]:
            inputs = self._read(base, name), [self._read(donor, name) for donor in donors]
            sums = self._runner.sums(overlaps, inputs, {"epsilon": epsilon})
            return {"overlaps": sums.sum(1).cpu()}

        return self._cached(
            f"overlaps beyond {epsilon!r}",
            name,
            (*donors, base),
            measure,
            lambda found: found["overlaps"].view(2, len(donors)),
        )

    def masses(self, name: str, donor: str, base: str, key: int) -> Tensor:
        """Return the mass that random masks keep of a donor's task vector (``masses_below``)."""

        def measure() -> dict[str, Tensor]:
            return {"masses": masses_below(self._magnitudes(name, donor, base), key).float()}

        return self._cached(
            f"masses of {key}", name, (donor, base), measure, lambda found: found["masses"]
        )

    def elementwise(self, kind: str, pack: TensorPack, donor: str, base: str) -> Tensor:
        """Return a statistic of every element of a donor, a key of ELEMENTWISE, packed like it."""
        self._idle[kind] = 0

        def stored(name: str) -> Tensor:
            def measure() -> dict[str, Tensor]:
                return {kind: ELEMENTWISE[kind](self._read(base, name), self._read(donor, name))}

            return self._stored(kind, name, (donor, base), measure, large=True)[kind]

        def fill() -> Tensor:
            if pack not in self._placement.packs:  # it has one tensor
                return stored(pack.names[0])
            # measured before the pack is locked: statistics have a lock of their own
            found = {name: stored(name) for name in pack.names}
            dtype = found[pack.names[0]].dtype
            return self._placement.lay(kind, pack, (donor, base), dtype, found.__getitem__)

        return self._kept((kind, pack.names, donor, base), fill)

    def end_build(self) -> None:
        """Free what measuring has left, and large statistics that the latest builds did not use."""
        self._idle = {kind: builds + 1 for kind, builds in self._idle.items()}
        if idle := {kind for kind, builds in self._idle.items() if builds > IDLE_BUILDS}:
            self.kept = {key: found for key, found in self.kept.items() if key[0] not in idle}
            self._idle = {kind: self._idle[kind] for kind in self._idle.keys() - idle}
        if idle or self._since_trim:
            self._trim()

    def _trim(self) -> None:
        self._since_trim = 0
        trim_heap()

    def release(self) -> None:
        """Free the statistics that are in memory."""
        self.kept.clear()

    def _read(self, model: str, name: str) -> Tensor:
        """Return a model's tensor on the device that builds, where it is measured."""
        return to_device(self._placement.read(model, name), self._placement.device)

    def _magnitudes(self, name: str, donor: str, base: str) -> Tensor:
        """Return those of a donor's task vector, float32, made without a temporary of its size."""
        start, end = self._read(base, name), self._read(donor, name)
        found = end.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        pieces = (torch.split(tensor.reshape(-1), _PIECE) for tensor in (found, start))
        for own, other in zip(*pieces, strict=True):
            own.sub_(other.float()).abs_()
        return found

    def _cached(
        self,
        kind: str,
        name: str,
        models: tuple[str, ...],
        measure: Callable[[], dict[str, Tensor]],
        form: Callable[[dict[str, Tensor]], T],
    ) -> T:
        """Return a statistic of some models' tensor: from memory, else as ``form`` makes it.

        The other arguments are those of ``_stored``.
        """
        return self._kept(
            (kind, name, models), lambda: form(self._stored(kind, name, models, measure))
        )

    def _stored(
        self,
        kind: str,
        name: str,
        models: tuple[str, ...],
        measure: Callable[[], dict[str, Tensor]],
        large: bool = False,
    ) -> dict[str, Tensor]:
        """Return a statistic of some models' tensor: from disk, else measured.

        Args:
            kind: Which statistic, with all that it depends on besides the weights.
            name: The tensor.
            models: In an order that matters.
            measure: Makes the named tensors that are stored.
            large: It is as large as the weights, which is not worth storing for a single build.
        """

        def measured() -> dict[str, Tensor]:
            found = measure()
            self._since_trim += math.prod(self._placement.source.tensors[name].shape)
            if self._since_trim >= _TRIM_EVERY:
                self._trim()
            return found

        store = not large or self._repeated
        file = self._cache_file(kind, name, models) if store else None
        return self._cache.load_or_make(file, measured) if file else measured()

    def _kept(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        """Return what is in memory under a key, made on first use."""
        if key not in self.kept:
            self.kept[key] = make()
        found: T = self.kept[key]
        return found

    def _cache_file(self, kind: str, name: str, models: tuple[str, ...]) -> Path | None:
        """Return a statistic's file in the cache; None if it is not to be stored."""
        if math.prod(self._placement.source.tensors[name].shape) < CACHED_FROM:
            return None
        source = self._placement.source
        keys = [key for model in models if (key := source.cache_key(model, name))]
        return self._cache.file_of(kind, keys) if len(keys) == len(models) else None


def _rank_share(base: Tensor, donor: Tensor) -> Tensor:
    """Return each magnitude's rank in its row of the task vector, uint8: 255 is the largest."""
    share = torch.empty(base.shape, dtype=torch.uint8, device=base.device)
    whole = [each if each.dim() > 1 else each.view(1, -1) for each in (share, base, donor)]
    scale = 255 / max(1, row_width(whole[0].shape) - 1)
    rows = max(1, _PIECE // max(1, whole[0][:1].numel()))
    for own, start, end in zip(*(torch.split(each, rows) for each in whole), strict=True):
        own.copy_((row_ranks(end.float() - start.float()) * scale).round_())
    return share


ELEMENTWISE = {"rank_share": _rank_share, "salience_mask": salient}  # (base, donor), (*s) -> (*s)


def _rows(tensor: Tensor, dim: int | None) -> Tensor:
    """Return the tensor as rows along ``dim``, or as one row: (rows, width)."""
    if dim is None or not tensor.dim():
        return tensor.reshape(1, -1)
    return tensor.transpose(dim, -1).reshape(-1, tensor.shape[dim])
