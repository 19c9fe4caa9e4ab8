"""Packs of which the processes of one host share one copy.

A pack lies in a file that is in memory alone, named after what the pack holds. Once it is filled,
the file is sealed: nobody can write to it any more. The others find it among the files that the
user's processes have open (Linux: /proc). So there is no registry that could be wrong, and the
system frees a pack with the last process that has it, whatever ends that process.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import glob
import hashlib
import mmap
import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from merge_engine.models.cache_folder import default_folder, one_at_a_time

FORMAT = 1  # raise it when packs are filled in another way
_PREFIX: Final = "/memfd:mergesearch-"  # of such a file's name in /proc
_REGISTER_READ_ONLY: Final = 8  # CUDA's cudaHostRegisterReadOnly


def share(
    contents: Sequence[object], size: int, fill: Callable[[Tensor], object], *, pinned: bool = False
) -> Tensor | None:
    """Return a pack's bytes, which one process of this host has written for all.

    Args:
        contents: All that the bytes depend on.
        size: Their number.
        fill: Writes them, if no process has yet; called again if that failed for want of memory.
        pinned: Page-lock them, so that a GPU can copy them; where it refuses, they are not.

    Returns:
        (size,) uint8, to which writing is a segmentation fault; None if nothing can be shared here.
    """
    text = "\n".join(map(str, (FORMAT, *contents)))
    name = _PREFIX + hashlib.blake2b(text.encode(), digest_size=20).hexdigest()
    with contextlib.suppress(OSError):
        if (file := _find(name)) is None:
            with one_at_a_time(default_folder() / "packs" / platform.node()):
                if (file := _find(name)) is None:  # another may have laid it meanwhile
                    file = _lay(name, size, fill)
        with os.fdopen(file):  # the mapping opens it once more
            mapping = _Mapping(file, size, prot=mmap.PROT_READ)
        return mapping.tensor(pinned=pinned)
    return None


@functools.cache
def can_share() -> bool:
    """Return whether processes of this host can share packs."""
    return sys.platform == "linux" and share(("a trial",), 1, lambda out: out.fill_(1)) is not None


class _Mapping(mmap.mmap):
    """A file in memory; the tensor made of it keeps it, and the file with it."""

    _registered: int | None = None  # address that is page-locked

    def tensor(self, *, pinned: bool) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nobody should write to it
            found = torch.frombuffer(self, dtype=torch.uint8)
        if pinned and _register(found):
            self._registered = found.data_ptr()
        return found

    def __del__(self) -> None:
        if self._registered:
            torch.cuda.synchronize()  # copies may be under way
            _cuda_runtime().cudaHostUnregister(self._registered)


def _register(found: Tensor) -> bool:
    """Page-lock a tensor for a GPU; return whether it could be done."""
    register = _cuda_runtime().cudaHostRegister
    if not int(register(found.data_ptr(), found.nbytes, _REGISTER_READ_ONLY)):
        return True
    with contextlib.suppress(RuntimeError):  # else the next kernel would raise what is pending
        torch.zeros(1, device="cuda")
    return False


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _find(name: str) -> int | None:
    """Open a sealed file that a process of this user has open under a name in /proc."""
    for link in glob.iglob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link).startswith(name):
                file = os.open(link, os.O_RDONLY | os.O_NONBLOCK)  # it may be another file by now
                if _is_sealed(file, name):
                    return file
                os.close(file)
    return None


def _is_sealed(file: int, name: str) -> bool:
    """Return whether an open file has this name, is the user's own, and is sealed."""
    try:
        seals = fcntl.fcntl(file, fcntl.F_GET_SEALS)
    except OSError:  # a file of a disk
        return False
    named = os.readlink(f"/proc/self/fd/{file}").startswith(name)
    return named and os.fstat(file).st_uid == os.geteuid() and bool(seals & fcntl.F_SEAL_WRITE)


def _lay(name: str, size: int, fill: Callable[[Tensor], object]) -> int:
    """Fill a new file and seal it; return it, opened for reading."""
    file = os.memfd_create(name.removeprefix("/memfd:"), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(file, 0, size)  # where memory is short, an error, not a signal later
        fill(torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8))
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
        return os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
    finally:
        os.close(file)
