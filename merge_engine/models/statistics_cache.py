"""Statistics of donors, cached on disk from one run to the next.

A file holds one statistic of one tensor of some models. Its name is a digest of the models'
fingerprints, so files never change and are never stale; the folder may be removed at any time. A
checksum of contents and name detects damaged or swapped files. The cache never raises: a missing or
damaged file is computed again, and a failed write is ignored.

The least recently used files are removed beyond a size limit. The size is measured when a
``StatisticsCache`` first stores a file, and again whenever it has stored a 64th of the limit, so
the limit may be exceeded by that much. Several processes may share the folder: a mapped file stays
readable after its removal. If several need the same missing file, one computes it and the others
wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from xxhash import xxh3_128

from merge_engine.errors import MergeError
from merge_engine.models.cache_folder import default_folder, one_at_a_time
from merge_engine.models.free_memory import parse_size

FORMAT = 5  # raise it when a statistic is computed or stored in another way
MOST = 20 << 30  # bytes
SHARE = 10  # the default limit is at most a tenth of the space that the folder could take
CHECKS = 64  # the folder is measured each time this part of the limit has been stored
_CACHED = re.compile(r"[0-9a-f]{40}\.safetensors(\.\w+\.partial)?")


def user_limit() -> int | None:
    """Return ``$MERGESEARCH_CACHE_LIMIT`` in bytes, None if unset; MergeError if invalid."""
    if not (text := os.environ.get("MERGESEARCH_CACHE_LIMIT")):
        return None
    try:
        return parse_size(text)
    except ValueError as error:
        raise MergeError(f"$MERGESEARCH_CACHE_LIMIT: {error}") from None


class StatisticsCache:
    """The folder of cached statistics."""

    def __init__(self) -> None:
        self.folder = default_folder()
        self._until_trim = 0  # bytes that may be stored before the folder is measured again

    def file_of(self, kind: str, tensors: Sequence[tuple[str, str]]) -> Path:
        """Return the file of one statistic, ``kind`` naming all but the weights it depends on.

        ``tensors`` are, for each model in order, its fingerprint and its own name of the tensor.
        """
        parts = [str(FORMAT), kind, *(part for tensor in tensors for part in tensor)]
        digest = hashlib.blake2b("\n".join(parts).encode(), digest_size=20).hexdigest()
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def load_or_make(self, file: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return named tensors on the CPU, mapped from a file that is made if it is missing."""
        if (found := _load(file)) is not None:
            return found
        with one_at_a_time(file.parent):
            found = _load(file)  # another worker may have made it meanwhile
            if found is None:
                made = make()
                self._store(file, made)
                found = _load(file) or made  # mapped, so that it takes no memory of our own
        return found

    def _store(self, file: Path, tensors: dict[str, Tensor]) -> None:
        """Write under another name and rename, so that a file that exists is whole; then trim."""
        with contextlib.suppress(OSError, SafetensorError):
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(".partial", f"{file.name}.", file.parent)
            os.close(handle)
            try:
                stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
                save_file(stored, partial, {"checksum": _checksum(file, stored)})
                Path(partial).replace(file)
            finally:
                Path(partial).unlink(missing_ok=True)
            self._until_trim -= file.stat().st_size
            if self._until_trim <= 0:
                self._until_trim = self.trim() // CHECKS

    def limit(self, held: int) -> int:
        """Return the size limit of the folder, which holds ``held`` bytes: the user's, else 20 GiB.

        The default is at most a tenth of the disk space that is free or held.
        """
        if (own := user_limit()) is not None:
            return own
        return min(MOST, (shutil.disk_usage(self.folder).free + held) // SHARE)

    def trim(self) -> int:
        """Remove the least recently used files until the folder is within its limit; return that.

        Other files in the folder are neither counted nor removed.
        """
        found = []
        for file in self.folder.glob("??/*"):
            if _CACHED.fullmatch(file.name):
                with contextlib.suppress(OSError):  # another process has removed it
                    status = file.stat()
                    found.append((status.st_mtime_ns, status.st_size, file))
        held = sum(size for _, size, _ in found)
        most = self.limit(held)
        for _, size, file in sorted(found):
            if held <= most:
                break
            with contextlib.suppress(OSError):
                file.unlink()
            held -= size
        return most


def _load(file: Path) -> dict[str, Tensor] | None:
    """Map a file's tensors if it is undamaged; return unread mappings, which take no memory."""
    try:
        if not file.is_file():  # opening a pipe would block
            return None
        checksum, found = _mapped(file)
        if checksum != _checksum(file, found):
            return None
        del found  # whose pages have all been read
        _, found = _mapped(file)
    except (OSError, SafetensorError):
        return None
    with contextlib.suppress(OSError):  # another user's, or removed by now
        os.utime(file)
    return found


def _mapped(file: Path) -> tuple[str | None, dict[str, Tensor]]:
    """Return the checksum that a file carries, and its tensors, of which nothing is read yet."""
    with safe_open(file, framework="pt", device="cpu") as opened:
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return (opened.metadata() or {}).get("checksum"), found


def _checksum(file: Path, tensors: Mapping[str, Tensor]) -> str:
    """Hash a file's name, and the names, types, shapes and values of the tensors in it."""
    digest = xxh3_128(file.name.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
