"""Folders with a small valid study, recipe and task, for tests to break in one way each."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from objectives.harness.jsonl_task import task_yaml

Change = Callable[[Path], object]  # done to a folder before the command


def write(name: str, contents: str | bytes) -> Change:
    data = contents.encode() if isinstance(contents, str) else contents

    def change(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)

    return change


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def tree(folder: Path) -> dict[Path, tuple[int, bytes | None]]:
    """Return every file and folder below, with its modification time and contents."""
    return {
        path: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


def shortcoming(parts: tuple[str, ...], code: int, said: str) -> str | None:
    """Return what is wrong with an exit code, or a message that must have ``parts`` in order."""
    start = 0
    for part in parts:
        found = said.find(part, start)
        if found < 0:
            return f"{part!r} is not said in {said!r}"
        start = found + len(part)
    if code != 2:
        return f"exit code {code}: {said}"
    if not said.startswith("mergesearch: ") or said.count("\n") != 1:
        return f"not one line: {said}"
    return None


RUN = "run study.yaml --out run --device cpu"
CHECK, BUILD = "check study.yaml --device cpu", "build recipe.yaml out --device cpu"
INIT = "init --base base --models a b --out new.yaml --tasks"
STUDY: Mapping[str, Any] = {
    "base_model": "base",
    "models": ["a", "b"],
    "search": {"methods": ["task_arithmetic", "ties"], "trials": 2, "tune": False},
    "objective": {
        "include_path": "tasks",
        "tasks": [{"task": "tell"}],
        "items": {"search": 4, "select": 4, "test": 4},
        "block": 4,
    },
}
RECIPE: Mapping[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "a"}, {"model": "b"}],
    "parameters": {"weight": 0.5, "density": 0.5},
    "dtype": "float32",
}


def furnish(folder: Path, zoo: Path) -> Path:
    """Make a folder in which ``RUN`` and ``BUILD`` work."""
    for name in ("base", "a", "b"):
        shutil.copytree(zoo / name, folder / name)
    tasks = folder / "tasks"
    tasks.mkdir()
    rows = [{"question": f"{letter}?", "answer": letter} for letter in "abcdefghijklmnopqrst"]
    (tasks / "tell.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "tell.yaml").write_text(task_yaml("tell", tasks / "tell.jsonl", tasks))
    (folder / "study.yaml").write_text(yaml.safe_dump(dict(STUDY)))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(dict(RECIPE)))
    return folder


def study(**changes: Any) -> Callable[[Path], None]:
    """Change values of the study, given by their keys joined with ``__``."""
    return lambda folder: _rewrite(folder / "study.yaml", changes)


def recipe(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: _rewrite(folder / "recipe.yaml", changes)


def task(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: _rewrite(folder / "tasks" / "tell.yaml", changes)


def _rewrite(file: Path, changes: Mapping[str, Any]) -> None:
    mapping = yaml.safe_load(file.read_text())
    for path, value in changes.items():
        part = mapping
        *parents, last = path.split("__")
        for parent in parents:
            part = part[parent]
        part[last] = value
    file.write_text(yaml.safe_dump(mapping))


def config(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: _rewrite_json(folder / name / "config.json", changes)


def _rewrite_json(file: Path, changes: Mapping[str, Any]) -> None:
    changed = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))
