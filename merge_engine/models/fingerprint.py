"""Fingerprints of weight files: which weights these are, without reading all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

SAMPLES = 64  # read of each file
SAMPLE_BYTES = 1 << 16


def fingerprint(files: Iterable[Path], *, dated: bool = True) -> str:
    """Hash the size, the safetensors header and 64 equally spaced samples of 64 KiB of each file.

    A fine-tune may differ outside of the samples only, so the modification time is hashed as well:
    measuring a copied model again costs seconds, mistaking one for another would cost the study.
    Without it (not ``dated``) copies have equal fingerprints.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        status = file.stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns if dated else ''} ".encode())
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if file.suffix == ".safetensors":
                digest.update(opened.read(length))
            last = max(0, status.st_size - SAMPLE_BYTES)
            for start in sorted({last * number // (SAMPLES - 1) for number in range(SAMPLES)}):
                opened.seek(start)
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()
