"""The run folder: checks before anything is written, its lock, and the names of its files.

Its errors are reported first, so this module imports nothing slow.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from merge_engine.errors import FULL
from merge_engine.plain_files import is_text
from merge_engine.replacing import remove_partials
from search.study.spec import StudyError

DATABASE: Final = "study.db"  # the run's own, unless it has REMEMBERED
REMEMBERED: Final = "storage.json"  # URL of another database, and the study's name in it
CARD: Final = "README.md"  # in an exported folder
JOURNALS: Final = "journals"  # folder of the responses to jobs under way
_LOCK: Final = "lock"
# What a run writes in its folder.
NAMES: Final = (
    *(_LOCK, DATABASE, f"{DATABASE}-journal", f"{DATABASE}-wal", f"{DATABASE}-shm", REMEMBERED),
    *("recipe.yaml", "result.json", "paths.json", "report.html", "samples.json"),
    *("checkpoint", JOURNALS),
)
_ASIDE: Final = re.compile(r"old-(\d+)$")


class Interrupted(Exception):  # noqa: N818  an event, not a mistake
    """The machine has stopped a run; when that is fixed, the same command resumes it."""


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to, before anything slow starts."""
    whole = folder.absolute()
    there = next(path for path in (whole, *whole.parents) if path.exists())
    if not there.is_dir():
        reason = errno.EEXIST if there == whole else errno.ENOTDIR
    elif os.access(there, os.W_OK):
        return
    else:
        reason = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES
    raise StudyError(f"{folder}: {os.strerror(reason)}; choose another folder")


def check_run_folder(folder: Path) -> None:
    """Refuse a folder in which no run can start or be resumed."""
    if not is_text(folder.absolute()):
        raise StudyError(f"{folder}: its path is not UTF-8 text; choose another folder")
    check_folder(folder)
    _check_ours(folder)
    if is_held(folder):
        raise _held(folder)


def has_run(folder: Path) -> bool:
    """Return whether the folder contains a run."""
    return any((folder / name).is_file() for name in (DATABASE, REMEMBERED))


def _check_ours(run: Path) -> None:
    """Refuse a folder with other files, or with links that would redirect our writes."""
    if linked := [name for name in NAMES if (run / name).is_symlink()]:
        raise StudyError(
            f"{run / linked[0]} is a link, and the run would write where it leads; remove it, or "
            "link the whole folder"
        )
    if odd := [
        name
        for name in NAMES
        if name not in ("checkpoint", JOURNALS) and (run / name).exists()
        if not (run / name).is_file()
    ]:
        raise StudyError(
            f"{run / odd[0]} is not a file, but the run has to write one there; remove it"
        )
    if (run / JOURNALS).exists() and not (run / JOURNALS).is_dir():
        raise StudyError(
            f"{run / JOURNALS} is not a folder, but the run has to make one there; remove it"
        )
    if run.is_dir() and any(run.iterdir()) and not (has_run(run) or (run / _LOCK).exists()):
        raise StudyError(f"{run} holds other files; choose an empty folder or a run to resume")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder for this process alone.

    Raises:
        StudyError: It cannot be made, holds other files, or another process has it.
    """
    try:
        run.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds prompts and responses
        _check_ours(run)
        lock = FileLock(run / _LOCK)
        held = lock.acquire(blocking=False)
    except Timeout:
        raise _held(run) from None
    except OSError as error:
        if error.errno in FULL:
            raise
        raise StudyError(f"{run}: {error.strerror}; choose another folder") from None
    with held:
        remove_partials(run)
        remove_partials(run / "checkpoint")
        yield


def _held(run: Path) -> StudyError:
    return StudyError(f"{run} is being worked on by another process; wait for it")


def is_held(run: Path) -> bool:
    """Return whether the run folder is locked, by this process or another."""
    if not (run / _LOCK).is_file():  # trying the lock would create the file
        return False
    try:
        with FileLock(run / _LOCK).acquire(blocking=False):
            return False
    except Timeout:
        return True
    except OSError:  # read-only
        return False


def set_aside(run: Path) -> None:
    """Move a run's files into a new subfolder of the run folder."""
    left = [path for path in run.iterdir() if path.name != _LOCK and not _ASIDE.match(path.name)]
    # The database last: until it is moved, the run can still be found.
    left.sort(key=lambda path: path.name.startswith((DATABASE, REMEMBERED)))
    if left:
        taken = [int(match[1]) for path in run.iterdir() if (match := _ASIDE.match(path.name))]
        aside = run / f"old-{max(taken, default=0) + 1}"
        aside.mkdir()
        for path in left:
            path.rename(aside / path.name)
