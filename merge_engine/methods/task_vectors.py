"""The elementwise family: task vectors are made sparse one by one, then put together.

Every kernel computes in float32, returns float32 and leaves its inputs as they are. Shapes: a
tensor of any shape ``s``, n donors; a per-donor parameter is a sequence of n numbers. Which
magnitudes are kept, and what restores a norm, is worked out before (``preparation``): every kernel
can then be run over any stretch of a tensor on its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Number = (
    float | Tensor
)  # a tensor () is no constant to a compiler, so other values need no new code
Numbers = Sequence[float] | Tensor  # n of them
_NEXT = 1 + 2.0**-23  # times a float32: a larger one, by a step or two


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
    """Trim each task vector to a band of magnitudes, elect a sign, merge what agrees with it.

    Args:
        base: The base model's tensor, (*s).
        donors: n tensors, (*s).
        factor: n factors of what is kept; they weigh the election too.
        low: n magnitudes; what is below is dropped.
        low_share: n chances to keep an element exactly at ``low``, in LEVELS.
        high: n magnitudes; what is not below is dropped. None: nothing is too large.
        high_share: n chances to keep an element exactly at ``high``, in LEVELS.
        weight: n weights: the result is divided by those that agree, element by element (the
            paper's mean). None: it is not.
        lambda_: Factor of the merged task vector.
        noise: n tensors of uniform numbers in [0, LEVELS), (*s), which choose among equals; None:
            all those at ``low`` are kept and none of those at ``high``.

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
    """Trim each task vector to a band of magnitudes and add them up; the arguments of ``ties``.

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
    """Drop elements of each task vector at random, stretch the rest, add them up.

    Args:
        base: The base model's tensor, (*s).
        donors: n tensors, (*s).
        factor: n factors of what is kept.
        chance: n chances for an element to be kept, in LEVELS.
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
    """``dare_linear`` with the sign election of ``ties``, and its arguments."""
    thinned = _thinned(base, donors, chance, noise)
    return base.float() + lambda_ * _consensus(thinned, factor, weight)


def della_linear(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    factor: Numbers,
    shares: Sequence[Tensor],
    chance: Numbers,
    spread: Numbers,
    noise: Sequence[Tensor],
) -> Tensor:
    """``dare_linear`` with better chances for the larger elements of every row.

    An element of rank r among the n of its row (0 is the smallest) is kept with the chance
    ``density - epsilon + 2 epsilon r / (n - 1)``; an element alone in its row with ``density``. The
    ranks are all there, sorted once per donor; their shares have 11 bits, so that a chance is off
    by ``2 epsilon 2**-12`` at the most.

    Args:
        base: The base model's tensor, (*s); of one dimension it is one row, of more a row runs
            along the second.
        donors: n tensors, (*s).
        factor: n factors of what is kept.
        shares: n tensors, (*s) float16: ``r / (n - 1)`` of each element.
        chance: n chances for the smallest element of a row, ``density - epsilon``, in LEVELS.
        spread: n numbers, how much better the chance of the largest is, ``2 epsilon``, in LEVELS.
        noise: n tensors of uniform numbers in [0, LEVELS), (*s); an element is kept if its number
            is below its chance.

    Source: Deep et al. 2024, https://arxiv.org/abs/2406.11617
    """
    thinned = _thinned(base, donors, _by_rank(shares, chance, spread), noise)
    return base.float() + _weighted(thinned, factor)


def della(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    factor: Numbers,
    shares: Sequence[Tensor],
    chance: Numbers,
    spread: Numbers,
    weight: Numbers | None = None,
    lambda_: Number,
    noise: Sequence[Tensor],
) -> Tensor:
    """``della_linear`` with the sign election of ``ties``, and its arguments."""
    thinned = _thinned(base, donors, _by_rank(shares, chance, spread), noise)
    return base.float() + lambda_ * _consensus(thinned, factor, weight)


def task_vectors(base: Tensor, donors: Sequence[Tensor]) -> list[Tensor]:
    """``donor - base`` for each donor, float32."""
    return [donor.float() - base.float() for donor in donors]


def _above(
    deltas: Sequence[Tensor], low: Numbers, share: Numbers, noise: Sequence[Tensor] | None
) -> list[Tensor]:
    """Zero what is smaller than each bound; what is at the bound stays with a chance."""
    kept = []
    for place, (delta, bound, chance) in enumerate(zip(deltas, low, share, strict=True)):
        least = bound if noise is None else torch.where(noise[place] < chance, bound, bound * _NEXT)
        kept.append(torch.where(delta.abs() >= least, delta, 0.0))
    return kept


def _below(
    deltas: Sequence[Tensor], high: Numbers, share: Numbers, noise: Sequence[Tensor] | None
) -> list[Tensor]:
    """Zero what is not smaller than each bound; what is at the bound stays with a chance."""
    kept = []
    for place, (delta, bound, chance) in enumerate(zip(deltas, high, share, strict=True)):
        end = bound if noise is None else torch.where(noise[place] < chance, bound * _NEXT, bound)
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


def _by_rank(shares: Sequence[Tensor], chance: Numbers, spread: Numbers) -> list[Tensor]:
    settings = zip(shares, chance, spread, strict=True)
    return [least + share.float() * more for share, least, more in settings]


def kept_masses(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    shares: Sequence[Tensor],
    chance: Numbers,
    spread: Numbers,
    noise: Sequence[Tensor],
) -> Tensor:
    """L1 norms of n task vectors, and of what ``della`` keeps of them, row by row.

    Args:
        base: The base model's tensors, (rows, width).
        donors: n of that shape.
        shares: As of ``della``, and so are the others.
        chance: Of the smallest elements.
        spread: How much better the largest one's chance is.
        noise: Which element is kept.

    Returns:
        (2 n, rows) float32.
    """
    sizes = [delta.abs() for delta in task_vectors(base, donors)]
    settings = zip(sizes, _by_rank(shares, chance, spread), noise, strict=True)
    kept = [torch.where(drawn < p, size, 0.0) for size, p, drawn in settings]
    return torch.stack([part.sum(-1) for part in (*sizes, *kept)])


def _weighted(deltas: Sequence[Tensor], factor: Numbers) -> Tensor:
    mixed = torch.zeros_like(deltas[0])
    for delta, c in zip(deltas, factor, strict=True):
        mixed = mixed + delta * c
    return mixed


def _consensus(deltas: Sequence[Tensor], factor: Numbers, weight: Numbers | None) -> Tensor:
    """Sum the task vectors that have the elected sign, element by element.

    The sign with the larger mass is elected, plus on a tie: it is that of the sum. So the elected
    mass is half of the sum's size and the sum of the sizes, exactly so where all agree. If there
    are weights, it is divided by those that agree; where they cancel out, or nobody agrees, it
    stays as it is.
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
    """The sign of the larger mass, given the sum of both: 1 or -1, plus on a tie."""
    return torch.where(total >= 0, 1.0, -1.0)
