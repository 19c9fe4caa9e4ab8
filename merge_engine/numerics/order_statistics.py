"""Order statistics of task vectors: sorted magnitudes, and variances over several donors.

They depend on the donors alone, so a tensor is sorted once for a whole study. Trimming by magnitude
then takes a lookup of the magnitude at a rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge_engine.numerics.statistics import PIECE, norm_ratio, sort_ascending, variance

_Array = NDArray[np.floating]
TABLE = 65_536  # steps between the ranks that are kept of a large tensor
_TALLY = 1 << 19  # elements whose squared changes are summed at a time
_SEGMENTS = 1 << 12  # summed at a time, of which numpy makes a copy in float64


@dataclass(frozen=True)
class Band:
    """Magnitudes that are kept: those between two bounds, and a share of those at a bound."""

    low: float
    high: float  # infinite: no upper bound
    low_share: float  # of the elements exactly at ``low`` that is kept
    high_share: float  # of those exactly at ``high``
    mass: float  # sum of the kept magnitudes
    total: float  # sum of all magnitudes

    @property
    def tied(self) -> bool:
        """Whether a choice among equal elements is needed."""
        return self.low_share < 1 or self.high_share > 0

    @property
    def rescale(self) -> float:
        """Factor that gives the kept elements the L1 norm of all (``norm_ratio``)."""
        return norm_ratio(self.total, self.mass)


EVERYTHING = Band(0.0, math.inf, 1.0, 0.0, 1.0, 1.0)
NOTHING = Band(math.inf, math.inf, 1.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Magnitudes:
    """Sorted magnitudes of a tensor; of a large tensor, only those at equally spaced ranks.

    Rank 0 is the smallest. With all ranks kept, up to TABLE + 1 elements, every answer is exact.
    Otherwise a rank is rounded to the nearest one kept, which is off by at most
    1 / (2 * TABLE) = 7.6e-6 of the elements, and half an element.
    """

    # Ascending ranks, the first 0 and the last that of the largest element, (m,) int64.
    ranks: Tensor
    values: Tensor  # the magnitudes at these ranks, (m,) float32
    lower: Tensor  # of all elements of that magnitude, the share of lower rank, (m,) float32
    masses: Tensor  # sum of all magnitudes of lower rank, (m,) float64
    total: float  # sum of all magnitudes

    @classmethod
    def of(cls, magnitudes: Tensor) -> Magnitudes:
        """Sort the magnitudes of a tensor on its device; on a CPU in place, if float32.

        Raises:
            ValueError: It has NaN or Inf.
        """
        ordered = sort_ascending(magnitudes.detach().flatten().float())
        size = ordered.numel()
        if size and not ordered[-1].isfinite():  # a sort puts both last
            raise ValueError("a task vector has NaN or Inf in it; fetch or train its donor again")
        ranks = _kept_ranks(size)
        values = ordered[ranks.to(ordered.device)]
        first = torch.searchsorted(ordered, values).cpu()
        equals = torch.searchsorted(ordered, values, right=True).cpu() - first
        lower = ((ranks - first).double() / equals).float()
        sums = segment_sums(ordered, ranks)
        masses = sums.cumsum(0) - sums
        return cls(ranks, values.cpu(), lower, masses, float(sums.sum()))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Magnitudes:
        """Restore what ``tensors`` returned."""
        ranks = _kept_ranks(int(tensors["size"]))
        values, lower, masses = (tensors[name] for name in ("values", "lower", "masses"))
        return cls(ranks, values, lower, masses, float(tensors["total"]))

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields as named tensors; the ranks follow from the size."""
        numbers = {
            "total": torch.tensor(self.total, dtype=torch.float64),
            "size": torch.tensor(self.size),
        }
        return numbers | {"values": self.values, "lower": self.lower, "masses": self.masses}

    @functools.cached_property
    def size(self) -> int:
        """Number of elements."""
        return int(self.ranks[-1]) + 1 if len(self.ranks) else 0

    def band(self, first: int, count: int) -> Band:
        """Return the band of the elements of ranks ``[first, first + count)``."""
        if count <= 0 or not self.size:
            return NOTHING
        start = self.index_of(first)
        values, lower, masses = self._arrays
        low, low_share = float(values[start]), float(lower[start])
        if first + count >= self.size:
            mass = self.total - float(masses[start])
            return Band(low, math.inf, 1 - low_share, 0.0, mass, self.total)
        stop = self.index_of(first + count)
        high, high_share = float(values[stop]), float(lower[stop])
        mass = float(masses[stop] - masses[start])
        if low == high:  # one magnitude, which both shares are of
            share = high_share - low_share
            return Band(low, low, share, share, mass, self.total)
        return Band(low, high, 1 - low_share, high_share, mass, self.total)

    @functools.cached_property
    def _arrays(self) -> tuple[_Array, _Array, _Array]:
        """The three fields as numpy arrays, which are read by element in a fraction of the time."""
        return self.values.numpy(), self.lower.numpy(), self.masses.numpy()

    def index_of(self, rank: int) -> int:
        """Return the index of the kept rank nearest to a rank."""
        return round(rank * (len(self.ranks) - 1) / max(1, self.size - 1))


def segment_sums(numbers: Tensor, starts: Tensor) -> Tensor:
    """Sum numbers (size,) from each ascending start (m,) to the next: (m,) float64, on the CPU."""
    if numbers.device.type != "cpu":
        return segment_sums_on_device(numbers, starts).cpu()
    parts = [part for part in torch.split(starts, _SEGMENTS) if len(part)]
    ends = [int(part[0]) for part in parts[1:]] + [len(numbers)] * bool(parts)
    sums = [
        np.add.reduceat(numbers[int(part[0]) : end].numpy(), part - part[0], dtype=np.float64)
        for part, end in zip(parts, ends, strict=True)
    ]
    return torch.from_numpy(np.concatenate([np.zeros(0), *sums]))


def segment_sums_on_device(numbers: Tensor, starts: Tensor) -> Tensor:
    """Return ``segment_sums`` without a copy of the numbers to the host."""
    lengths = torch.diff(starts, append=torch.tensor([len(numbers)])).to(numbers.device)
    return torch.segment_reduce(numbers.double(), "sum", lengths=lengths)


@functools.lru_cache(maxsize=64)  # a model's tensors are of a few sizes, and share them
def _kept_ranks(size: int) -> Tensor:
    """Return all ranks, or TABLE + 1 at equal distances, (m,) int64."""
    return torch.linspace(0, size - 1, min(size, TABLE + 1), dtype=torch.float64).round().long()


@dataclass(frozen=True)
class Variances:
    """Sorted variances over n donors' task vectors in one tensor, with the donors' changes.

    Exact up to TABLE + 1 elements. Else the share that is kept is off by at most 7.6e-6, and a
    sum of squared changes by at most those whose variance is within 2**-8 of the lowest kept one:
    they are taken to be spread evenly over their elements.
    """

    order: Magnitudes  # the variances, as magnitudes
    positive: int  # number of variances above zero
    # For each donor and each of the order's m ranks the sum of squared changes over the elements of
    # no lower variance, (n, m) float64.
    changes: Tensor

    @classmethod
    def of(cls, base: Tensor, donors: Sequence[Tensor]) -> Variances:
        """Sort the elements of n task vectors, (*s) with at least one element, by variance.

        Raises:
            ValueError: A variance is NaN or Inf.
        """
        start, *ends = (tensor.detach().cpu().flatten() for tensor in (base, *donors))
        found = torch.empty(start.shape)
        counts, *sums = _tally_by_variance(found, start, ends)
        positive = int(found.count_nonzero())
        order = Magnitudes.of(found)
        filled = counts > 0
        lower = np.append(0.0, counts[filled].cumsum(0))
        above = [np.append(row[filled].flip(0).cumsum(0).flip(0), 0.0) for row in sums]
        changes = [np.interp(order.ranks, lower, row) for row in above]
        return cls(order, positive, torch.from_numpy(np.stack(changes)))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Variances:
        """Restore what ``tensors`` returned."""
        order = Magnitudes.from_tensors(tensors)
        return cls(order, int(tensors["positive"]), tensors["changes"])

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields as named tensors."""
        own = {"positive": torch.tensor(self.positive), "changes": self.changes}
        return self.order.tensors() | own

    def largest(self, share: float) -> tuple[Band, Tensor]:
        """Return the band of the largest ``share`` of the elements of positive variance.

        With a share of 1 or more it has all elements, even those of no variance. Also return each
        donor's sum of squared changes in it, divided by the number of all elements, (n,) float64.
        """
        size = self.order.size
        if share >= 1:
            return EVERYTHING, self.changes[:, 0] / size
        kept = int(share * self.positive) if share > 0 else 0
        if not kept:
            return NOTHING, torch.zeros(len(self.changes), dtype=torch.float64)
        changes = self.changes[:, self.order.index_of(size - kept)]
        return self.order.band(size - kept, kept), changes / size


def _tally_by_variance(out: Tensor, base: Tensor, donors: Sequence[Tensor]) -> Tensor:
    """Write the variances of flat task vectors to ``out``, and sum their squares by variance.

    A group is of equal variances, or in large tensors of those that share 8 bits of mantissa.

    Returns:
        By ascending variance the size of each group, then the sum of each donor's squares in it,
        (1 + n, groups) float64.
    """
    exact, threads, size = len(out) <= TABLE + 1, torch.get_num_threads(), min(_TALLY, len(out))
    # Fresh memory costs more than the work in it: each thread reuses its own.
    spare = [torch.empty(len(donors), size, dtype=torch.float64) for _ in range(threads)]

    def tally(first: int) -> Tensor:
        part = slice(first, first + size)
        buffer = spare.pop()
        squares = buffer[:, : len(out[part])]
        _write_variances(out[part], squares, base[part], [donor[part] for donor in donors])
        if exact:
            groups, count = torch.unique(out[part], return_inverse=True)[1], 0
        else:
            groups, count = out[part].abs().view(torch.int32) >> 15, 1 << 16
        sums = [torch.bincount(groups, weights=row, minlength=count) for row in squares]
        spare.append(buffer)
        return torch.stack([torch.bincount(groups, minlength=count).double(), *sums])

    with ThreadPoolExecutor(threads) as pool:  # sums are added in order, whatever the threads
        return sum(pool.map(tally, range(0, len(out), size)), torch.zeros(()))


def _write_variances(out: Tensor, squares: Tensor, base: Tensor, donors: Sequence[Tensor]) -> None:
    """Write the variances, (size,), and the squares, (n, size), of flat task vectors (size,)."""
    for first in range(0, len(out), PIECE):
        part = slice(first, first + PIECE)
        start = base[part].float()
        deltas = [donor[part].float() - start for donor in donors]
        out[part] = variance(deltas)
        for row, delta in zip(squares, deltas, strict=True):
            row[part] = delta.square()
