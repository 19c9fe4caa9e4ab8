"""Kernels that sparsify each donor's task vector and add the results.

Kernels compute in float32, return float32 and do not change their inputs. Bounds on magnitudes and
factors that restore norms are computed beforehand (``preparation``), so a kernel can be run over
any part of a flattened tensor.

Notation: base (*s) and n donors (*s), of any shape ``s``; ``Numbers`` are n numbers, one per donor;
noise is n tensors (*s) of uniform integers in [0, LEVELS); probabilities are in units of
1 / LEVELS.

The sparse task vectors d_i are added as a plain sum, ``base + sum_i factor_i d_i``, or with
``lambda_`` as an elected sum, ``base + lambda_ m``. At each element, m is the sum of those
``factor_i d_i`` that have the sign of larger total mass there; with weights it is divided by the
sum of their ``weight_i`` (the mean of the TIES paper).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merge_engine.methods.contract import Number, Numbers
from merge_engine.numerics.rounding import rounded_product

_NEXT = 1 + 2.0**-23  # times a float32: the next larger one, or the one after it


def trimmed_sum(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    factor: Numbers,
    low: Numbers,
    low_share: Numbers,
    high: Numbers | None = None,
    high_share: Numbers | None = None,
    weight: Numbers | None = None,
    lambda_: Number | None = None,
    noise: Sequence[Tensor] | None = None,
) -> Tensor:
    """Trim each task vector to a band of magnitudes, and add them.

    Args:
        base: The base model's tensor.
        donors: The donors' tensors.
        factor: Factors of the kept elements.
        low: Magnitudes below which elements are dropped.
        low_share: Probabilities of keeping an element exactly at ``low``.
        high: Magnitudes from which on elements are dropped. None: no upper bound.
        high_share: Probabilities of keeping an element exactly at ``high``.
        weight: Weights of the elected sum.
        lambda_: Factor of the elected sum; None: a plain sum.
        noise: Chooses among elements at a bound; None: those at ``low`` are kept and those at
            ``high`` dropped.

    Source: Yadav et al. 2023, https://arxiv.org/abs/2306.01708 (``ties``); Davari and Belilovsky
        2023, https://arxiv.org/abs/2312.06795 (``breadcrumbs``)
    """
    left = trimmed(
        base, donors, low=low, low_share=low_share, high=high, high_share=high_share, noise=noise
    )
    return _added(base, left, factor, weight, lambda_)


def trimmed(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    low: Numbers,
    low_share: Numbers,
    high: Numbers | None = None,
    high_share: Numbers | None = None,
    noise: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return what ``trimmed_sum`` keeps of each task vector."""
    left = []
    for index, delta in enumerate(task_vectors(base, donors)):
        least, size = low[index], delta.abs()
        if noise is not None:
            least = torch.where(noise[index] < low_share[index], least, least * _NEXT)
        kept = size >= least
        if high is not None and high_share is not None:
            end = high[index]
            if noise is not None:
                end = torch.where(noise[index] < high_share[index], end * _NEXT, end)
            kept = kept & (size < end)
        left.append(torch.where(kept, delta, 0.0))
    return left


def dare(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    factor: Numbers,
    chance: Numbers,
    weight: Numbers | None = None,
    lambda_: Number | None = None,
    noise: Sequence[Tensor],
) -> Tensor:
    """Drop elements of each task vector at random, rescale the rest, add the task vectors.

    Args:
        base: The base model's tensor.
        donors: The donors' tensors.
        factor: Factors of the kept elements.
        chance: Probabilities of keeping an element.
        weight: Weights of the elected sum.
        lambda_: Factor of the elected sum; None: a plain sum.
        noise: An element is kept if its number is below its probability.

    Source: Yu et al. 2023, https://arxiv.org/abs/2311.03099
    """
    left = thinned(base, donors, chance=chance, noise=noise)
    return _added(base, left, factor, weight, lambda_)


def della(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    factor: Numbers,
    rank_share: Sequence[Tensor],
    chance: Numbers,
    spread: Numbers,
    weight: Numbers | None = None,
    lambda_: Number | None = None,
    noise: Sequence[Tensor],
) -> Tensor:
    """Drop elements as ``dare`` does, with higher chances for the larger elements of each row.

    An element of rank r among the m of its row (0 is the smallest) is kept with the chance
    ``density - epsilon + 2 epsilon r / (m - 1)``; an element alone in its row with ``density``.
    ``r / (m - 1)`` has 8 bits, so a chance is off by ``2 epsilon / 510`` at the most. Chances are
    whole numbers, so any device keeps the same elements.

    Args:
        base: The base model's tensor: one row, or rows along the second dimension.
        donors: The donors' tensors.
        factor: Factors of the kept elements.
        rank_share: n tensors, (*s) uint8: ``255 r / (m - 1)`` of each element.
        chance: Chances of the smallest element of a row, ``density - epsilon``; int32.
        spread: By how much the chance of the largest element is higher, ``2 epsilon``, times
            256 / 255; int32.
        weight: Weights of the elected sum.
        lambda_: Factor of the elected sum; None: a plain sum.
        noise: An element is kept if its number is below its chance.

    Source: Deep et al. 2024, https://arxiv.org/abs/2406.11617
    """
    left = thinned_by_rank(
        base, donors, rank_share=rank_share, chance=chance, spread=spread, noise=noise
    )
    return _added(base, left, factor, weight, lambda_)


def task_vectors(base: Tensor, donors: Sequence[Tensor]) -> list[Tensor]:
    """Return ``donor - base`` for each donor, float32."""
    return [donor.float() - base.float() for donor in donors]


def thinned(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    chance: Sequence[Number] | Tensor,
    noise: Sequence[Tensor],
) -> list[Tensor]:
    """Return what ``dare`` keeps of each task vector."""
    settings = zip(task_vectors(base, donors), chance, noise, strict=True)
    return [torch.where(drawn < p, delta, 0.0) for delta, p, drawn in settings]


def thinned_by_rank(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    rank_share: Sequence[Tensor],
    chance: Numbers,
    spread: Numbers,
    noise: Sequence[Tensor],
) -> list[Tensor]:
    """Return what ``della`` keeps of each task vector."""
    settings = zip(rank_share, chance, spread, strict=True)
    chances = [least + ((share.int() * more) >> 8) for share, least, more in settings]
    return thinned(base, donors, chance=chances, noise=noise)


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

    Arguments are those of ``della``, with base and donors as rows, (rows, width).

    Returns:
        (2 n, rows) float32: the n norms, then the n norms of what is kept.
    """
    kept = thinned_by_rank(
        base, donors, rank_share=rank_share, chance=chance, spread=spread, noise=noise
    )
    return torch.stack([part.abs().sum(-1) for part in (*task_vectors(base, donors), *kept)])


def _added(
    base: Tensor,
    deltas: Sequence[Tensor],
    factor: Numbers,
    weight: Numbers | None,
    lambda_: Number | None,
) -> Tensor:
    """Return the base with the plain sum of task vectors, or given ``lambda_`` the elected sum.

    The sign with the larger mass (plus on a tie) is that of the sum, so the mass of that sign is
    ``(|sum_i d_i| + sum_i |d_i|) / 2``, exactly where all signs agree. With weights it is divided
    by the sum of those whose donors have that sign, unless that sum is zero.
    """
    scaled = [rounded_product(delta, c) for delta, c in zip(deltas, factor, strict=True)]
    zero = torch.zeros_like(scaled[0])
    total = sum(scaled, zero)
    if lambda_ is None:
        return base.float() + total
    mass, sign = (total.abs() + sum(map(torch.abs, scaled), zero)) * 0.5, elected_sign(total)
    if weight is None:
        return base.float() + lambda_ * (mass * sign)
    divisor = zero
    for vector, w in zip(scaled, weight, strict=True):
        divisor = divisor + torch.where(vector * sign > 0, w, 0.0)
    return base.float() + lambda_ * (mass * sign / torch.where(divisor == 0, 1.0, divisor))


def elected_sign(total: Tensor) -> Tensor:
    """Return the sign of a sum (*s), 1 or -1; 1 where it is zero."""
    return torch.where(total >= 0, 1.0, -1.0)
