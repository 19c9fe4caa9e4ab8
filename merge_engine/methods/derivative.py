"""Derivatives of a loss with respect to the weights of differentiable methods.

The merged tensor is ``theta = base + sum_i c_i v_i`` (or ``sum_i c_i x_i`` without an origin),
where ``v_i`` is a task vector under a mask that does not depend on the weights. So ``dL/dc_i =
<dL/dtheta, v_i>``. The coefficients are ``c_i = lambda u_i w_i``, divided by ``sum_j w_j`` if
``normalize``; u_i restores the norm of a masked task vector, and is 1 without a mask.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from merge_engine.methods.linear import CANCELLED
from merge_engine.methods.task_vectors import task_vectors


def linear_summands(base: Tensor | None, donors: Sequence[Tensor]) -> list[Tensor]:
    """Return the task vectors, or without a base the tensors themselves, float32."""
    return [donor.float() for donor in donors] if base is None else task_vectors(base, donors)


@functools.cache
def products_kernel(summands: Callable[..., list[Tensor]]) -> Callable[..., Tensor]:
    """Return a kernel of the inner products ``<dL/dtheta, v_i>``, row by row.

    It takes rows (rows, width) of base and donors, the values of ``summands``, which returns the
    v_i, and ``gradient`` of the same shape; it returns (n, rows) float32.
    """

    def products(
        base: Tensor | None, donors: Sequence[Tensor], *, gradient: Tensor, **values: Any
    ) -> Tensor:
        vectors = summands(base, donors, **values)
        return torch.stack([(vector * gradient.float()).sum(-1) for vector in vectors])

    return products


def weight_gradient(
    products: Tensor, *, weight: Sequence[float], normalize: bool = False, lambda_: float = 1.0
) -> Tensor:
    """Return the derivatives with respect to the weights, (n,).

    With ``s = sum_j w_j`` they are ``lambda p_i``, or if ``normalize`` ``lambda / s (p_i - sum_j
    w_j p_j / s)``: a common factor of the weights changes nothing. The sum is not divided by if
    the weights cancel out, as in the merge.

    Args:
        products: ``p_i = u_i <dL/dtheta, v_i>``, (n,) float64.
        weight: The n weights.
        normalize: Whether the coefficients are divided by the weights' sum.
        lambda_: Factor of all coefficients.
    """
    total = math.fsum(weight)
    if not normalize or abs(total) < CANCELLED:
        return lambda_ * products
    weights = torch.tensor(weight, dtype=products.dtype)
    return lambda_ / total * (products - weights @ products / total)
