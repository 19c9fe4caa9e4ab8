"""Kernels that sparsify each donor's task vector and add the results.

Kernels compute in float32, return float32 and do not change their inputs. Bounds on magnitudes and
factors that restore norms are computed beforehand (``preparation``), so a kernel can be run over
any part of a flattened tensor.

Notation: base (*s) and n donors (*s), of any shape ``s``; ``PerDonor`` are n numbers; noise is n
tensors (*s) of uniform integers in [0, LEVELS); probabilities are in units of 1 / LEVELS.

The sparse task vectors d_i are added as a plain sum, ``base + sum_i factor_i d_i``, or with
``lambda_`` as an elected sum, ``base + lambda_ m``. At each element, m is the sum of those
``factor_i d_i`` that have the sign of larger total mass there; with weights it is divided by the
sum of their ``weight_i`` (the mean of the TIES paper).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from merge_engine.methods.contract import Number, PerDonor, Sparsify
from merge_engine.numerics.rounding import rounded_product

_NEXT = 1 + 2.0**-23  # times a float32: the next larger one, or the one after it


@functools.cache
def sparse_sum(sparsify: Sparsify) -> Callable[..., Tensor]:
    """Return the kernel that adds what ``sparsify`` keeps of each task vector to the base.

    Besides the values of ``sparsify`` it takes ``factor`` (n factors of the kept elements),
    ``lambda_`` (factor of the elected sum; None: a plain sum) and ``weight`` (n weights of the
    elected sum; None: it is not normalised), and returns the merged tensor, (*s) float32.
    """

    def kernel(
        base: Tensor,
        donors: Sequence[Tensor],
        *,
        factor: PerDonor,
        weight: PerDonor | None = None,
        lambda_: Number | None = None,
        **values: Any,
    ) -> Tensor:
        return _add_to_base(base, sparsify(base, donors, **values), factor, weight, lambda_)

    kernel.__name__ = sparsify.__name__
    return kernel


@functools.cache
def l1_norms(sparsify: Sparsify) -> Callable[..., Tensor]:
    """Return a kernel of L1 norms, row by row: of n task vectors, and of what is kept of them.

    It takes rows (rows, width) of base and donors and the values of ``sparsify``, and returns
    (2 n, rows) float32: the n norms before, then the n after.
    """

    def norms(base: Tensor, donors: Sequence[Tensor], **values: Any) -> Tensor:
        vectors = (*task_vectors(base, donors), *sparsify(base, donors, **values))
        return torch.stack([vector.abs().sum(-1) for vector in vectors])

    return norms


def task_vectors(base: Tensor, donors: Sequence[Tensor]) -> list[Tensor]:
    """Return ``donor - base`` for each donor, float32."""
    return [donor.float() - base.float() for donor in donors]


def trim(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    low: PerDonor,
    low_share: PerDonor,
    high: PerDonor | None = None,
    high_share: PerDonor | None = None,
    noise: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Keep a band of magnitudes of each task vector.

    Args:
        base: The base model's tensor.
        donors: The donors' tensors.
        low: Magnitudes below which elements are dropped.
        low_share: Probabilities of keeping an element exactly at ``low``.
        high: Magnitudes from which on elements are dropped. None: no upper bound.
        high_share: Probabilities of keeping an element exactly at ``high``.
        noise: Chooses among elements at a bound; None: those at ``low`` are kept and those at
            ``high`` dropped.

    Source: Yadav et al. 2023, https://arxiv.org/abs/2306.01708 (``ties``); Davari and Belilovsky
        2023, https://arxiv.org/abs/2312.06795 (``breadcrumbs``)
    """
    sparse = []
    for index, delta in enumerate(task_vectors(base, donors)):
        lower, magnitude = low[index], delta.abs()
        if noise is not None:
            lower = torch.where(noise[index] < low_share[index], lower, lower * _NEXT)
        kept = magnitude >= lower
        if high is not None and high_share is not None:
            upper = high[index]
            if noise is not None:
                upper = torch.where(noise[index] < high_share[index], upper * _NEXT, upper)
            kept = kept & (magnitude < upper)
        sparse.append(torch.where(kept, delta, 0.0))
    return sparse


def drop_at_random(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    keep_probability: PerDonor,
    noise: Sequence[Tensor],
) -> list[Tensor]:
    """Drop elements of each task vector at random, as DARE does.

    Args:
        base: The base model's tensor.
        donors: The donors' tensors.
        keep_probability: Probabilities of keeping an element.
        noise: An element is kept if its number is below its probability.

    Source: Yu et al. 2023, https://arxiv.org/abs/2311.03099
    """
    deltas = zip(task_vectors(base, donors), keep_probability, noise, strict=True)
    return [torch.where(drawn < p, delta, 0.0) for delta, p, drawn in deltas]


def drop_by_rank(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    rank_share: Sequence[Tensor],
    min_keep_probability: PerDonor,
    keep_probability_range: PerDonor,
    noise: Sequence[Tensor],
) -> list[Tensor]:
    """Drop elements at random, but keep the larger ones of each row more often, as DELLA does.

    An element of rank r among the m of its row (0 is the smallest) is kept with the probability
    ``density - epsilon + 2 epsilon r / (m - 1)``; an element alone in its row with ``density``.
    ``r / (m - 1)`` has 8 bits, so a probability is off by ``2 epsilon / 510`` at the most.
    Probabilities are whole numbers, so any device keeps the same elements.

    Args:
        base: The base model's tensor: one row, or rows along the second dimension.
        donors: The donors' tensors.
        rank_share: n tensors, (*s) uint8: ``255 r / (m - 1)`` of each element.
        min_keep_probability: That of a row's smallest element, ``density - epsilon``; int32.
        keep_probability_range: By how much that of the largest element is higher, ``2 epsilon``,
            times 256 / 255; int32.
        noise: An element is kept if its number is below its probability.

    Source: Deep et al. 2024, https://arxiv.org/abs/2406.11617
    """
    bounds = zip(rank_share, min_keep_probability, keep_probability_range, strict=True)
    probability = [least + ((share.int() * more) >> 8) for share, least, more in bounds]
    return drop_at_random(base, donors, keep_probability=probability, noise=noise)


def _add_to_base(
    base: Tensor,
    deltas: Sequence[Tensor],
    factor: PerDonor,
    weight: PerDonor | None,
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
