"""A key's random numbers for a whole tensor, to be compared with those drawn in chunks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from merge_engine.numerics.noise import uniform_at


def uniform(key: int, shape: Sequence[int]) -> Tensor:
    """Draw numbers in [0, 1) on a grid of 1 / LEVELS: shape ``shape``, float32."""
    return uniform_at(key, 0, torch.Size(shape).numel()).reshape(tuple(shape))
