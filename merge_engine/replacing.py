"""Atomic writes of files and folders: readers see the old or the new one, never a part."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Final

from merge_engine.errors import FULL, MergeError

# What a kill leaves of a file that was being written.
_PARTIAL: Final = re.compile(r"\.(.+)\.[0-9a-f]{8}\.partial(-journal)?")
_MARK: Final = ".mergesearch"  # marks a folder that this program is writing


def replace_text(file: Path, text: str, *, private: bool = False) -> None:
    """Replace a file atomically; a symbolic link in its place is replaced, not followed.

    With ``private`` only its owner may read it, whatever the umask.
    """
    with _partial(file, text, 0o600 if private else 0o666) as partial:
        partial.replace(file)


def create_text(file: Path, text: str) -> None:
    """Create a file atomically; raise FileExistsError if it exists."""
    remove_partials(file.parent, file.name)
    with _partial(file, text, 0o666) as partial:
        file.hardlink_to(partial)


@contextmanager
def _partial(file: Path, text: str, mode: int) -> Iterator[Path]:
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    how = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(partial, how, mode), "wb") as opened:
            opened.write(text.encode())
            opened.flush()
            os.fsync(opened.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(folder: Path, name: str | None = None) -> None:
    """Remove partial files that a kill has left in a folder, of one file or of all (None)."""
    for path in folder.iterdir() if folder.is_dir() and not folder.is_symlink() else ():
        match = _PARTIAL.fullmatch(path.name)
        if match and name in (None, match[1]) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write in, which becomes ``out`` on success and is removed on an error.

    It is next to ``out``, locked and marked as ours. One that a kill has left is reused; a user's
    folder of the same name is left alone.

    Raises:
        MergeError: ``out`` exists, cannot be made, or another process is writing it.
        OSError: The disk is full.
    """
    if os.path.lexists(out):
        raise _exists(out)
    made = [folder for folder in out.absolute().parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial, lock = _locked_beside(out)
    except OSError as error:
        _remove_empty(made)
        if error.errno in FULL:  # another folder would not help
            raise OSError(error.errno, error.strerror, str(out)) from error
        raise MergeError(f"{out}: {error.strerror}; choose another folder") from None
    try:
        yield partial
        _put_in_place(partial, out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(made)
        if isinstance(error, OSError) and error.errno is not None:  # a full disk names no file
            raise OSError(error.errno, error.strerror, str(out)) from error
        raise
    finally:
        os.close(lock)


def _locked_beside(out: Path) -> tuple[Path, int]:
    """Make or take over a folder beside ``out``; return it and the descriptor of its lock."""
    for number in count(1):
        partial = out.with_name(f"{out.name}.partial{f'-{number}' if number > 1 else ''}")
        with contextlib.suppress(FileExistsError):
            partial.mkdir()
        try:
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.EACCES):  # the user's
                continue
            raise
        if not _is_ours(partial):
            os.close(lock)
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(lock), partial.stat()):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            os.close(lock)
            raise MergeError(
                f"{out} is being written by another process; wait for it, or choose another folder"
            ) from None
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        (partial / _MARK).touch()
        return partial, lock
    raise AssertionError


def _is_ours(folder: Path) -> bool:
    """Return whether a folder is empty, or was created by this program."""
    return (folder / _MARK).is_file() or not any(folder.iterdir())


def _put_in_place(partial: Path, out: Path) -> None:
    """Sync everything to disk, then give the folder its name."""
    for folder, _, files in os.walk(partial, topdown=False):
        for path in [*(Path(folder, name) for name in files), Path(folder)]:
            _sync(path)
    if os.path.lexists(out):
        raise _exists(out)
    try:
        partial.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _exists(out) from None
        raise
    (out / _MARK).unlink()
    _sync(out.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # in use by another process by now
            folder.rmdir()


def _exists(out: Path) -> MergeError:
    return MergeError(f"{out} exists; choose another folder or remove it")
