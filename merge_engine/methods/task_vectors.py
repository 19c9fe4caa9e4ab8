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
    deltas = _deltas(base, donors)
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


def _deltas(base: Tensor, donors: Sequence[Tensor]) -> list[Tensor]:
    return [donor.float() - base.float() for donor in donors]


def _thinned(
    base: Tensor,
    donors: Sequence[Tensor],
    density: Sequence[float],
    rescale: bool,
    noise: Sequence[Tensor],
) -> list[Tensor]:
    deltas = _deltas(base, donors)
    return [
        _masked(delta, None if chance >= 1 else drawn < chance, rescale)
        for delta, chance, drawn in zip(deltas, density, noise, strict=True)
    ]


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
    elected = torch.where(_weighted(deltas, weight, normalize=False) >= 0, 1.0, -1.0)  # (*s)
    mixed, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, w in zip(deltas, weight, strict=True):
        scaled = delta * w
        agrees = scaled.sign() == elected
        mixed += scaled * agrees
        divisor += w * agrees
    return mixed / torch.where(divisor == 0, 1.0, divisor) if normalize else mixed
