"""Arithmetic whose rounding does not depend on what a compiler fuses."""

from __future__ import annotations

import torch
from torch import Tensor


def rounded_product(numbers: Tensor, factor: Tensor | float) -> Tensor:
    """Return a product that is rounded even if an addition follows.

    GPU compilers may fuse the two into one operation with a single rounding: then opposite products
    do not cancel out, and equal sums are not equal. They do not fuse across a selection.
    """
    return torch.where(numbers == 0, 0.0, numbers * factor)
