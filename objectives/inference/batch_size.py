"""Choose the batch size: on an accelerator it is doubled while batches fit into memory and help.

A size is the number of sequences of ``HFLM``'s batches; ours have ``BatchSizes.tokens`` tokens for
each. The same requests in batches of the same size give bit-identical values, while another size
may round near ties differently. The size is therefore found before anything is evaluated, with the
study's longest items, and can only be halved later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch

# The cache of a generated text grows beyond what was tried, and a candidate may generate longer
# texts than the base.
HEADROOM: Final = 2.0


@dataclass(frozen=True)
class BatchSizes:
    """Range of sizes to try, in sequences; a single size if ``first`` equals ``last``."""

    first: int
    last: int
    tokens: int  # tokens of a batch per sequence

    @classmethod
    def of(cls, device: torch.device, given: int | None = None) -> BatchSizes:
        """Return the range for a device, or the given size alone."""
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
        sizes: The range to try.
        tokens: Most tokens that are evaluated at once; a batch of that many is not doubled.
        fits: Returns whether batches of a size fit into memory.
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
    """Run work, and return whether ``memory`` is at least ``HEADROOM`` times the bytes it took.

    Bytes are counted on CUDA devices only; elsewhere work fits if it can be allocated.
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
