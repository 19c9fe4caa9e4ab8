"""Read task files; refuse those that would block or crash lm-eval, or have a key twice.

lm-eval reads every file of a folder, with what it includes, to learn the tasks' names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

# Private, and lm-eval's only reader of task files: it knows their includes and functions.
from lm_eval.tasks._yaml_loader import load_yaml

from objectives.base import ObjectiveError

_DEPTH = 100  # levels of a task file
_PARTS = 100_000  # of a task file with what its aliases stand for
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_task(file: Path, *, recursive: bool = True) -> dict[str, Any]:
    """Read a task file and, if ``recursive``, those it includes; functions are left as texts.

    Raises:
        ObjectiveError: One is not a task file.
    """
    try:
        check_plain(file)
        _check_depth(file)
        _check_node(yaml.compose(file.read_bytes(), _LOADER), file)
        return load_yaml(file, resolve_func=False, recursive=recursive)  # type: ignore[no-any-return]
    except ObjectiveError:
        raise
    except Exception as error:  # besides PyYAML's own, of tags such as !!int zz
        raise ObjectiveError(f"{file}: not a task file: {' '.join(str(error).split())}") from None


def with_includes(file: Path, outside: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a task file and those it includes, each once with its own contents.

    Files in the folder ``outside`` are left out.

    Raises:
        ObjectiveError: One is not a task file.
    """
    left, seen = [file], set[Path]()
    while left:
        file = left.pop().expanduser().resolve()
        if file in seen or file.is_relative_to(outside):
            continue
        seen.add(file)
        config = read_task(file, recursive=False)
        yield file, config
        left += [file.parent / name for name in _included(config)]


def check_readable(file: Path, tasks: dict[Path, object]) -> None:
    """Refuse a file that would block or crash lm-eval when it looks for tasks, or its includes.

    Other faults are raised when the file is needed. Each file's ``task`` is noted in ``tasks``.
    """
    if file in tasks or file.is_dir():
        return
    tasks[file] = None
    check_plain(file)
    config: dict[str, Any] = {}
    with suppress(OSError, yaml.YAMLError):
        _check_depth(file)
        with suppress(Exception):  # of tags such as !!int zz
            config = load_yaml(file, resolve_func=False, recursive=False)
    for key in ("task", "group", "tag"):
        for name in _listed(config.get(key)):
            if not isinstance(name, str | dict):  # lm-eval sorts all names
                raise ObjectiveError(f"{file}: its {key} is {name!r}; write a text, in quotes")
    tasks[file] = config.get("task")
    for name in _included(config):
        check_readable(file.resolve().parent / name, tasks)


def check_plain(file: Path, where: str = "") -> None:
    """Refuse a path that is not a regular file: reading a pipe or a device may never end.

    ``where`` it was named comes first in the error.
    """
    if file.exists() and not file.is_file():
        kind = "a folder" if file.is_dir() else "a named pipe" if file.is_fifo() else "a device"
        raise ObjectiveError(
            f"{where}{file}: is {kind}, not a file; put the file there, or correct the path"
        )


def _included(config: dict[str, Any]) -> list[str]:
    return [name for name in _listed(config.get("include")) if isinstance(name, str)]


def _listed(value: object) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _check_depth(file: Path) -> None:
    """Refuse a file nested so deeply that reading it would crash the process."""
    depth = 0
    for event in yaml.parse(file.read_bytes(), _LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEPTH:
            raise ObjectiveError(f"{file}: nested more than {_DEPTH} levels deep; correct it")


def _check_node(node: yaml.Node | None, file: Path) -> None:
    """Refuse duplicate keys, and aliases that make a document recursive or huge."""
    sizes: dict[int, int | None] = {}  # of parts by identity; None: we are inside of it

    def size(part: object) -> int:
        if not isinstance(part, yaml.CollectionNode):
            return 1
        if id(part) in sizes:
            if (known := sizes[id(part)]) is None:
                raise ObjectiveError(f"{file}: an alias stands for what it is in; write that out")
            return known
        sizes[id(part)] = None
        parts = part.value
        if isinstance(part, yaml.MappingNode):
            keys = [key.value for key, _ in parts if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) < len(keys):
                twice = next(key for key in keys if keys.count(key) > 1)
                raise ObjectiveError(f"{file}: the key {twice!r} comes twice; keep one")
            parts = [each for pair in parts for each in pair]
        sizes[id(part)] = total = 1 + sum(map(size, parts))
        return total

    if size(node) > _PARTS:
        raise ObjectiveError(f"{file}: its aliases make it huge; write them out")
