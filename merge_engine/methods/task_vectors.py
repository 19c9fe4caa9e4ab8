"""Kernels that sparsify each donor's task vector and add what is left of them.

Kernels compute in float32, return float32 and do not change their inputs. Which magnitudes are kept
and what restores a norm is computed before (``preparation``), so a kernel can be run over any part
of a flattened tensor.

Notation: n donors; tensors of any shape ``s``; ``Numbers`` are n numbers, one per donor. Chances
and noise are in LEVELS: a chance of LEVELS is certainty.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merge_engine.methods.contract import Number, Numbers

_NEXT = 1 + 2.0**-23  # times a float32: the next larger one, or the one after it


def ties(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    factor: Numbers,
    low: Numbers,
    low_share: Numbers,
    high: Numbers | None = None,
    high_share: Numbers | None = None,
    weight: Numbers | None = None,
    lambda_: Number,
    noise: Sequence[Tensor] | None = None,
) -> Tensor:
    """Trim each task vector to a band of magnitudes, elect a sign, add what has that sign.

    Args:
        base: The base model's tensor, (*s).
        donors: n tensors, (*s).
        factor: Factors of the kept elements, before the election.
        low: Magnitudes below which elements are dropped.
        low_share: Chances to keep an element exactly at ``low``.
        high: Magnitudes from which on elements are dropped. None: no upper bound.
        high_share: Chances to keep an element exactly at ``high``.
        weight: Weights; each element is divided by the sum of those whose donors have the elected
            sign (the paper's mean). None: no division.
        lambda_: Factor of the merged task vector.
        noise: n tensors of uniform numbers in [0, LEVELS), (*s), which choose among elements at a
            bound; None: those at ``low`` are kept and those at ``high`` dropped.

    Source: Yadav et al. 2023, https://arxiv.org/abs/2306.01708
    """
    trimmed = _above(task_vectors(base, donors), low, low_share, noise)
    if high is not None and high_share is not None:
        trimmed = _below(trimmed, high, high_share, noise)
    return base.float() + lambda_ * _consensus(trimmed, factor, weight)


def breadcrumbs(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    factor: Numbers,
    low: Numbers,
    low_share: Numbers,
    high: Numbers | None = None,
    high_share: Numbers | None = None,
    noise: Sequence[Tensor] | None = None,
) -> Tensor:
    """Trim each task vector to a band of magnitudes and add them; arguments as in ``ties``.

    Source: Davari and Belilovsky 2023, https://arxiv.org/abs/2312.06795
    """
    trimmed = _above(task_vectors(base, donors), low, low_share, noise)
    if high is not None and high_share is not None:
        trimmed = _below(trimmed, high, high_share, noise)
    return base.float() + _weighted(trimmed, factor)


def dare_linear(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    factor: Numbers,
    chance: Numbers,
    noise: Sequence[Tensor],
) -> Tensor:
    """Drop elements of each task vector at random, rescale the rest, add the task vectors.

    Args:
        base: The base model's tensor, (*s).
        donors: n tensors, (*s).
        factor: Factors of the kept elements.
        chance: Chances of an element to be kept.
        noise: n tensors of uniform numbers in [0, LEVELS), (*s); an element is kept if its number
            is below its chance.

    Source: Yu et al. 2023, https://arxiv.org/abs/2311.03099
    """
    thinned = _thinned(base, donors, chance, noise)
    return base.float() + _weighted(thinned, factor)


def dare_ties(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    factor: Numbers,
    chance: Numbers,
    weight: Numbers | None = None,
    lambda_: Number,
    noise: Sequence[Tensor],
) -> Tensor:
    """Apply ``dare_linear`` with the sign election of ``ties``, and its arguments."""
    thinned = _thinned(base, donors, chance, noise)
    return base.float() + lambda_ * _consensus(thinned, factor, weight)


def della_linear(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    factor: Numbers,
    rank_share: Sequence[Tensor],
    chance: Numbers,
    spread: Numbers,
    noise: Sequence[Tensor],
) -> Tensor:
    """Apply ``dare_linear`` with higher chances for the larger elements of each row.

    An element of rank r among the m of its row (0 is the smallest) is kept with the chance
    ``density - epsilon + 2 epsilon r / (m - 1)``; an element alone in its row with ``density``.
    ``r / (m - 1)`` has 11 bits, so a chance is off by ``2 epsilon 2**-12`` at the most.

    Args:
        base: The base model's tensor, (*s): one row, or rows along the second dimension.
        donors: n tensors, (*s).
        factor: Factors of the kept elements.
        rank_share: n tensors, (*s) float16: ``r / (m - 1)`` of each element.
        chance: Chances of the smallest element of a row, ``density - epsilon``.
        spread: By how much the chance of the largest element is higher, ``2 epsilon``.
        noise: n tensors of uniform numbers in [0, LEVELS), (*s); an element is kept if its number
            is below its chance.

    Source: Deep et al. 2024, https://arxiv.org/abs/2406.11617
    """
    thinned = _thinned(base, donors, _by_rank(rank_share, chance, spread), noise)
    return base.float() + _weighted(thinned, factor)


def della(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    factor: Numbers,
    rank_share: Sequence[Tensor],
    chance: Numbers,
    spread: Numbers,
    weight: Numbers | None = None,
    lambda_: Number,
    noise: Sequence[Tensor],
) -> Tensor:
    """Apply ``della_linear`` with the sign election of ``ties``, and its arguments."""
    thinned = _thinned(base, donors, _by_rank(rank_share, chance, spread), noise)
    return base.float() + lambda_ * _consensus(thinned, factor, weight)


def task_vectors(base: Tensor, donors: Sequence[Tensor]) -> list[Tensor]:
    """Return ``donor - base`` for each donor, float32."""
    return [donor.float() - base.float() for donor in donors]


def _above(
    deltas: Sequence[Tensor], low: Numbers, share: Numbers, noise: Sequence[Tensor] | None
) -> list[Tensor]:
    """Zero elements of magnitude below each bound; at the bound, keep them with a chance."""
    kept = []
    for index, (delta, bound, chance) in enumerate(zip(deltas, low, share, strict=True)):
        least = bound if noise is None else torch.where(noise[index] < chance, bound, bound * _NEXT)
        kept.append(torch.where(delta.abs() >= least, delta, 0.0))
    return kept


def _below(
    deltas: Sequence[Tensor], high: Numbers, share: Numbers, noise: Sequence[Tensor] | None
) -> list[Tensor]:
    """Zero elements of magnitude from each bound on; at the bound, keep them with a chance."""
    kept = []
    for index, (delta, bound, chance) in enumerate(zip(deltas, high, share, strict=True)):
        end = bound if noise is None else torch.where(noise[index] < chance, bound * _NEXT, bound)
        kept.append(torch.where(delta.abs() < end, delta, 0.0))
    return kept


def _thinned(
    base: Tensor,
    donors: Sequence[Tensor],
    chance: Numbers | Sequence[Tensor],
    noise: Sequence[Tensor],
) -> list[Tensor]:
    settings = zip(task_vectors(base, donors), chance, noise, strict=True)
    return [torch.where(drawn < p, delta, 0.0) for delta, p, drawn in settings]


def _by_rank(rank_share: Sequence[Tensor], chance: Numbers, spread: Numbers) -> list[Tensor]:
    """Return the chance of every element."""
    settings = zip(rank_share, chance, spread, strict=True)
    return [least + share.float() * more for share, least, more in settings]


def kept_masses(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    rank_share: Sequence[Tensor],
    chance: Numbers,
    spread: Numbers,
    noise: Sequence[Tensor],
) -> Tensor:
    """Return the L1 norms of n task vectors, and of what ``della`` keeps of them, row by row.

    Args:
        base: Rows of the base model's tensors, (rows, width).
        donors: n tensors, (rows, width).
        rank_share: As in ``della_linear``.
        chance: As in ``della_linear``.
        spread: As in ``della_linear``.
        noise: As in ``della_linear``.

    Returns:
        (2 n, rows) float32: the n norms, then the n norms of what is kept.
    """
    sizes = [delta.abs() for delta in task_vectors(base, donors)]
    settings = zip(sizes, _by_rank(rank_share, chance, spread), noise, strict=True)
    kept = [torch.where(drawn < p, size, 0.0) for size, p, drawn in settings]
    return torch.stack([part.sum(-1) for part in (*sizes, *kept)])


def _weighted(deltas: Sequence[Tensor], factor: Numbers) -> Tensor:
    mixed = torch.zeros_like(deltas[0])
    for delta, c in zip(deltas, factor, strict=True):
        mixed = mixed + delta * c
    return mixed


def _consensus(deltas: Sequence[Tensor], factor: Numbers, weight: Numbers | None) -> Tensor:
    """Sum the task vectors that have the elected sign, element by element.

    Elected is the sign with the larger mass, plus on a tie: that of the sum. So the elected mass is
    ``(|sum_i d_i| + sum_i |d_i|) / 2``, exactly where all signs agree. With weights it is divided
    by the sum of those whose donors have the elected sign, unless that sum is zero.
    """
    scaled = [delta * c for delta, c in zip(deltas, factor, strict=True)]
    total = sizes = torch.zeros_like(scaled[0])
    for vector in scaled:
        total, sizes = total + vector, sizes + vector.abs()
    mass, sign = (total.abs() + sizes) * 0.5, elected_sign(total)
    if weight is None:
        return mass * sign
    divisor = torch.zeros_like(mass)
    for vector, w in zip(scaled, weight, strict=True):
        divisor = divisor + torch.where(vector * sign > 0, w, 0.0)
    return mass * sign / torch.where(divisor == 0, 1.0, divisor)


def elected_sign(total: Tensor) -> Tensor:
    """Return the sign of a sum (*s), 1 or -1; 1 where it is zero."""
    return torch.where(total >= 0, 1.0, -1.0)
