"""Tensors laid end to end, so that one kernel call merges all of them.

A model has hundreds of tensors, many of them small, and a call costs as much as merging a hundred
thousand numbers. So where models stay in memory their tensors lie in one matrix with rows of WIDTH
numbers, each tensor beginning a row of its own. What a method knows of each tensor (a coefficient,
a bound, a key) becomes a column with one number for each row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from merge_engine.numerics.noise import BLOCK, Noise, halves, key_of, weyl

WIDTH = 4096
ROWS = 1 << 15  # of a page at the most, so that memory is asked for in pieces


@dataclass(frozen=True, eq=False)  # every page is a place of its own
class TensorPack:
    """Where tensors lie in a matrix of (rows, WIDTH) numbers.

    Args:
        shapes: Of the tensors by name, in the order they lie in.
    """

    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def cut(cls, shapes: Mapping[str, tuple[int, ...]]) -> list[TensorPack]:
        """As few pages as hold the tensors, in order; a larger tensor has a page of its own."""
        pages: list[dict[str, tuple[int, ...]]] = []
        room = 0
        for name, shape in shapes.items():
            rows = _rows(shape)
            if rows > room:
                pages.append({})
                room = ROWS
            pages[-1][name] = shape
            room -= rows
        return [cls(page) for page in pages]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors, in order."""
        return tuple(self.shapes)

    @cached_property
    def _counts(self) -> Tensor:
        return torch.tensor([_rows(shape) for shape in self.shapes.values()])

    @cached_property
    def _starts(self) -> dict[str, int]:
        ends = self._counts.cumsum(0).tolist()
        return dict(zip(self.shapes, [0, *ends[:-1]], strict=True))

    def empty(self, dtype: torch.dtype, device: torch.device, pinned: bool = False) -> Tensor:
        """A matrix for these tensors, zero everywhere: between two of them it stays so."""
        rows = int(self._counts.sum())
        return torch.zeros(rows, WIDTH, dtype=dtype, device=device, pin_memory=pinned)

    def view(self, matrix: Tensor, name: str) -> Tensor:
        """One tensor's own part of a matrix, in its shape."""
        shape = self.shapes[name]
        start = self._starts[name] * WIDTH
        return matrix.view(-1)[start : start + prod(shape)].view(shape)

    def fill(self, matrix: Tensor, tensors: Iterable[Tensor]) -> Tensor:
        """Copy the tensors to where they lie; returns the matrix."""
        for name, tensor in zip(self.shapes, tensors, strict=True):
            self.view(matrix, name).copy_(tensor)
        return matrix

    def column(self, numbers: Tensor) -> Tensor:
        """One number per tensor (k,) as one per row (rows, 1), on the device of the numbers."""
        return numbers.repeat_interleave(self._counts.to(numbers.device)).unsqueeze(1)

    def sums(self, rows: Tensor) -> Tensor:
        """Sums of rows (..., rows) as sums of tensors (..., k), float64 on the CPU."""
        lengths = self._counts.tolist()
        parts = torch.split(rows.double().cpu(), lengths, dim=-1)
        return torch.stack([part.sum(-1) for part in parts], -1)

    def noise(self, seed: int, places: tuple[int, ...], device: torch.device, even: bool) -> Noise:
        """The noise of the donors at these places among the recipe's."""
        if (wanted := (seed, places, device, even)) not in self._noises:
            self._noises[wanted] = self._noise(*wanted)
        return self._noises[wanted]

    def _noise(self, seed: int, places: tuple[int, ...], device: torch.device, even: bool) -> Noise:
        runs = [  # rows with one key: a tensor's, or those of one block of a huge one
            (name, block, min(BLOCK // WIDTH, count - row))
            for name, count in zip(self.shapes, self._counts.tolist(), strict=True)
            for block, row in enumerate(range(0, count, BLOCK // WIDTH))
        ]
        lengths = torch.tensor([rows for _, _, rows in runs])

        def column(halves_of_runs: list[int]) -> Tensor:
            numbers = torch.tensor(halves_of_runs, dtype=torch.int32)
            return numbers.repeat_interleave(lengths).unsqueeze(1).to(device)

        first = [torch.arange(rows, dtype=torch.int32) * WIDTH for _, _, rows in runs]
        keys = []
        for place in places:
            pairs = [halves(key_of(seed, name, place), block) for name, block, _ in runs]
            keys.append((column([low for low, _ in pairs]), column([high for _, high in pairs])))
        return Noise(weyl(torch.cat(first)).unsqueeze(1).to(device), tuple(keys), even)

    @cached_property
    def _noises(self) -> dict[tuple[object, ...], Noise]:
        return {}


def _rows(shape: Sequence[int]) -> int:
    return -(-prod(shape) // WIDTH)
