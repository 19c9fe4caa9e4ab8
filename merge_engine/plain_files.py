"""Tell regular files from folders, pipes and devices; opening a pipe would block forever."""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from pathlib import Path

from merge_engine.errors import MergeError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def other_than_file(path: Path) -> str | None:
    """Return what a path is if it is not a regular file, like "a folder"; None: a file, or nothing.

    Raises:
        MergeError: Its folder may not be looked into.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except PermissionError as error:
        raise MergeError(f"{path}: {error.strerror}; make its folder readable") from None
    except (OSError, ValueError):  # nothing there, or no name that a file can have
        return "a link that leads to no file" if os.path.islink(path) else None
    return None if kind == stat.S_IFREG else _KINDS.get(kind, "something else")


def is_there(file: Path, advice: str = "put the file there, or fetch it again") -> bool:
    """Return whether a file is there.

    Raises:
        MergeError: The path is not a regular file, or it may not be read.
    """
    if kind := other_than_file(file):
        raise MergeError(f"{file}: is {kind}, not a file; {advice}")
    if not os.path.isfile(file):  # pathlib's raises for a name that is too long
        return False
    if not os.access(file, os.R_OK):
        raise MergeError(f"{file}: {os.strerror(errno.EACCES)}; make it readable")
    return True


def in_other_form(missing: Path) -> Path | None:
    """Return the path whose name has a missing one's letters in another Unicode normal form.

    An accent may be a part of its letter or a character of its own, by the system that wrote it.
    """
    if missing.name.isascii() or not missing.parent.is_dir():
        return None
    wanted = unicodedata.normalize("NFC", missing.name)
    there = sorted(missing.parent.iterdir())
    return next((p for p in there if unicodedata.normalize("NFC", p.name) == wanted), None)


def is_text(name: object) -> bool:
    """Return whether a path or a word is UTF-8 text, as databases and weight files need it."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        return False
    return True
