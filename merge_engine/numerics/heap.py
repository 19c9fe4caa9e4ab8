"""The C library's heap, from which tensors on the CPU are allocated."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def trim_heap() -> None:
    """Return freed memory to the system, if the C library can.

    Until version 2.38, glibc seldom reuses a freed aligned block that is followed by a small block
    in use. So every large temporary that yields a small result leaves a hole of its size.
    """
    if trim := _malloc_trim():
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], object] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None
