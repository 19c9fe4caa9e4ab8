"""Order statistics of a task vector: what a donor's magnitudes are, whatever the recipe.

Trimming by magnitude needs the element of some rank, and chances by magnitude the rank of every
element. Both depend on the donor alone, so it is sorted once for a whole study and no candidate
sorts anything.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

TABLE = 65_536  # steps between the ranks that are kept of a large tensor
_BLOCK = 1 << 22  # elements whose rows are ranked at a time
_TALLIED = 1 << 19  # elements whose squared changes are summed up at a time
_PIECE = 1 << 15  # elements that stay in a cache; torch gives more than these several threads


@dataclass(frozen=True)
class Band:
    """Which magnitudes are kept: those between two bounds, and a share of those at a bound.

    Args:
        low: Lower bound.
        high: Upper bound; infinite if there is none.
        low_share: Share of the elements exactly at ``low`` that is kept.
        high_share: Share of those exactly at ``high``.
        mass: Sum of the kept magnitudes.
        total: Sum of all magnitudes.
    """

    low: float
    high: float
    low_share: float
    high_share: float
    mass: float
    total: float

    @property
    def tied(self) -> bool:
        """Whether some of several equal elements have to be chosen."""
        return self.low_share < 1 or self.high_share > 0

    @property
    def stretch(self) -> float:
        """What gives the kept elements the L1 norm of all; 1 where either norm is below 1e-7."""
        return self.total / self.mass if min(self.total, self.mass) >= 1e-7 else 1.0


EVERYTHING = Band(0.0, math.inf, 1.0, 0.0, 1.0, 1.0)
NOTHING = Band(math.inf, math.inf, 1.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Magnitudes:
    """The sorted magnitudes of a tensor, or of a large one those at equally spaced ranks.

    A rank counts from 0 at the smallest. With all ranks kept, up to TABLE + 1 elements, every
    answer is exact. Otherwise a rank is rounded to the nearest one kept, which is off by at most
    1 / (2 * TABLE) = 7.6e-6 of the elements, and half an element.

    Args:
        ranks: Ascending ranks, the first 0 and the last that of the largest element, (m,) int64.
        values: The magnitudes at these ranks, (m,) float32.
        lower: Of all elements of that magnitude, the share of lower rank, (m,) float32.
        masses: Sum of all magnitudes of lower rank, (m,) float64.
        total: Sum of all magnitudes.
    """

    ranks: Tensor
    values: Tensor
    lower: Tensor
    masses: Tensor
    total: float

    @classmethod
    def of(cls, delta: Tensor) -> Magnitudes:
        """Sort a tensor's magnitudes, on any device.

        Raises:
            ValueError: There is NaN or Inf among them.
        """
        flat = delta.detach().abs().flatten().float()
        size = flat.numel()
        ordered = _ascending(flat)
        if size and not ordered[-1].isfinite():  # a sort puts both last
            raise ValueError("a task vector has NaN or Inf in it; fetch or train its donor again")
        ranks = _kept_ranks(size)
        values = ordered[ranks.to(ordered.device)]
        first = torch.searchsorted(ordered, values).cpu()
        equals = torch.searchsorted(ordered, values, right=True).cpu() - first
        lower = ((ranks - first).double() / equals).float()
        sums = np.add.reduceat(ordered.cpu().numpy(), ranks.numpy(), dtype=np.float64)
        masses = torch.from_numpy(sums).cumsum(0) - torch.from_numpy(sums)
        return cls(ranks, values.cpu(), lower, masses, float(sums.sum()))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Magnitudes:
        """The inverse of ``tensors``."""
        ranks = _kept_ranks(int(tensors["size"]))
        values, lower, masses = (tensors[name] for name in ("values", "lower", "masses"))
        return cls(ranks, values, lower, masses, float(tensors["total"]))

    def tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors; the ranks follow from the size."""
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
        """Keep the elements of ranks ``[first, first + count)``."""
        if count <= 0 or not self.size:
            return NOTHING
        start, stop = self.place(first), self.place(first + count)
        assert start is not None
        values, lower, masses = self._arrays
        low, low_share = float(values[start]), float(lower[start])
        if stop is None:
            mass = self.total - float(masses[start])
            return Band(low, math.inf, 1 - low_share, 0.0, mass, self.total)
        high, high_share = float(values[stop]), float(lower[stop])
        mass = float(masses[stop] - masses[start])
        if low == high:  # all that is kept is of one magnitude, and both shares are of it
            share = high_share - low_share
            return Band(low, low, share, share, mass, self.total)
        return Band(low, high, 1 - low_share, high_share, mass, self.total)

    @functools.cached_property
    def _arrays(self) -> tuple[Any, Any, Any]:
        """What numpy reads an element of in a fraction of torch's time."""
        return self.values.numpy(), self.lower.numpy(), self.masses.numpy()

    def place(self, rank: int) -> int | None:
        """Index of the kept rank nearest to one; None past the largest element."""
        if rank >= self.size:
            return None
        return round(rank * (len(self.ranks) - 1) / max(1, self.size - 1))


def _ascending(flat: Tensor) -> Tensor:
    if flat.device.type == "cpu":
        return torch.from_numpy(np.sort(flat.numpy()))  # vectorised: 10 times as fast as torch's
    return flat.sort().values


@functools.lru_cache(maxsize=64)  # a family's tensors are of a few sizes, and share them
def _kept_ranks(size: int) -> Tensor:
    """All ranks, or TABLE + 1 at equal distances, (m,) int64."""
    return torch.linspace(0, size - 1, min(size, TABLE + 1), dtype=torch.float64).round().long()


@dataclass(frozen=True)
class Variances:
    """Where the donors differ most, in one tensor, and how much each changes there.

    Exact up to TABLE + 1 elements. Else the share that is kept is off by at most 7.6e-6, and a
    sum of squared changes by at most those whose variance is within 2**-8 of the lowest kept one:
    they are taken to be spread evenly over their elements.

    Args:
        order: The variances over the donors as magnitudes.
        positive: How many are above zero.
        changes: Of each donor's squared changes, the sum over all elements that are not of lower
            variance than the order's ranks, (n, m) float64.
    """

    order: Magnitudes
    positive: int
    changes: Tensor

    @classmethod
    def of(cls, base: Tensor, donors: Sequence[Tensor]) -> Variances:
        """Sort the elements of n task vectors, (*s) with at least one element, by variance.

        Raises:
            ValueError: There is NaN or Inf among the variances.
        """
        start, *ends = (tensor.detach().cpu().flatten() for tensor in (base, *donors))
        found = torch.empty(start.shape)
        counts, *sums = _tallied(found, start, ends)
        order = Magnitudes.of(found)
        filled = counts > 0
        lower = np.append(0.0, counts[filled].cumsum(0))
        above = [np.append(row[filled].flip(0).cumsum(0).flip(0), 0.0) for row in sums]
        changes = [np.interp(order.ranks, lower, row) for row in above]
        return cls(order, int(found.count_nonzero()), torch.from_numpy(np.stack(changes)))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Variances:
        """The inverse of ``tensors``."""
        order = Magnitudes.from_tensors(tensors)
        return cls(order, int(tensors["positive"]), tensors["changes"])

    def tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors."""
        own = {"positive": torch.tensor(self.positive), "changes": self.changes}
        return self.order.tensors() | own

    def largest(self, share: float) -> tuple[Band, Tensor]:
        """Keep a share of the elements with any variance; all elements from 1 on.

        Returns:
            Their band of variances, and each donor's sum of squared changes there, divided by the
            number of all elements, (n,) float64.
        """
        size = self.order.size
        if share >= 1:
            return EVERYTHING, self.changes[:, 0] / size
        kept = int(share * self.positive) if share > 0 else 0
        if not kept:
            return NOTHING, torch.zeros(len(self.changes), dtype=torch.float64)
        place = self.order.place(size - kept)
        assert place is not None
        return self.order.band(size - kept, kept), self.changes[:, place] / size


def _tallied(out: Tensor, base: Tensor, donors: Sequence[Tensor]) -> Tensor:
    """Write the variances of flat task vectors, and sum up their squares by variance.

    Equal variances are a group, or in large tensors those that share 8 bits of their mantissa.

    Args:
        out: For the variances, (size,) float32.
        base: (size,), on the CPU.
        donors: n tensors, (size,).

    Returns:
        How many elements each group has, by ascending variance, and the sums of each donor's
        squares, (1 + n, groups) float64.
    """
    exact, threads, size = len(out) <= TABLE + 1, torch.get_num_threads(), min(_TALLIED, len(out))
    # Fresh memory costs more than the work in it: each thread keeps its own.
    spare = [torch.empty(len(donors), size, dtype=torch.float64) for _ in range(threads)]

    def tally(first: int) -> Tensor:
        part = slice(first, first + size)
        room = spare.pop()
        squares = room[:, : len(out[part])]
        _write_variances(out[part], squares, base[part], [donor[part] for donor in donors])
        if exact:
            groups, count = torch.unique(out[part], return_inverse=True)[1], 0
        else:
            groups, count = out[part].abs().view(torch.int32) >> 15, 1 << 16
        sums = [torch.bincount(groups, weights=row, minlength=count) for row in squares]
        spare.append(room)
        return torch.stack([torch.bincount(groups, minlength=count).double(), *sums])

    with ThreadPoolExecutor(threads) as pool:  # their sums are added in order, however many
        return sum(pool.map(tally, range(0, len(out), size)), torch.zeros(()))


def _write_variances(out: Tensor, squares: Tensor, base: Tensor, donors: Sequence[Tensor]) -> None:
    """Of flat task vectors (size,) the variances, (size,), and the squares, (n, size)."""
    for first in range(0, len(out), _PIECE):
        part = slice(first, first + _PIECE)
        start = base[part].float()
        deltas = [donor[part].float() - start for donor in donors]
        out[part] = variance(deltas)
        for row, delta in zip(squares, deltas, strict=True):
            row[part] = delta.square()


def variance(deltas: Sequence[Tensor]) -> Tensor:
    """Of each element over n tensors (*s), divided by n; exactly 0 where all are equal.

    Source: Welford 1962, https://doi.org/10.1080/00401706.1962.10490022
    """
    mean, spread = deltas[0].float(), torch.zeros_like(deltas[0], dtype=torch.float32)
    for count, delta in enumerate(deltas[1:], start=2):
        step = delta - mean
        mean = mean + step / count
        spread = spread + step * (delta - mean)
    return spread / len(deltas)


def overlaps(base: Tensor, donors: Sequence[Tensor], *, epsilon: float | Tensor) -> Tensor:
    """How many elements each donor changed alone, and how many others changed, too.

    Args:
        base: Rows of fewer than 2**24 elements, (rows, width): float32 counts no further.
        donors: n of that shape.
        epsilon: Largest change that counts as none.

    Returns:
        For each row the n counts of the first kind, then those of the second, (2 n, rows) float32.
    """
    changed = [(donor.float() - base.float()).abs() > epsilon for donor in donors]
    owners = sum((mask.float() for mask in changed), torch.zeros_like(base, dtype=torch.float32))
    alone = [(mask & (owners == 1)).float().sum(-1) for mask in changed]
    shared = [(mask & (owners > 1)).float().sum(-1) for mask in changed]
    return torch.stack(alone + shared)


def salient(base: Tensor, donor: Tensor) -> Tensor:
    """Which elements of a donor matter most, as ``arcee_fusion`` sees it.

    An element matters as ``|donor - base|`` times the Kullback-Leibler divergence of its row's
    softmax from the base's. What reaches ``median + 1.5 (Q3 - Q1)`` of the tensor is salient, the
    quartiles being the elements of rank ``floor(q (numel - 1))``.

    Args:
        base: Any shape (*s); a row runs along the last dimension.
        donor: (*s).

    Returns:
        (*s), bool, on the CPU.
    """
    width = base.shape[-1] if base.dim() else 1
    start, end = (tensor.detach().cpu().reshape(-1, max(width, 1)) for tensor in (base, donor))
    importance = torch.empty(start.shape)

    def measure(first: int) -> None:
        part = slice(first, first + step)
        p, q = (tensor[part].float().softmax(-1) + 1e-8 for tensor in (end, start))
        divergence = (p * (p / q).log()).sum(-1, keepdim=True)
        change = (end[part].float() - start[part].float()).abs()
        torch.mul(change, divergence, out=importance[part])

    step = max(1, _PIECE // width) if width else 1
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(measure, range(0, len(start), step)))
    if not importance.numel():
        return torch.empty(base.shape, dtype=torch.bool)
    ordered = _ascending(importance.flatten())
    first, median, third = (ordered[quarter * (len(ordered) - 1) // 4] for quarter in (1, 2, 3))
    return (importance >= median + 1.5 * (third - first)).reshape(base.shape)


def all_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor Inf: one pass, and no temporary of the tensor's size."""
    if not tensor.numel() or not tensor.dtype.is_floating_point:
        return True
    low, high = tensor.detach().aminmax()  # a NaN is both
    return bool(low.isfinite() & high.isfinite())


def row_width(shape: Sequence[int]) -> int:
    """Elements of a row: the second dimension, or all of a tensor of one or none."""
    return shape[1] if len(shape) > 1 else math.prod(shape)


def row_ranks(delta: Tensor) -> Tensor:
    """Rank of every element's magnitude in its row, from 0, the smallest.

    Of equal magnitudes the first has the lower rank, on every machine.

    Args:
        delta: Any shape (*s); a row runs as ``row_width`` says.

    Returns:
        (*s), int32, contiguous.
    """
    width = row_width(delta.shape)
    across = delta.detach().transpose(1, -1) if delta.dim() > 1 else delta.detach()
    rows = across.reshape(-1, max(width, 1))
    ranks = torch.empty(rows.shape, dtype=torch.int32, device=delta.device)
    places = torch.arange(rows.shape[1], dtype=torch.int32, device=delta.device)
    for start in range(0, len(rows), step := max(1, _BLOCK // rows.shape[1])):
        order = _stable_order(rows[start : start + step].abs().float())
        ranks[start : start + step].scatter_(1, order, places.expand(order.shape))
    shaped = ranks.reshape(across.shape)
    return shaped.transpose(1, -1).contiguous() if delta.dim() > 1 else shaped


def _stable_order(rows: Tensor) -> Tensor:
    """``argsort`` of non-negative float32 rows, equals in their order; (r, width) int64."""
    if rows.device.type != "cpu":
        return rows.argsort(dim=1, stable=True)
    # Such numbers are ordered as their bits are, and a number and its place fit into one integer:
    # numpy's vectorised sort of those takes a third of the time of torch's argsort.
    keys = rows.contiguous().numpy().view(np.int32).astype(np.int64) << 32
    keys |= np.arange(rows.shape[1])
    keys.sort(axis=1)
    return torch.from_numpy(keys & 0xFFFFFFFF)
