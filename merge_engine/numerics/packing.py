"""Packs: tensors laid end to end in one matrix, so that one kernel call merges all of them.

A model has hundreds of tensors, many of them small, and a kernel call costs as much as merging a
hundred thousand numbers. Tensors that stay in memory are therefore laid out in matrices with rows
of WIDTH numbers; every tensor begins in a new row. A number that a method needs per tensor (a
coefficient, a bound, a key) becomes a column with one number per row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from merge_engine.numerics.noise import BLOCK, Noise, halves, key_of, weyl
from merge_engine.numerics.transfer import send_numbers

WIDTH = 4096
ROWS = 1 << 15  # of a pack at most, so that memory is allocated in pieces


class TensorPack:
    """Layout of k tensors, given in order, in a matrix of (rows, WIDTH) numbers.

    A pack is equal only to itself.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self._counts = torch.tensor([_rows(shape) for shape in shapes.values()])  # (k,)
        ends = self._counts.cumsum(0).tolist()
        self._starts = dict(zip(shapes, [0, *ends[:-1]], strict=True))  # first rows
        self._noises: dict[tuple[object, ...], Noise] = {}
        self._tensor_of_row: dict[torch.device, Tensor] = {}  # (rows,) each

    @classmethod
    def cut(cls, shapes: Mapping[str, tuple[int, ...]]) -> list[TensorPack]:
        """Lay tensors into as few packs as hold them, in order; a larger one has its own pack."""
        packs: list[dict[str, tuple[int, ...]]] = []
        free = 0
        for name, shape in shapes.items():
            if (rows := _rows(shape)) > free:
                packs.append({})
                free = ROWS
            packs[-1][name] = shape
            free -= rows
        return [cls(pack) for pack in packs]

    @property
    def size(self) -> int:
        """Number of elements of a matrix, the gaps included."""
        return int(self._counts.sum()) * WIDTH

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in order."""
        return tuple(self.shapes)

    def empty(self, dtype: torch.dtype, device: torch.device, pinned: bool = False) -> Tensor:
        """Return a matrix of zeros for the tensors; the gaps between them stay zero."""
        rows = int(self._counts.sum())
        return torch.zeros(rows, WIDTH, dtype=dtype, device=device, pin_memory=pinned)

    def view(self, matrix: Tensor, name: str) -> Tensor:
        """Return the part of a matrix that is one tensor, in its shape."""
        shape = self.shapes[name]
        start = self._starts[name] * WIDTH
        return matrix.view(-1)[start : start + prod(shape)].view(shape)

    def laid_on(self, first: Tensor) -> Tensor:
        """View tensors that lie end to end in memory as a matrix, given the first of them.

        The size of each has to be a multiple of WIDTH.
        """
        return first.as_strided((int(self._counts.sum()), WIDTH), (WIDTH, 1))

    def fill(self, matrix: Tensor, tensors: Iterable[Tensor]) -> Tensor:
        """Copy the tensors into a matrix, and return it."""
        for name, tensor in zip(self.shapes, tensors, strict=True):
            self.view(matrix, name).copy_(tensor)
        return matrix

    def columns(self, numbers: Tensor) -> list[Tensor]:
        """Repeat numbers of each tensor (c, k) to c columns of one per row (rows, 1).

        They stay on their device, so that nothing waits for a copy.
        """
        if (device := numbers.device) not in self._tensor_of_row:
            index = torch.arange(len(self._counts)).repeat_interleave(self._counts)
            self._tensor_of_row[device] = send_numbers(index, device)
        repeated = numbers.index_select(1, self._tensor_of_row[device])
        return [column.unsqueeze(1) for column in repeated]

    def sums(self, rows: Tensor) -> Tensor:
        """Add up sums of rows (..., rows) to sums of tensors (..., k), float64."""
        parts = torch.split(rows.double(), self._counts.tolist(), dim=-1)
        return torch.stack([part.sum(-1) for part in parts], -1)

    def noise(self, seed: int, donors: tuple[int, ...], device: torch.device, even: bool) -> Noise:
        """Return the noise of donors, given by their indices among the recipe's donors."""
        if (key := (seed, donors, device, even)) not in self._noises:
            self._noises[key] = self._noise(seed, donors, device, even)
        return self._noises[key]

    def _noise(self, seed: int, donors: tuple[int, ...], device: torch.device, even: bool) -> Noise:
        runs = [  # rows with one key: a tensor's, or those of one block of a huge one
            (name, block, min(BLOCK // WIDTH, count - row))
            for name, count in zip(self.shapes, self._counts.tolist(), strict=True)
            for block, row in enumerate(range(0, count, BLOCK // WIDTH))
        ]
        lengths = torch.tensor([rows for _, _, rows in runs])

        def column(halves_of_runs: list[int]) -> Tensor:
            numbers = torch.tensor(halves_of_runs, dtype=torch.int32)
            return send_numbers(numbers.repeat_interleave(lengths).unsqueeze(1), device)

        first = [torch.arange(rows, dtype=torch.int32) * WIDTH for _, _, rows in runs]
        keys = []
        for donor in donors:
            pairs = [halves(key_of(seed, name, donor), block) for name, block, _ in runs]
            keys.append((column([low for low, _ in pairs]), column([high for _, high in pairs])))
        positions = weyl(torch.cat(first)).unsqueeze(1)
        return Noise(send_numbers(positions, device), tuple(keys), even)


def _rows(shape: Sequence[int]) -> int:
    return -(-prod(shape) // WIDTH)
