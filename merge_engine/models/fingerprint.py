"""Fingerprints of weight files, over all of their bytes.

A checksum is cached and computed again when the file's size, inode or times change. XXH3 is limited
by the disk: 16 GB take seconds, once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from xxhash import xxh3_128

from merge_engine.models.cache_folder import default_folder
from merge_engine.replacing import replace_text

CHUNK = 1 << 22  # bytes that are read at once
SETTLED = 2_000_000_000  # ns after which another change is sure to get a different time


class FileState(NamedTuple):
    """Metadata that changes whenever a file's contents do."""

    size: int  # bytes
    modified: int  # ns
    changed: int  # ns; unlike `modified`, programs cannot set it
    inode: int
    device: int

    @classmethod
    def of(cls, file: Path) -> FileState:
        """Return a file's state; OSError if there is no file."""
        status = file.stat()
        times = (status.st_mtime_ns, status.st_ctime_ns)
        return cls(status.st_size, *times, status.st_ino, status.st_dev)

    @property
    def is_settled(self) -> bool:
        """Whether a later change is certain to have another time."""
        return time.time_ns() - max(self.modified, self.changed) > SETTLED


def checksum(file: Path) -> str:
    """Hash a file's bytes, as ``xxh128sum`` does."""
    digest, buffer = xxh3_128(), memoryview(bytearray(CHUNK))
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def known_checksum(file: Path) -> str:
    """Return a file's ``checksum``, read from the cache folder if the file has not changed."""
    state, path = FileState.of(file), str(file.resolve())
    name = hashlib.blake2b(path.encode(errors="surrogateescape"), digest_size=20).hexdigest()
    kept = default_folder() / "checksums" / f"{name}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        found = json.loads(kept.read_bytes()) if kept.is_file() else {}  # a pipe would block
        if found["sum"] == _sum_of(found["checksum"], state):
            return str(found["checksum"])
    digest = checksum(file)
    if FileState.of(file) == state and state.is_settled:
        with contextlib.suppress(OSError):  # it is computed again
            kept.parent.mkdir(parents=True, exist_ok=True)
            replace_text(kept, json.dumps({"checksum": digest, "sum": _sum_of(digest, state)}))
    return digest


def _sum_of(digest: str, state: FileState) -> str:
    return hashlib.blake2b(f"{digest} {[*state]}".encode(), digest_size=16).hexdigest()


def fingerprint(files: Sequence[Path]) -> str:
    """Hash all bytes of some files; copies of them have the same fingerprint."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(known_checksum(file).encode())
    return digest.hexdigest()


class KnownFiles:
    """Files as they are when this is made.

    Attributes:
        fingerprint: Of them all.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files, self._states = files, [FileState.of(file) for file in files]
        self.fingerprint = fingerprint(files)

    def have_changed(self) -> bool:
        """Return whether the contents have changed; they are read only if the metadata has."""
        try:
            states = [FileState.of(file) for file in self._files]
            if states != self._states and fingerprint(self._files) != self.fingerprint:
                return True
        except OSError:  # one is gone
            return True
        self._states = states
        return False
