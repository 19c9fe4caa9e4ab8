"""Recognise out-of-memory errors of any library, without importing one."""

from __future__ import annotations

import errno
import re

_WORDS = (
    "out of memory",  # CUDA, as torch.OutOfMemoryError and as torch.AcceleratorError
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN
    "annot allocate memory",  # the system's, and torch's on a CPU
    "can't allocate memory",
    "bad_alloc",
    "failed to map segment",
    "error return without exception set",  # of C code that had no memory for an exception
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory has run out, on any device."""
    name = type(error).__name__  # torch need not be imported
    known = isinstance(error, MemoryError) or name == "OutOfMemoryError"
    if known or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError | ImportError | OSError | SystemError) and any(
        words in str(error) for words in _WORDS
    )


def shortage(error: BaseException) -> str:
    """Describe an out-of-memory error: how much was wanted, if its message says so."""
    wanted = re.search(r"tried to allocate (\d[\d.]* \w+)", str(error), re.IGNORECASE)
    return "out of memory" + (f": {wanted[1]} more were wanted" if wanted else "")
