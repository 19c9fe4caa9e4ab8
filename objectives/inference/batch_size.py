"""How large batches are: on an accelerator doubled from a modest size while they fit and help.

A size is a number of sequences: of ``HFLM``'s own batches, and of ours, which have so many tokens
for each of them. Equal requests in batches of equal size give equal values to the bit; another size
can decide near ties otherwise, as rounding does. So a size is tried before anything is evaluated,
with the study's longest items, and then only ever halved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch

# Keys and values of a text being written grow beyond what a trial has seen, and a candidate may
# write longer texts than the base.
HEADROOM: Final = 2.0


@dataclass(frozen=True)
class BatchSizes:
    """Sizes to try, in sequences; the first and the last are equal if there is nothing to try."""

    first: int
    last: int
    tokens: int  # of a batch, for each sequence

    @classmethod
    def of(cls, device: torch.device, given: int | None = None) -> BatchSizes:
        """Return the sizes for a device, or the one that is given."""
        sizes = ON_CPU if device.type == "cpu" else ON_ACCELERATOR
        return sizes if given is None else replace(sizes, first=given, last=given)


# 1,024 tokens are the measured optimum, so none is tried: larger batches do not fit into a CPU's
# caches (1,024 tokens took 8 % less time than 2,048, and those 30 % less than 8,192).
ON_CPU: Final = BatchSizes(first=32, last=32, tokens=32)
# From 16,384 to 131,072 tokens; beyond, kernels have long had enough to do.
ON_ACCELERATOR: Final = BatchSizes(first=64, last=512, tokens=256)


def find_batch_size(sizes: BatchSizes, tokens: int, fits: Callable[[int], bool]) -> int:
    """Double the first size while the next one fits, up to the last; halve it while it does not.

    Args:
        sizes: The first and the last to try.
        tokens: Tokens that are ever evaluated at once: a batch that holds them all is not doubled.
        fits: Whether batches of a size fit into memory.
    """
    size = sizes.first
    if size == sizes.last:
        return size
    if not fits(size):
        while size > 1 and not fits(size := size // 2):
            pass
        return size
    while 2 * size <= sizes.last and size * sizes.tokens < tokens and fits(2 * size):
        size *= 2
    return size


def fits_in(work: Callable[[], object], device: torch.device, memory: int) -> bool:
    """Do work, and return whether ``memory`` has ``HEADROOM`` times the bytes that it took.

    Bytes are counted on CUDA devices alone; elsewhere what can be allocated fits.
    """
    on_cuda = device.type == "cuda"
    before = 0
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    try:
        work()
    except torch.OutOfMemoryError:
        return False
    return not on_cuda or HEADROOM * (torch.cuda.max_memory_allocated(device) - before) <= memory
