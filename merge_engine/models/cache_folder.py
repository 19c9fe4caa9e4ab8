"""Where what was computed of models is kept from one run to the next."""

from __future__ import annotations

import os
from pathlib import Path

from merge_engine.errors import MergeError


def default_folder() -> Path:
    """Return ``$MERGESEARCH_CACHE``, or else ``mergesearch`` in the user's cache folder.

    Raises:
        MergeError: It would be in the home of a user that is not known.
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
