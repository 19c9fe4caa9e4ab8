"""The elementwise family: task vectors are made sparse one by one, then put together.

Every kernel computes in float32, returns float32 and leaves its inputs as they are. Shapes: a
tensor of any shape ``s``, n donors; a per-donor parameter is a sequence of n numbers. Which
magnitudes are kept, and what restores a norm, is worked out before (``preparation``): all but della
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
    density: Sequence[float],
    epsilon: Sequence[float],
    rescale: bool,
    lambda_: Number,
    noise: Sequence[Tensor],
) -> Tensor:
    """``dare_linear`` with better chances for the larger elements of every row.

    An element of rank r among the n of its row (1 is the smallest) is kept with the chance
    ``density - epsilon + 2 epsilon (r - 1) / (n - 1)``; an element alone in its row with
    ``density``.

    Args:
        base: The base model's tensor, (*s); of one dimension it is one row, of more a row runs
            along the second.
        donors: n tensors, (*s).
        weight: n factors of the task vectors.
        density: n mean chances for an element to be kept; all are kept from 1 on, none at 0.
        epsilon: n half widths of the range of chances.
        rescale: Give each thinned task vector its L1 norm back.
        lambda_: Factor of the merged task vector.
        noise: n tensors of uniform numbers in [0, 1), (*s); an element is kept if below its chance.

    Raises:
        ValueError: A chance would leave (0, 1).

    Source: Deep et al. 2024, https://arxiv.org/abs/2406.11617
    """
    pruned = _pruned(base, donors, density, epsilon, rescale, noise)
    return base.float() + lambda_ * _weighted(pruned, weight, [1.0] * len(donors))


def della(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    normalize: bool,
    rescale: bool,
    lambda_: float,
    noise: Sequence[Tensor],
) -> Tensor:
    """``della_linear`` with the sign election of ``ties``; the same arguments."""
    pruned = _pruned(base, donors, density, epsilon, rescale, noise)
    return base.float() + lambda_ * _consensus(pruned, weight, [1.0] * len(donors), normalize)


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
    chance: Numbers,
    noise: Sequence[Tensor],
) -> list[Tensor]:
    settings = zip(task_vectors(base, donors), chance, noise, strict=True)
    return [torch.where(drawn < p, delta, 0.0) for delta, p, drawn in settings]


def _pruned(
    base: Tensor,
    donors: Sequence[Tensor],
    density: Sequence[float],
    epsilon: Sequence[float],
    rescale: bool,
    noise: Sequence[Tensor],
) -> list[Tensor]:
    settings = zip(task_vectors(base, donors), density, epsilon, noise, strict=True)
    masks = [(d, _drawn_by_rank(d, share, half, drawn)) for d, share, half, drawn in settings]
    return [_masked(delta, mask, rescale) for delta, mask in masks]


def _drawn_by_rank(delta: Tensor, density: float, epsilon: float, drawn: Tensor) -> Tensor | None:
    """Mask of the elements that ``della_linear`` keeps; None: all."""
    if density >= 1:
        return None
    if density <= 0:
        return torch.zeros_like(delta, dtype=torch.bool)
    if density - epsilon <= 0 or density + epsilon >= 1:
        raise ValueError(
            f"density {density:g} +- epsilon {epsilon:g} leaves (0, 1); make epsilon smaller"
        )
    rows = delta.abs() if delta.dim() > 1 else delta.abs().reshape(1, -1)
    n = rows.shape[1]
    if n == 1:
        return drawn < density
    ranks = rows.argsort(dim=1, stable=True).argsort(dim=1)  # 0 is the smallest
    chances = (density - epsilon) + (ranks.float() / (n - 1)) * 2 * epsilon
    return drawn < chances.reshape(delta.shape)


def _masked(delta: Tensor, mask: Tensor | None, rescale: bool) -> Tensor:
    """Zero what the mask leaves out; ``rescale`` restores the L1 norm, unless it is below 1e-7."""
    if mask is None:
        return delta
    masked = delta * mask
    if not rescale:
        return masked
    before, after = delta.abs().sum(), masked.abs().sum()
    defined = (before >= 1e-7) & (after >= 1e-7)
    return masked * torch.where(defined, before / after.clamp_min(1e-7), 1.0)


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
