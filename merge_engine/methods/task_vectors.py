"""The elementwise family: task vectors are made sparse one by one, then put together.

Every kernel computes in float32, returns float32 and leaves its inputs as they are. Shapes: a
tensor of any shape ``s``, n donors; a per-donor parameter is a sequence of n numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ties(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool,
    rescale: bool,
    lambda_: float,
) -> Tensor:
    """Trim each task vector to its largest elements, elect a sign, merge what agrees with it.

    Args:
        base: The base model's tensor, (*s).
        donors: n tensors, (*s).
        weight: n factors of the task vectors; they weigh the election too.
        density: n shares of elements to keep, by magnitude, at least one element.
        normalize: Divide by the weights that agree, element by element (the paper's mean).
        rescale: Give each trimmed task vector its L1 norm back.
        lambda_: Factor of the merged task vector.

    Source: Yadav et al. 2023, https://arxiv.org/abs/2306.01708
    """
    deltas = task_vectors(base, donors)
    trimmed = [_masked(d, _largest(d, p), rescale) for d, p in zip(deltas, density, strict=True)]
    return base.float() + lambda_ * _consensus(trimmed, weight, normalize)


def dare_linear(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool,
    rescale: bool,
    lambda_: float,
    noise: Sequence[Tensor],
) -> Tensor:
    """Drop elements of each task vector at random, rescale the rest, add them up.

    Args:
        base: The base model's tensor, (*s).
        donors: n tensors, (*s).
        weight: n factors of the task vectors.
        density: n chances for an element to be kept.
        normalize: Divide by the sum of the weights.
        rescale: Give each thinned task vector its L1 norm back.
        lambda_: Factor of the merged task vector.
        noise: n tensors of uniform numbers in [0, 1), (*s); an element is kept if below density.

    Source: Yu et al. 2023, https://arxiv.org/abs/2311.03099
    """
    thinned = _thinned(base, donors, density, rescale, noise)
    return base.float() + lambda_ * _weighted(thinned, weight, normalize)


def dare_ties(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool,
    rescale: bool,
    lambda_: float,
    noise: Sequence[Tensor],
) -> Tensor:
    """``dare_linear`` with the sign election of ``ties``; the same arguments."""
    thinned = _thinned(base, donors, density, rescale, noise)
    return base.float() + lambda_ * _consensus(thinned, weight, normalize)


def della_linear(
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
        normalize: Divide by the sum of the weights.
        rescale: Give each thinned task vector its L1 norm back.
        lambda_: Factor of the merged task vector.
        noise: n tensors of uniform numbers in [0, 1), (*s); an element is kept if below its chance.

    Raises:
        ValueError: A chance would leave (0, 1).

    Source: Deep et al. 2024, https://arxiv.org/abs/2406.11617
    """
    pruned = _pruned(base, donors, density, epsilon, rescale, noise)
    return base.float() + lambda_ * _weighted(pruned, weight, normalize)


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
    return base.float() + lambda_ * _consensus(pruned, weight, normalize)


def breadcrumbs(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    normalize: bool,
    rescale: bool,
    lambda_: float,
) -> Tensor:
    """Drop the largest elements of each task vector and the smallest, add the others up.

    Args:
        base: The base model's tensor, (*s).
        donors: n tensors, (*s).
        weight: n factors of the task vectors.
        density: n shares of elements to keep; all are kept from 1 on, whatever gamma is.
        gamma: n shares of elements to drop as too large, as far as ``density`` leaves room.
        normalize: Divide by the sum of the weights.
        rescale: Give each thinned task vector its L1 norm back.
        lambda_: Factor of the merged task vector.

    Source: Davari and Belilovsky 2023, https://arxiv.org/abs/2312.06795
    """
    middles = _middles(base, donors, density, gamma, rescale)
    return base.float() + lambda_ * _weighted(middles, weight, normalize)


def breadcrumbs_ties(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    normalize: bool,
    rescale: bool,
    lambda_: float,
) -> Tensor:
    """``breadcrumbs`` with the sign election of ``ties``; the same arguments."""
    middles = _middles(base, donors, density, gamma, rescale)
    return base.float() + lambda_ * _consensus(middles, weight, normalize)


def task_vectors(base: Tensor, donors: Sequence[Tensor]) -> list[Tensor]:
    """``donor - base`` for each donor, float32."""
    return [donor.float() - base.float() for donor in donors]


def _thinned(
    base: Tensor,
    donors: Sequence[Tensor],
    density: Sequence[float],
    rescale: bool,
    noise: Sequence[Tensor],
) -> list[Tensor]:
    deltas = task_vectors(base, donors)
    return [
        _masked(delta, None if chance >= 1 else drawn < chance, rescale)
        for delta, chance, drawn in zip(deltas, density, noise, strict=True)
    ]


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


def _middles(
    base: Tensor,
    donors: Sequence[Tensor],
    density: Sequence[float],
    gamma: Sequence[float],
    rescale: bool,
) -> list[Tensor]:
    settings = zip(task_vectors(base, donors), density, gamma, strict=True)
    return [_masked(d, _middle(d, share, outliers), rescale) for d, share, outliers in settings]


def _middle(delta: Tensor, density: float, gamma: float) -> Tensor | None:
    """Mask of ``int(density * numel)`` elements, those below the gamma largest; None: all."""
    if density >= 1:
        return None
    size = delta.numel()
    kept = int(density * size)
    first = max(0, size - kept - int(gamma * size))
    mask = torch.zeros(size, dtype=torch.bool, device=delta.device)
    mask[delta.abs().flatten().argsort(stable=True)[first : first + kept]] = True
    return mask.reshape(delta.shape)


def _largest(delta: Tensor, density: float) -> Tensor | None:
    """Mask of the ``max(1, int(density * numel))`` elements of largest magnitude; None: all."""
    if density >= 1 or delta.numel() == 0:
        return None
    kept = max(1, int(density * delta.numel())) if density > 0 else 0
    mask = torch.zeros(delta.numel(), dtype=torch.bool, device=delta.device)
    mask[torch.topk(delta.abs().flatten(), kept, sorted=False).indices] = True
    return mask.reshape(delta.shape)


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


def _weighted(deltas: Sequence[Tensor], weight: Sequence[float], normalize: bool) -> Tensor:
    mixed = torch.zeros_like(deltas[0])
    for delta, w in zip(deltas, weight, strict=True):
        mixed += (
            delta * w
        )  # not fused: task vectors that cancel have to give zero, not its rounding
    total = sum(weight)
    return mixed / total if normalize and abs(total) >= 1e-8 else mixed


def _consensus(deltas: Sequence[Tensor], weight: Sequence[float], normalize: bool) -> Tensor:
    """Sum the weighted task vectors that have the elected sign, element by element.

    The sign with the larger weighted mass is elected, plus on a tie. ``normalize`` divides by the
    weights that agree; where they cancel out, or nobody agrees, the sum stays as it is.
    """
    elected = elected_sign(_weighted(deltas, weight, normalize=False))  # (*s)
    mixed, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, w in zip(deltas, weight, strict=True):
        scaled = delta * w
        agrees = scaled.sign() == elected
        mixed += scaled * agrees
        divisor += w * agrees
    return mixed / torch.where(divisor == 0, 1.0, divisor) if normalize else mixed


def elected_sign(total: Tensor) -> Tensor:
    """The sign of the larger mass, given the sum of both: 1 or -1, plus on a tie."""
    return torch.where(total >= 0, 1.0, -1.0)
