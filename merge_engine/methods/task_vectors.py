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

from merge_engine.statistics import rank_share

Number = (
    float | Tensor
)  # a tensor () is no constant to a compiler, so other values need no new code
Numbers = Sequence[float] | Tensor  # n of them
_NEXT = 1 + 2.0**-23  # times a float32: a larger one, by a step or two


def ties(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    weight: Numbers,
    low: Numbers,
    low_share: Numbers,
    high: Numbers | None = None,
    high_share: Numbers | None = None,
    stretch: Numbers,
    normalize: bool,
    lambda_: Number,
    noise: Sequence[Tensor] | None = None,
) -> Tensor:
    """Trim each task vector to a band of magnitudes, elect a sign, merge what agrees with it.

    Args:
        base: The base model's tensor, (*s).
        donors: n tensors, (*s).
        weight: n factors of the task vectors; they weigh the election too.
        low: n magnitudes; what is below is dropped.
        low_share: n chances to keep an element exactly at ``low``.
        high: n magnitudes; what is not below is dropped. None: nothing is too large.
        high_share: n chances to keep an element exactly at ``high``.
        stretch: n factors of what is kept.
        normalize: Divide by the weights that agree, element by element (the paper's mean).
        lambda_: Factor of the merged task vector.
        noise: n tensors of uniform numbers in [0, 1), (*s), which choose among equals; None: all
            those at ``low`` are kept and none of those at ``high``.

    Source: Yadav et al. 2023, https://arxiv.org/abs/2306.01708
    """
    trimmed = _above(task_vectors(base, donors), low, low_share, noise)
    if high is not None and high_share is not None:
        trimmed = _below(trimmed, high, high_share, noise)
    return base.float() + lambda_ * _consensus(trimmed, weight, stretch, normalize)


def breadcrumbs(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    weight: Numbers,
    low: Numbers,
    low_share: Numbers,
    high: Numbers | None = None,
    high_share: Numbers | None = None,
    stretch: Numbers,
    lambda_: Number,
    noise: Sequence[Tensor] | None = None,
) -> Tensor:
    """Trim each task vector to a band of magnitudes and add them up; the arguments of ``ties``.

    Source: Davari and Belilovsky 2023, https://arxiv.org/abs/2312.06795
    """
    trimmed = _above(task_vectors(base, donors), low, low_share, noise)
    if high is not None and high_share is not None:
        trimmed = _below(trimmed, high, high_share, noise)
    return base.float() + lambda_ * _weighted(trimmed, weight, stretch)


def dare_linear(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    weight: Numbers,
    chance: Numbers,
    stretch: Numbers,
    lambda_: Number,
    noise: Sequence[Tensor],
) -> Tensor:
    """Drop elements of each task vector at random, stretch the rest, add them up.

    Args:
        base: The base model's tensor, (*s).
        donors: n tensors, (*s).
        weight: n factors of the task vectors.
        chance: n chances for an element to be kept.
        stretch: n factors of what is kept.
        lambda_: Factor of the merged task vector.
        noise: n tensors of uniform numbers in [0, 1), (*s); an element is kept if below its chance.

    Source: Yu et al. 2023, https://arxiv.org/abs/2311.03099
    """
    thinned = _thinned(base, donors, chance, noise)
    return base.float() + lambda_ * _weighted(thinned, weight, stretch)


def dare_ties(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    weight: Numbers,
    chance: Numbers,
    stretch: Numbers,
    normalize: bool,
    lambda_: Number,
    noise: Sequence[Tensor],
) -> Tensor:
    """``dare_linear`` with the sign election of ``ties``; the same arguments."""
    thinned = _thinned(base, donors, chance, noise)
    return base.float() + lambda_ * _consensus(thinned, weight, stretch, normalize)


def della_linear(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    weight: Numbers,
    ranks: Sequence[Tensor],
    chance: Numbers,
    spread: Numbers,
    last: Number,
    stretch: Numbers,
    lambda_: Number,
    noise: Sequence[Tensor],
) -> Tensor:
    """``dare_linear`` with better chances for the larger elements of every row.

    An element of rank r among the n of its row (0 is the smallest) is kept with the chance
    ``density - epsilon + 2 epsilon r / (n - 1)``; an element alone in its row with ``density``. It
    is exact: the ranks are all there, sorted once per donor.

    Args:
        base: The base model's tensor, (*s); of one dimension it is one row, of more a row runs
            along the second.
        donors: n tensors, (*s).
        weight: n factors of the task vectors.
        ranks: n tensors, (*s), as ``row_ranks`` has them.
        chance: n chances for the smallest element of a row, ``density - epsilon``.
        spread: n numbers, how much better the chance of the largest is, ``2 epsilon``.
        last: The largest element's rank, at least 1.
        stretch: n factors of what is kept.
        lambda_: Factor of the merged task vector.
        noise: n tensors of uniform numbers in [0, 1), (*s); an element is kept if below its chance.

    Source: Deep et al. 2024, https://arxiv.org/abs/2406.11617
    """
    thinned = _thinned(base, donors, _by_rank(ranks, chance, spread, last), noise)
    return base.float() + lambda_ * _weighted(thinned, weight, stretch)


def della(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    weight: Numbers,
    ranks: Sequence[Tensor],
    chance: Numbers,
    spread: Numbers,
    last: Number,
    stretch: Numbers,
    normalize: bool,
    lambda_: Number,
    noise: Sequence[Tensor],
) -> Tensor:
    """``della_linear`` with the sign election of ``ties``; the same arguments."""
    thinned = _thinned(base, donors, _by_rank(ranks, chance, spread, last), noise)
    return base.float() + lambda_ * _consensus(thinned, weight, stretch, normalize)


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


def _by_rank(
    ranks: Sequence[Tensor], chance: Numbers, spread: Numbers, last: Number
) -> list[Tensor]:
    settings = zip(ranks, chance, spread, strict=True)
    return [least + rank_share(ranked, last) * more for ranked, least, more in settings]


def _weighted(deltas: Sequence[Tensor], weight: Numbers, stretch: Numbers) -> Tensor:
    mixed = torch.zeros_like(deltas[0])
    for delta, w, factor in zip(deltas, weight, stretch, strict=True):
        mixed = mixed + delta * (w * factor)
    return mixed


def _consensus(
    deltas: Sequence[Tensor], weight: Numbers, stretch: Numbers, normalize: bool
) -> Tensor:
    """Sum the weighted task vectors that have the elected sign, element by element.

    The sign with the larger weighted mass is elected, plus on a tie. ``normalize`` divides by the
    weights that agree; where they cancel out, or nobody agrees, the sum stays as it is.
    """
    zero = torch.zeros_like(deltas[0])
    up, down, up_weight, down_weight = (
        zero,
        zero,
        zero,
        zero,
    )  # the mass of each sign, and its owners
    for delta, w, factor in zip(deltas, weight, stretch, strict=True):
        scaled = delta * (w * factor)
        up, down = up + scaled.clamp_min(0), down + scaled.clamp_max(0)
        if normalize:
            up_weight = up_weight + torch.where(scaled > 0, w, 0.0)
            down_weight = down_weight + torch.where(scaled < 0, w, 0.0)
    plus = up + down >= 0
    mixed, divisor = torch.where(plus, up, down), torch.where(plus, up_weight, down_weight)
    return mixed / torch.where(divisor == 0, 1.0, divisor) if normalize else mixed


def elected_sign(total: Tensor) -> Tensor:
    """The sign of the larger mass, given the sum of both: 1 or -1, plus on a tie."""
    return torch.where(total >= 0, 1.0, -1.0)
