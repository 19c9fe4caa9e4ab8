"""Where the models' tensors live during a search: packed in memory, or read from disk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from merge_engine.models.checkpoint import Checkpoint, TensorInfo
from merge_engine.models.shared_packs import share
from merge_engine.models.vocabulary import Vocabulary
from merge_engine.numerics.packing import WIDTH, TensorPack

Inputs = Mapping[str, Mapping[str, str]]  # name in the result -> model -> the model's own name


class TensorSource(Protocol):
    """Tensors of several models under the names they have in the result.

    Attributes:
        checkpoints: The models' files, by model; empty if the tensors have none.
        inputs: For each tensor the models that have it, and its name in each of them.
        tensors: Shape and dtype of each tensor of the result.
        vocabulary: The result's, if the models do not share one.
    """

    checkpoints: Mapping[str, Checkpoint]
    inputs: Inputs
    tensors: Mapping[str, TensorInfo]
    vocabulary: Vocabulary | None = None

    def depth(self, name: str) -> float:
        """Return a tensor's relative depth: 0 first layer or outside the layers, 1 last layer."""

    def read(self, model: str, name: str) -> Tensor:
        """Read a model's tensor from its source, in the result's shape, on the CPU."""

    def dtype_of(self, model: str, name: str) -> torch.dtype:
        """Return the dtype of what ``read`` returns."""

    def cache_key(self, model: str, name: str) -> tuple[str, str] | None:
        """Return a fingerprint and a name that identify a model's tensor; None if none can."""

    def release(self, model: str) -> None:
        """Close a model's files."""


@dataclass(frozen=True)
class Budget:
    """Memory that packs, and statistics as large as they are, may take, in bytes."""

    device: int = 0  # on the device that builds
    pinned: int = 0  # page-locked, on the host
    per_element: int = 0  # bytes of statistics for each element of a donor
    sharers: int = 1  # processes that share the host's packs: of each its part counts


ON_DISK: Final = Budget()


@dataclass(frozen=True)
class Placed:
    """Bytes of packs and of their statistics, by where they are; of shared packs a part."""

    device: int = 0
    pinned: int = 0
    disk: int = 0  # bytes that are read from the source for every recipe


class Placement:
    """Reads tensors of a source, and keeps those that all models have in memory, in packs.

    Reading memory is 1.5 times as fast as reading a mapped file, and a pack is merged in one pass.
    Packs stay on the device that builds while there is room, then in page-locked host memory. Other
    tensors are read from the source every time. A pack has tensors of one of the ``groups`` of
    names, in their order (default: one group of all). Several processes share the packs that are in
    host memory, if all their tensors have a ``cache_key``.
    """

    def __init__(
        self,
        source: TensorSource,
        device: torch.device | None = None,
        budget: Budget = ON_DISK,
        groups: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self.source = source
        self.device = device or torch.device("cpu")
        self.budget = budget
        self.groups = [tuple(source.tensors)] if groups is None else groups
        self.placed = Placed()
        self._pinned: set[TensorPack] = set()
        self._shared: set[TensorPack] = set()
        self.packs = tuple(self._fitting()) if budget != ON_DISK else ()
        self._pack_of = {name: pack for pack in self.packs for name in pack.names}
        self._packed: dict[tuple[str, TensorPack], Tensor] = {}

    def _fitting(self) -> Iterator[TensorPack]:
        """Yield the packs for which there is room, and note where each of them is to stay."""
        device = pinned = disk = 0
        models, budget, on_host = self.source.checkpoints, self.budget, self.device.type == "cpu"
        for pack in _cut_packs(self.source, self.groups):
            name = pack.names[0]
            sizes = [pack.size * self.source.dtype_of(model, name).itemsize for model in models]
            sizes += [pack.size * budget.per_element] * (len(models) - 1)
            here, locked = sum(sizes), sum(map(pinned_bytes, sizes))
            if budget.sharers > 1 and all(self._contents(pack, [model]) for model in models):
                self._shared.add(pack)
                locked = sum(sizes) // budget.sharers
                here = locked if on_host else here
            if device + here <= budget.device:
                device += here
            elif pinned + locked <= budget.pinned:
                pinned += locked
                self._pinned.add(pack)
            else:
                disk += sum(sizes)
                continue
            yield pack
        self.placed = Placed(device, pinned, disk)

    def read(self, model: str, name: str) -> Tensor:
        """Return a model's tensor from where it lives: as stored, or with the result's rows."""
        if pack := self._pack_of.get(name):
            return pack.view(self.packed(model, pack), name)
        return self.source.read(model, name)

    def packed(self, model: str, pack: TensorPack) -> Tensor:
        """Return a model's tensors of a pack, (rows, WIDTH), read on first use.

        A pack that does not stay in memory has one tensor, which is returned in its own shape.
        """
        if pack not in self.packs:
            (name,) = pack.names
            return self.read(model, name)
        if (key := (model, pack)) not in self._packed:
            dtype = self.source.dtype_of(model, pack.names[0])
            self._packed[key] = self.lay(
                "", pack, [model], dtype, lambda name: self.source.read(model, name)
            )
            self.source.release(model)
        return self._packed[key]

    def lay(
        self,
        kind: str,
        pack: TensorPack,
        models: Sequence[str],
        dtype: torch.dtype,
        read: Callable[[str], Tensor],
    ) -> Tensor:
        """Lay what is read for each name into a matrix, (rows, WIDTH), where the packs stay.

        It depends on ``kind``, the pack and the ``models`` alone; another process may have read it.
        """
        pinned = pack in self._pinned
        device = torch.device("cpu") if pinned else self.device
        if pack in self._shared and device.type == "cpu":
            contents = (kind, dtype, *self._contents(pack, models))
            size = pack.size * dtype.itemsize

            def fill(out: Tensor) -> None:
                pack.fill(out.view(dtype), map(read, pack.names))

            if (shared := share(contents, size, fill, pinned=pinned)) is not None:
                return shared.view(dtype).view(-1, WIDTH)
        return pack.fill(pack.empty(dtype, device, pinned), map(read, pack.names))

    def _contents(self, pack: TensorPack, models: Sequence[str]) -> list[object]:
        """Return what identifies the models' tensors in a pack; empty if nothing does."""
        keys = [self.source.cache_key(model, name) for model in models for name in pack.names]
        return [*pack.shapes.items(), *keys] if all(keys) else []

    def release(self) -> None:
        """Free the packs; tensors read later are read from the source again."""
        self._packed.clear()


def pinned_bytes(size: int) -> int:
    """Return the bytes that torch allocates for page-locked memory: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def _cut_packs(source: TensorSource, groups: Iterable[Sequence[str]]) -> Iterator[TensorPack]:
    """Lay the float tensors that all models have into packs: each of one dtype in every model.

    A pack has tensors of one group, in its order.
    """
    for group in groups:
        kinds: dict[tuple[torch.dtype, ...], dict[str, tuple[int, ...]]] = defaultdict(dict)
        for name in group:
            info = source.tensors[name]
            if len(source.inputs[name]) == len(source.checkpoints) and info.dtype.is_floating_point:
                dtypes = tuple(source.dtype_of(model, name) for model in source.checkpoints)
                kinds[dtypes][name] = info.shape
        for shapes in kinds.values():
            yield from TensorPack.cut(shapes)
