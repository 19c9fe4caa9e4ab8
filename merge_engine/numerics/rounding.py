"""Arithmetic that rounds as it is written, whatever a compiler may fuse."""

from __future__ import annotations

import torch
from torch import Tensor


def rounded_product(numbers: Tensor, factor: Tensor | float) -> Tensor:
    """Return a product that is rounded even where a sum follows.

    Compilers for a GPU may fuse both into one operation with one rounding, after which opposite
    products do not cancel out and equal sums are not equal. They do not fuse across a selection.
    """
    return torch.where(numbers == 0, 0.0, numbers * factor)
