"""Find lm-eval tasks by name: in the user's folders, else in lm-eval's own index, cached on disk.

lm-eval parses 14,000 YAML files to learn its task names, which takes ten seconds. It is done once
per version of lm-eval.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import json
import logging
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

# Private, but the type of ``TaskManager.task_index``, which a cached index has to recreate.
from lm_eval.tasks._index import Entry, Kind

from objectives.base import ObjectiveError
from objectives.harness.quiet import quiet
from objectives.harness.task_files import check_plain, check_readable, read_task

LM_EVAL_TASKS = Path(importlib.import_module("lm_eval.tasks").__path__[0])

_SHOWN = 300  # characters of what is wrong with one
# All that is looked up in an entry's configuration; tasks are built from their files.
_KEPT = ("task", "group", "unsafe_code")


def find_tasks(
    names: Sequence[str], include_path: Sequence[Path], cache: Path | None = None
) -> TaskManager:
    """Return a task manager that knows the named tasks, groups and tags.

    Args:
        names: Names to look up.
        include_path: Folders whose tasks take precedence over lm-eval's.
        cache: Folder that keeps lm-eval's index between processes; None: it is built again.

    Raises:
        ObjectiveError: A name is unknown, or is in two files.
    """
    folders = [folder.resolve() for folder in include_path]
    _check_folders(names, folders)
    manager = TaskManager(include_defaults=False, include_path=folders)
    index = manager.task_index
    if {*names, *(name for entry in index.values() for name in members(entry))} - index.keys():
        for name, entry in registered_tasks(cache).items():
            index.setdefault(name, entry)
    if (unknown := next(_unknown(names, index), None)) is not None:
        raise _unknown_task(unknown, index, folders)
    return manager


def _check_folders(names: Sequence[str], folders: Sequence[Path]) -> None:
    """Refuse files that would block or crash lm-eval, and a named task that is in two of them."""
    tasks: dict[Path, object] = {}
    listed = [file for folder in folders for file in folder.rglob("*.yaml")]
    for file in listed:
        check_readable(file, tasks)
    for name in names:  # of a file that is only included, the name is replaced
        files = sorted({file.resolve() for file in listed if tasks.get(file) == name})
        if len(files) > 1:
            raise ObjectiveError(
                f"task {name!r} is in {files[0]} and in {files[1]}; rename one, or remove it"
            )
    for file in (file for folder in folders for file in folder.rglob("*.py")):
        if not file.is_dir():  # a task's code, which is imported if it is trusted
            check_plain(file)


@functools.cache
def registered_tasks(cache: Path | None = None) -> Mapping[str, Entry]:
    """Return lm-eval's own index: name of a task, group or tag to its entry.

    It is read from the folder ``cache``, or built and written there if it is missing or damaged.
    """
    file = cache / "task_index" / f"{_version()}.json" if cache else None
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        if file and file.is_file():  # opening a pipe would block
            return _read_index(file)
    with quiet(logging.ERROR):
        index: dict[str, Entry] = TaskManager().task_index
    if file:
        with suppress(OSError):  # without the file, the next start takes ten seconds more
            _write_index(file, index)
    return index


def _version() -> str:
    """Return a hash that changes with lm-eval's version and folder, and with new task folders."""
    changed = LM_EVAL_TASKS.stat().st_mtime_ns  # an lm-eval under development gets new ones
    text = f"{version('lm-eval')} {LM_EVAL_TASKS} {changed}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_index(file: Path) -> Mapping[str, Entry]:
    rows = json.loads(file.read_text(encoding="utf-8"))
    return {
        name: Entry(name, Kind[kind], Path(path) if path else None, config, set(tags))
        for name, kind, path, config, tags in rows
    }


def _write_index(file: Path, index: Mapping[str, Entry]) -> None:
    rows = [_row(entry) for entry in index.values()]
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(rows, default=str), encoding="utf-8")
    partial.replace(file)  # in one step: other processes may read and write it


def _row(entry: Entry) -> list[Any]:
    config = {key: entry.cfg[key] for key in _KEPT if key in entry.cfg} if entry.cfg else None
    path = str(entry.yaml_path) if entry.yaml_path else None
    return [entry.name, entry.kind.name, path, config, sorted(entry.tags)]


def members(entry: Entry) -> Iterator[str]:
    """Yield the names that a group or tag stands for, those a group defines itself included."""
    if entry.kind is Kind.TAG:
        yield from entry.tags
    elif entry.kind is Kind.GROUP:
        yield from _listed((entry.cfg or {}).get("task"))


def _listed(entries: object) -> Iterator[str]:
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            yield from (entry[key] for key in ("task", "group") if isinstance(entry.get(key), str))
            yield from _listed(entry.get("task"))


def _unknown(
    names: Iterable[object], index: Mapping[str, Entry], inside: tuple[str, ...] = ()
) -> Iterator[str]:
    """Yield the names that are not in the index, those a group lists included.

    Raises:
        ObjectiveError: A group is in itself.
    """
    for name in names:
        if not isinstance(name, str):  # a task defined inside its group
            continue
        if name in inside:
            raise ObjectiveError(
                f"group {name!r} ({index[name].yaml_path}) is in itself: "
                f"{' > '.join([*inside, name])}; take it out"
            )
        if (entry := index.get(name)) is None:
            yield name
        elif entry.kind is Kind.GROUP and isinstance(entry.cfg.get("task"), list):
            yield from _unknown(entry.cfg["task"], index, (*inside, name))


_FILES = {
    ".jsonl": "write a task file for it with 'mergesearch init --tasks', and name that task",
    ".yaml": "name the task in it, and its folder as 'include_path'",
    ".yml": "rename it to .yaml, name the task in it, and its folder as 'include_path'",
}


def _unknown_task(name: str, known: Iterable[str], folders: Sequence[Path]) -> ObjectiveError:
    close = difflib.get_close_matches(name, known)
    searched = ", ".join([*map(str, folders), "lm-eval's own tasks"])
    fixes = [f"did you mean {' or '.join(map(repr, close))}?"] if close else []
    if any(
        unicodedata.normalize("NFC", each) == unicodedata.normalize("NFC", name) for each in close
    ):
        fixes = ["the name of one has the same letters in another Unicode form: copy it from there"]
    if way := _FILES.get(Path(name).suffix):  # a file is no name
        fixes = [way]
    for file in [file for folder in folders for file in sorted(folder.rglob("*.yaml"))]:
        try:
            read_task(file)
        except ObjectiveError as error:  # lm-eval's index leaves such a file out silently
            fixes.append(f"correct {str(error)[:_SHOWN]}")
    misnamed = [file for folder in folders for file in sorted(folder.rglob("*.yml"))]
    fixes += [f"{file} is not read: call it .yaml" for file in misnamed]
    return ObjectiveError(
        f"no task {name!r} in {searched}; {'; '.join(fixes) or 'check its spelling'}"
    )


def name_in(file: Path) -> str:
    """Return the name of the task or group that a YAML file defines."""
    config = read_task(file)
    for kind in ("task", "group"):
        if isinstance(name := config.get(kind), str):
            return name
    raise ObjectiveError(f"{file}: not a task file of lm-eval; it needs a line like 'task: name'")
