"""The folder of caches that are shared by runs."""

from __future__ import annotations

import os
from pathlib import Path

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
