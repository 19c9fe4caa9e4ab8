"""A study to begin with: its commented YAML, and task files for questions of the user's own."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import yaml

from merge_engine.models.checkpoint import is_hub_id
from objectives.base import ObjectiveError
from objectives.entries import TaskEntry
from objectives.harness.jsonl_task import task_yaml
from search.study.reading import load_study
from search.study.spec import ItemCounts, SearchSpec, StudyError

OWN: Final = "tasks"  # folder of the task files that are written

STUDY: Final = """\
# Which merge of these models is best at these tasks?
# Relative paths count from this file's folder; mergesearch's README has the other keys.

# What the models were fine-tuned from, and they; each a folder or a hub id (org/name[@revision]).
base_model: {base}
models:                        # to be merged; BASE+ADAPTER for a LoRA adapter
{models}
# dtype: bfloat16              # of the result; else the base's

search:
  # methods: [task_arithmetic, ties]   # these alone; else all that merge so many models
  scale: {scale}            # mean weight of the models: [low, high] is searched, a number fixed
  # density: [0.1, 1.0]        # so is any parameter of a method, by its mergekit name
  layer_groups: 1              # how many parts of the depth have weights of their own
  # start: [recipe.yaml]       # recipes, or folders of earlier runs, to be tried first
  trials: {trials:<21}# recipes to try at most
  stop: true                   # fewer, when nothing is left to gain that could be told
  seed: 0                      # the same seed tries the same recipes

objective:
  include_path: {include_path}   # folders of task files, besides lm-eval's own tasks
  tasks:                       # their weighted mean is searched for
{tasks}
  # Different items for each, over all tasks: the search sees the first, the best few recipes are
  # compared on the second, and the third tell once how good the winner is.
  items: {{search: {items.search}, select: {items.select}, test: {items.test}}}   # {available}
  # constraints: {{{task}: 0.5}}   # the least that a recipe has to reach in a task
  apply_chat_template: false   # true: ask through the base's chat template
  # system_instruction: Answer in one word.
"""

Write = Callable[[Path, str], None]


@contextmanager
def all_or_nothing() -> Iterator[Write]:
    """Write new files, which are gone again, like the folders made for them, if the rest fails.

    Raises:
        StudyError: A file exists already or cannot be written.
    """
    made: list[Path] = []

    def write(file: Path, text: str) -> None:
        try:
            for folder in reversed([folder for folder in file.parents if not folder.exists()]):
                folder.mkdir()
                made.append(folder)
            with file.open("x", encoding="utf-8") as out:
                made.append(file)
                out.write(text)
        except FileExistsError:
            raise StudyError(f"{file} exists; choose another --out, or remove it") from None
        except OSError as error:
            raise StudyError(f"{file}: {error.strerror}; choose another --out") from None

    try:
        yield write
    except BaseException:
        for path in reversed(made):
            path.rmdir() if path.is_dir() else path.unlink()
        raise


def write_study(
    file: Path,
    base: str,
    models: Sequence[str],
    tasks: Sequence[str],
    trials: int | None,
    write: Write,
) -> list[str]:
    """Write a study, and beside it, in ``tasks``, the task files that it needs.

    Args:
        file: The study's.
        base: A folder or a hub id, like each of the models.
        models: To be merged.
        tasks: Each a name lm-eval knows, its YAML file, or a JSONL file of questions.
        trials: None: as many as by default.
        write: Writes a new file.

    Returns:
        Notes for the user.

    Raises:
        StudyError, RecipeError, ObjectiveError: What is wrong, and what to do; a study of it
            would be refused, too.
    """
    folder = file.parent
    if file.exists():  # before anything else is looked at
        raise StudyError(f"{file} exists; choose another --out, or remove it")
    named = [_place(model, folder) for model in (base, *models)]
    found = [_task(task, folder, write) for task in tasks]
    names = [name for name, _ in found]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise StudyError(f"--tasks: {repeated[0]!r} is named twice; name each task once")
    places = dict.fromkeys(_relative(place, folder) for _, place in found if place is not None)
    include_path = sorted(places, key=OWN.__eq__)  # the last one's names count
    notes, items, available = _items(names, [folder / path for path in include_path])
    text = STUDY.format(
        base=_plain(named[0]),
        models="\n".join(f"  - {_plain(model)}" for model in named[1:]),
        scale=list(SearchSpec.model_fields["scale"].default),
        trials=trials or SearchSpec.model_fields["trials"].default,
        include_path=f"[{', '.join(map(_plain, include_path))}]",
        tasks="\n".join(f"    - {{task: {_plain(name)}, weight: 1.0}}" for name in names),
        task=_plain(names[0]),
        items=items,
        available=available,
    )
    write(file, text)
    load_study(file)
    return notes


def _plain(value: str) -> str:
    """A text as YAML writes it within a flow mapping."""
    return yaml.safe_dump([value], default_flow_style=True, width=10_000, allow_unicode=True)[1:-2]


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.expanduser().resolve(), folder.resolve())).as_posix()


def _place(model: str, folder: Path) -> str:
    """A model as a study in ``folder`` names it."""
    path = Path(model).expanduser()
    if path.is_dir():
        return _relative(path, folder)
    if "+" in model:
        return "+".join(_place(part, folder) for part in model.split("+"))
    # where there is a folder zoo, zoo/sotr is no hub id
    if not is_hub_id(model) or path.parent.is_dir():
        raise StudyError(f"--base, --models: {model!r}: no such folder, and no hub id (org/name)")
    return model


def _task(task: str, folder: Path, write: Write) -> tuple[str, Path | None]:
    """The name of a task, and the folder of its file if it is not lm-eval's own."""
    path = Path(task).expanduser()
    if path.suffix not in (".jsonl", ".yaml"):
        if path.exists():
            raise StudyError(
                f"--tasks: {task} is none; give a name that lm-eval knows, a task's .yaml file or "
                "a .jsonl file of questions"
            )
        return task, None
    if not path.is_file():
        raise StudyError(f"--tasks: no file {task}; check the path")
    if path.suffix == ".yaml":
        from objectives.harness.task_index import name_in

        return name_in(path), path.parent
    name = re.sub(r"\W+", "_", path.stem)
    file = folder / OWN / f"{name}.yaml"
    write(file, task_yaml(name, path, file.parent))
    return name, file.parent


def _items(names: Sequence[str], include_path: Sequence[Path]) -> tuple[list[str], ItemCounts, str]:
    """How many items for what: ours by default, or the same shares of those there are."""
    from objectives.harness.tasks import load_tasks

    wanted = ItemCounts()
    try:
        tasks = load_tasks([TaskEntry(task=name) for name in names], include_path)
    except ObjectiveError as error:
        if not isinstance(error.__cause__, ConnectionError):
            raise
        return [f"{error}; the study asks for the usual number of items"], wanted, "not counted yet"
    count = len({item.key for task in tasks for item in task.items})
    if count < wanted.search + wanted.select + wanted.test:
        quarter = max(1, count // 4)
        wanted = ItemCounts(search=quarter, select=quarter, test=max(1, count - 2 * quarter))
    return [], wanted, f"of the {count} there are"
