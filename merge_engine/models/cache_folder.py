"""The folder of caches that are shared by runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from merge_engine.errors import MergeError


def default_folder() -> Path:
    """Return ``$MERGESEARCH_CACHE``, or else ``mergesearch`` in the user's cache folder.

    Raises:
        MergeError: It would be in an unknown user's home.
    """
    try:
        if own := os.environ.get("MERGESEARCH_CACHE"):
            return Path(own).expanduser()
        shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(shared).expanduser() / "mergesearch"
    except RuntimeError:
        raise MergeError(
            "there is no home folder to keep the cache in; set $MERGESEARCH_CACHE to a folder"
        ) from None


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let only one process at a time fill a folder, if its files can be locked."""
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError):  # a disk that is full, or cannot be written
        yield
        return
    try:
        yield
    finally:
        lock.release()
