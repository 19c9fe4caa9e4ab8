"""Names that lm-eval has tasks for, found without reading all of its task files.

lm-eval's own index parses 14,000 YAML files, ten seconds of every start. A name stands as a word
in each file that defines it, so a search for words finds the few files worth parsing.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lm_eval.tasks._index import _IGNORE_DIRS, Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

LM_EVAL_TASKS = Path(importlib.import_module("lm_eval.tasks").__path__[0])

_NAMED = re.compile(r"^(?:task|group|tag):[ \t]*[\"']?([\w.:-]+)", re.MULTILINE)
_WORD = re.compile(r"[\w./:+-]+")
_INCLUDED = re.compile(r"^include:[ \t]*([^\n]*)((?:\n[ \t]*- [^\n]*)*)", re.MULTILINE)


def find_registered(names: Iterable[str], root: Path = LM_EVAL_TASKS) -> dict[str, Entry]:
    """lm-eval's index, of these names and all that they stand for alone.

    Args:
        names: Tasks, groups and tags, whether they exist or not.
        root: The folder of task files.

    Returns:
        Name to entry, as in ``TaskManager().task_index``, for those that exist.
    """
    files: dict[Path, dict[str, Any] | None] = {}
    index: dict[str, Entry] = {}
    known: set[str] = set()
    wanted = set(names)
    while new := wanted - known:
        known |= new
        for file in _defining(new, root) - files.keys():
            files[file] = _config(file)
        index = _index(files)
        for name in new & index.keys():
            wanted |= set(named_by(index[name]))
    return {name: index[name] for name in sorted(known & index.keys())}


def registered_names(root: Path = LM_EVAL_TASKS) -> list[str]:
    """The names that task files give in one line, to suggest what was meant."""
    return sorted({name for text in _texts(root).values() for name in _NAMED.findall(text)})


def named_by(entry: Entry) -> Iterator[str]:
    """The names a group or tag stands for; those that a group defines itself are among them."""
    if entry.kind is Kind.TAG:
        yield from entry.tags
    elif entry.kind is Kind.GROUP:
        yield from _members((entry.cfg or {}).get("task"))


def _members(listed: object) -> Iterator[str]:
    for member in listed if isinstance(listed, list) else []:
        if isinstance(member, str):
            yield member
        elif isinstance(member, dict):
            yield from (member[key] for key in ("task", "group") if _is_name(member.get(key)))
            yield from _members(member.get("task"))


def _is_name(value: object) -> bool:
    return isinstance(value, str)


@functools.cache  # names are looked for more than once, and then names like them
def _texts(root: Path) -> dict[Path, str]:
    """Every file that can hold a part of a task's definition, in lm-eval's order."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _IGNORE_DIRS]
        found += [
            os.path.join(folder, name)
            for name in names
            if name.endswith("yaml") or not os.path.splitext(name)[1]
        ]
    return {Path(file): _text(file) for file in sorted(found)}


def _text(file: str) -> str:
    with open(file, "rb") as opened:
        return opened.read().decode("utf-8", errors="replace")


def _mentioning(names: set[str], root: Path) -> Iterator[Path]:
    """The files in which one of the names stands as a word."""
    for file, text in _texts(root).items():
        if near := [name for name in names if name in text]:
            words = {word.strip(".:-/") for word in _WORD.findall(text)}
            if not words.isdisjoint(near):
                yield file


@functools.cache
def _including(root: Path) -> dict[Path, list[Path]]:
    """Which files include a file."""
    found: dict[Path, list[Path]] = {}
    for file, text in _texts(root).items():
        for one, several in _INCLUDED.findall(text):
            for name in [one, *several.split("\n")]:
                target = name.strip().removeprefix("- ").split(" #")[0].strip(" \"'")
                if target:
                    included = Path(os.path.normpath(file.parent / target))
                    found.setdefault(included, []).append(file)
    return found


def _defining(names: set[str], root: Path) -> set[Path]:
    """The files that mention one of the names, by themselves or in what they include."""
    found: set[Path] = set()
    waiting = [*_mentioning(names, root)]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += _including(root).get(file, [])
    return {file for file in found if file.suffix == ".yaml"}


def _config(file: Path) -> dict[str, Any] | None:
    try:
        return load_yaml(file, resolve_func=False)  # type: ignore[no-any-return]
    except Exception:  # lm-eval's index passes over what it cannot read, whatever the reason
        return None


def _index(files: dict[Path, dict[str, Any] | None]) -> dict[str, Entry]:
    index: dict[str, Entry] = {}
    for file in sorted(files, key=lambda file: file.as_posix()):
        if (config := files[file]) is not None:
            try:
                TaskIndex.process_cfg(config, file, index)
            except ValueError:  # it defines neither a task nor a group
                continue
    return index
