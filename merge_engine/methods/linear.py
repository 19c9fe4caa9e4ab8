"""Linear methods: the merged tensor is a weighted sum, so a method is only its coefficients.

With an origin they are the coefficients of task vectors, ``out = base + sum_i c_i (donor_i -
base)``; without one those of the tensors, ``out = sum_i c_i x_i``. A method computes them in
float64 from its parameters and the Gram matrix of the task vectors or tensors.

Notation: n inputs; Gram matrix (*r, n, n) and coefficients (*r, n), where ``r`` is empty, or the
number of rows (or columns) of the tensor in the forms that treat each on its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from merge_engine.methods.contract import PerDonor

CANCELLED = 1e-8  # mergekit does not divide by a smaller sum of weights
LERP_COSINE = 0.9995  # above it slerp interpolates along a straight line, as in mergekit
COLINEAR = 2.0**-24  # the same for nuslerp, in sin^2: a float32 cosine is rounded to one
ROUNDING = 1e-7  # the direction of a shorter sum of unit vectors is that of rounding errors


def linear(_gram: None, *, weight: Sequence[float], normalize: bool) -> Tensor:
    """Average the tensors: ``c_i = w_i / sum_j w_j``, or ``c_i = w_i`` if not ``normalize``.

    Raises:
        ValueError: The weights sum to zero, so the average is undefined.

    Source: Wortsman et al. 2022, https://arxiv.org/abs/2203.05482
    """
    total = math.fsum(weight) if normalize else 1.0
    if abs(total) < CANCELLED:
        raise ValueError(f"weights {list(weight)} sum to {total:.1e}; make one larger")
    return torch.tensor(weight, dtype=torch.float64) / total


def slerp(gram: Tensor, *, t: float) -> Tensor:
    """Interpolate along the arc from the first tensor (t = 0) to the second (t = 1).

    With ``cos W = G_01 / sqrt(G_00 G_11)``: ``(sin((1-t)W), sin(tW)) / sin W``; the straight line
    ``(1-t, t)`` where the two are nearly parallel. One that is zero counts as orthogonal; outside
    [0, 1] t extrapolates.

    Source: Shoemake 1985, https://doi.org/10.1145/325165.325242
    """
    norms = _norms(gram)
    cosine = _cosine(gram, torch.where(norms > 1e-8, norms, 1.0))
    return _on_arc(t, cosine, cosine.abs() > LERP_COSINE)


def _cosine(gram: Tensor, norms: Tensor) -> Tensor:
    return (gram[..., 0, 1] / norms.prod(-1)).clamp(-1, 1).unsqueeze(-1)  # (*r, 1)


def _on_arc(t: float, cosine: Tensor, straight: Tensor) -> Tensor:
    """Return the coefficients at ``t`` on the arc, or where ``straight`` on the line between."""
    share = torch.tensor([1 - t, t], dtype=torch.float64)
    angle = torch.where(straight, 0.0, cosine).acos()
    return torch.where(straight, share, (share * angle).sin() / angle.sin())


def task_arithmetic(
    _gram: None, *, weight: Sequence[float], normalize: bool, lambda_: float
) -> Tensor:
    """Add task vectors: ``c_i = lambda w_i``, over ``sum_j w_j`` if ``normalize``.

    Source: Ilharco et al. 2022, https://arxiv.org/abs/2212.04089
    """
    total = math.fsum(weight) if normalize else 1.0
    divisor = total if abs(total) >= CANCELLED else 1.0
    return torch.tensor(weight, dtype=torch.float64) * (lambda_ / divisor)


def passthrough(_gram: None, *, scale: Sequence[float]) -> Tensor:
    """Take one model as it is, or times a number: ``c = scale``.

    Source: Goddard et al. 2024, https://arxiv.org/abs/2403.13257
    """
    return torch.tensor(scale, dtype=torch.float64)


def nuslerp(gram: Tensor, *, weight: Sequence[float]) -> Tensor:
    """Apply ``slerp`` at ``t = w_1 / (w_0 + w_1)``, between task vectors if there is a base.

    Weights that cancel out give ``t = 1/2``. The straight line ``(1-t, t)`` only where a float32
    cosine would be one.

    Source: Goddard et al. 2024, https://arxiv.org/abs/2403.13257
    """
    total = math.fsum(weight)
    t = weight[1] / total if abs(total) >= 1e-6 else 0.5
    cosine = _cosine(gram, _norms(gram).clamp_min(1e-7))
    return _on_arc(t, cosine, 1 - cosine.square() <= COLINEAR)


def nuslerp_dim(*, nuslerp_flatten: bool, nuslerp_row_wise: bool) -> int | None:
    """Return the dimension of ``nuslerp``'s arcs: along stored columns if ``nuslerp_row_wise``.

    The parameters have mergekit's names, which refer to the transposed weight matrix.
    """
    if nuslerp_flatten:
        return None
    return 0 if nuslerp_row_wise else -1


def multislerp(
    gram: Tensor, *, weight: Sequence[float], normalize_weights: bool, eps: float
) -> Tensor:
    """Interpolate on the sphere to the weighted mean of directions, ``m = sum_i w_i x_i / |x_i|``.

    The result has m's direction and the length ``sum_i w_i |x_i|``: with ``a_i = w_i / (|x_i| +
    eps)`` it is ``c_i = a_i sum_j w_j |x_j| / sqrt(a' G a)``. mergekit's further step in the
    tangent space is zero by construction: m's direction is the point that the plane touches.

    The weights are first made to sum to one if ``normalize_weights``. Where m is shorter than
    ``eps``, two tensors are interpolated linearly. The coefficient of a single tensor is 1; where
    all tensors are zero they are 0.

    Raises:
        ValueError: The weights sum to zero, or the directions of more than two tensors cancel out.

    Source: Goddard 2024, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea
    """
    n = gram.shape[-1]
    norms = _norms(gram)  # (*r, n)
    if n == 1:
        return torch.ones_like(norms)
    shares = linear(None, weight=weight, normalize=normalize_weights)
    scaled = torch.where(norms > 0, shares / (norms + eps), 0.0)
    length = (scaled.unsqueeze(-2) @ gram @ scaled.unsqueeze(-1)).clamp_min(0).sqrt().squeeze(-1)
    nowhere = length < max(eps, ROUNDING * float(shares.abs().sum()))  # (*r, 1)
    untouched = ~norms.any(-1, keepdim=True)
    if n > 2 and bool((nowhere & ~untouched).any()):
        raise ValueError(f"the directions under weights {list(weight)} cancel out; change a weight")
    arc = scaled * ((norms @ shares).unsqueeze(-1) / torch.where(nowhere, 1.0, length))
    return torch.where(untouched, 0.0, torch.where(nowhere, shares, arc))


def karcher(gram: Tensor, *, max_iter: int, tol: float) -> Tensor:
    """Take the Karcher mean on the sphere: the direction of least squared angles to the tensors.

    Starting from the mean of unit vectors u_i, step to the mean of their logarithms: with
    ``cos A_i = u_i . m``, ``T = mean_i A_i / sin A_i (u_i - cos A_i m)`` and
    ``m <- cos|T| m + sin|T| T / |T|``. The length is the mean of the tensors' lengths. All vectors
    are combinations of the u_i and are kept as their coefficients.

    There are at most ``max_iter`` steps, none shorter than ``tol`` (radians). Tensors shorter than
    ``tol`` or opposite to m, whose logarithm is undefined, do not contribute to the direction.

    Source: Karcher 1977, https://doi.org/10.1002/cpa.3160300502; merging models by it:
        https://arxiv.org/abs/2603.04972
    """
    norms = _norms(gram)  # (*r, n)
    if gram.shape[-1] == 1:
        return torch.ones_like(norms)
    known = norms > tol
    units = torch.where(known, norms, 1.0)
    cosines = gram / (units.unsqueeze(-1) * units.unsqueeze(-2))
    direction = _karcher_direction(cosines, known, max_iter, tol)
    return norms.mean(-1, keepdim=True) * direction / units


def _karcher_direction(cosines: Tensor, known: Tensor, max_iter: int, tol: float) -> Tensor:
    """Return the coefficients (*r, n) of the mean of the unit vectors that are ``known`` (*r, n).

    ``cosines`` are the inner products of all of them, (*r, n, n).
    """

    def times(vector: Tensor) -> Tensor:
        return (cosines @ vector.unsqueeze(-1)).squeeze(-1)  # (*r, n)

    def length(vector: Tensor) -> Tensor:
        return (vector * times(vector)).sum(-1, keepdim=True).clamp_min(0).sqrt()  # (*r, 1)

    count = known.sum(-1, keepdim=True).clamp_min(1)
    mean = known.double() / count
    size = length(mean)
    first = (known.cumsum(-1) == 1) & known  # where they cancel out, start from the first
    mean = torch.where(size < tol, first.double(), mean / torch.where(size < tol, 1.0, size))
    moving = known.any(-1, keepdim=True)
    for _ in range(max_iter):
        dots = times(mean).clamp(-1, 1)
        angles = dots.acos()
        pulls = (angles >= tol) & (angles <= math.pi - tol) & known
        pull = torch.where(pulls, angles / torch.where(pulls, angles.sin(), 1.0), 0.0) / count
        step = pull - (pull * dots).sum(-1, keepdim=True) * mean
        size = length(step)
        moving = moving & (size >= tol)
        if not moving.any():
            break
        further = size.cos() * mean + (size.sin() / torch.where(moving, size, 1.0)) * step
        further = further / length(further).clamp_min(tol)
        mean = torch.where(moving, further, mean)
    return mean


def model_stock(gram: Tensor) -> Tensor:
    """Move from the base towards the donors' mean as far as their task vectors agree.

    With ``c`` the mean cosine over the pairs of the n task vectors, ``t = n c / (1 + (n-1) c)``
    and ``c_i = t / n`` (eq. 4; for n > 2 the mean of pairs, which the authors confirmed). A product
    of norms under 1e-6 counts as 1e-6, as in mergekit, so that nearly untouched tensors stay at the
    base.

    Source: Jang et al. 2024, https://arxiv.org/abs/2403.19522
    """
    n = gram.shape[-1]
    norms = _norms(gram)  # (*r, n)
    products = (norms.unsqueeze(-1) * norms.unsqueeze(-2)).clamp_min(1e-6)  # (*r, n, n)
    first, second = torch.triu_indices(n, n, offset=1)
    cosine = (gram / products).clamp(-1, 1)[..., first, second].mean(-1)  # (*r)
    divisor = 1 + (n - 1) * cosine
    defined = divisor.abs() >= 1e-6
    t = torch.where(defined, n * cosine / torch.where(defined, divisor, 1.0), 0.0)
    return (t / n).unsqueeze(-1).expand(*t.shape, n)


def model_stock_dim(*, filter_wise: bool) -> int | None:
    """Return the dimension of ``model_stock``'s angles: along each row if ``filter_wise``."""
    return -1 if filter_wise else None


def _norms(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()  # (*r, n)


def weighted_sum(_base: None, tensors: Sequence[Tensor], *, factor: PerDonor) -> Tensor:
    """Return ``sum_i c_i x_i``, (*s) float32, of n tensors (*s) and n factors that broadcast."""
    total = tensors[0].float() * factor[0]
    for tensor, c in zip(tensors[1:], factor[1:], strict=True):
        total = total + tensor.float() * c
    return total


def sum_of_task_vectors(base: Tensor, donors: Sequence[Tensor], *, factor: PerDonor) -> Tensor:
    """Return ``base + sum_i c_i (donor_i - base)``; the base is added last, to round it once."""
    start = base.float()
    total = torch.zeros_like(start)
    for donor, c in zip(donors, factor, strict=True):
        total = total + (donor.float() - start) * c
    return start + total
