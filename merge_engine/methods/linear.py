"""The linear family: the merged tensor is a weighted sum, so a method is only its coefficients.

With an ORIGIN base the coefficients belong to the donors' task vectors,
``out = base + sum_i c_i (donor_i - base)``; otherwise to the tensors themselves,
``out = sum_i c_i x_i``. A kernel sees the tensors' Gram matrix at the most, never the tensors, and
works in float64. Leading dimensions ``r`` of the Gram matrix (one per row of the tensor, in the
filter-wise forms) are those of the coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LERP_COSINE = 0.9995  # slerp's own switch: above it the arc is a straight line


def linear(_gram: None, *, weight: Sequence[float], normalize: bool) -> Tensor:
    """Average: ``c_i = w_i / sum_j w_j``, or ``c_i = w_i`` if not ``normalize``.

    Raises:
        ValueError: The weights sum to zero, so the average is undefined.

    Source: Wortsman et al. 2022, https://arxiv.org/abs/2203.05482
    """
    total = math.fsum(weight) if normalize else 1.0
    if abs(total) < 1e-8:
        raise ValueError(f"weights {list(weight)} sum to {total:.1e}; make one larger")
    return torch.tensor(weight, dtype=torch.float64) / total


def slerp(gram: Tensor, *, t: float) -> Tensor:
    """Walk the arc from the first tensor (t = 0) to the second (t = 1).

    With ``cos W = G_01 / sqrt(G_00 G_11)``: ``(sin((1-t)W), sin(tW)) / sin W``; the straight line
    ``(1-t, t)`` where the two are nearly parallel, and where one of them is zero.

    Args:
        gram: Inner products of the two tensors, (2, 2).
        t: Where to stop; unitless, outside [0, 1] it extrapolates.

    Source: Shoemake 1985, https://doi.org/10.1145/325165.325242
    """
    share = torch.tensor([1 - t, t], dtype=torch.float64)
    norms = gram.diagonal().clamp_min(0).sqrt()
    norms = torch.where(norms > 1e-8, norms, 1.0)
    cosine = (gram[0, 1] / norms.prod()).clamp(-1, 1)
    if cosine.abs() > LERP_COSINE:
        return share
    angle = cosine.acos()
    return (share * angle).sin() / angle.sin()


def task_arithmetic(
    _gram: None, *, weight: Sequence[float], normalize: bool, lambda_: float
) -> Tensor:
    """Add task vectors: ``c_i = lambda w_i``, over ``sum_j w_j`` if ``normalize``.

    Source: Ilharco et al. 2022, https://arxiv.org/abs/2212.04089
    """
    total = math.fsum(weight) if normalize else 1.0
    divisor = total if abs(total) >= 1e-8 else 1.0
    return torch.tensor(weight, dtype=torch.float64) * (lambda_ / divisor)


def model_stock(gram: Tensor) -> Tensor:
    """Move from the base towards the donors' mean as far as their task vectors agree.

    With ``c`` the mean cosine over the pairs of the n task vectors, ``t = n c / (1 + (n-1) c)``
    and ``c_i = t / n`` (eq. 4; for n > 2 the mean of pairs, which the authors confirmed).

    Args:
        gram: Inner products of the task vectors, (*r, n, n). A product of norms under 1e-6 counts
            as 1e-6, as in mergekit, so that nearly untouched tensors stay at the base.

    Returns:
        Coefficients, (*r, n).

    Source: Jang et al. 2024, https://arxiv.org/abs/2403.19522
    """
    n = gram.shape[-1]
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()  # (*r, n)
    products = (norms.unsqueeze(-1) * norms.unsqueeze(-2)).clamp_min(1e-6)  # (*r, n, n)
    first, second = torch.triu_indices(n, n, offset=1)
    cosine = (gram / products).clamp(-1, 1)[..., first, second].mean(-1)  # (*r)
    divisor = 1 + (n - 1) * cosine
    defined = divisor.abs() >= 1e-6
    t = torch.where(defined, n * cosine / torch.where(defined, divisor, 1.0), 0.0)
    return (t / n).unsqueeze(-1).expand(*t.shape, n)
