"""Write a first study: commented YAML, and task files for the user's JSONL questions."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Final

import yaml

from merge_engine.models.cache_folder import default_folder
from merge_engine.models.locating import is_hub_id, is_local
from merge_engine.models.opening import open_model
from merge_engine.models.tensor_names import input_embedding
from merge_engine.plain_files import is_there
from merge_engine.replacing import create_text, remove_partials
from merge_engine.schema import find_folder
from objectives.base import ObjectiveError
from objectives.entries import TaskEntry
from objectives.harness.jsonl_task import task_yaml
from search.study.reading import load_study
from search.study.spec import DEFAULT_SCALE, ItemCounts, SearchSpec, StudyError

TEMPLATE: Final = Path(__file__).with_name("study.yaml.tmpl")
TASKS: Final = "tasks"  # folder, beside the study, of the task files that are written
_FEWEST: Final = 3  # questions: one for each split

Write = Callable[[Path, str], None]


@contextmanager
def all_or_nothing() -> Iterator[Write]:
    """Write new files; if anything fails, they and the folders made for them are removed.

    Raises:
        StudyError: A file exists already or cannot be written.
    """
    made: list[Path] = []

    def write(file: Path, text: str) -> None:
        try:
            for folder in reversed([folder for folder in file.parents if not folder.exists()]):
                folder.mkdir()
                made.append(folder)
            create_text(file, text)
            made.append(file)
        except FileExistsError:
            if file.is_file() and file.read_bytes() == text.encode():  # of one that was killed
                return
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
    models: Sequence[str],
    tasks: Sequence[str],
    write: Write,
    *,
    trials: int | None = None,
    trust_task_code: bool = False,
) -> list[str]:
    """Write a study, and beside it, in ``tasks``, the task files that it needs.

    The first of ``models`` is the base.

    Returns:
        Notes for the user.

    Raises:
        StudyError, MergeError, ObjectiveError: A model or task cannot be used.
    """
    folder = file.parent
    remove_partials(folder, file.name)
    if file.exists():  # before anything else is looked at
        raise StudyError(f"{file} exists; choose another --out, or remove it")
    named = [_model_name(model, folder) for model in models]
    found = [_find_task(task, folder, write) for task in tasks]
    names = [name for name, _ in found]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise StudyError(f"--tasks: {repeated[0]!r} is named twice; name each task once")
    folders = dict.fromkeys(_relative(path, folder) for _, path in found if path is not None)
    include_path = sorted(folders, key=TASKS.__eq__)  # of equal names the last folder's counts
    notes, items, available = _count_items(
        names, [folder / path for path in include_path], trust_task_code=trust_task_code
    )
    defaults = SearchSpec.model_fields
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        base=_flow_yaml(named[0]),
        models="\n".join(f"  - {_flow_yaml(model)}" for model in named[1:]),
        tokenizer=_tokenizer(models),
        scale=list(DEFAULT_SCALE),
        trials=str(trials or defaults["trials"].default).ljust(21),
        code=f"{'' if trust_task_code else '# '}trust_task_code: true",
        include_path=f"[{', '.join(map(_flow_yaml, include_path))}]",
        tasks="\n".join(f"    - {{task: {_flow_yaml(name)}, weight: 1.0}}" for name in names),
        task=_flow_yaml(names[0]),
        available=available,
        **items.model_dump(),
    )
    write(file, text)
    load_study(file)
    return notes


def _tokenizer(models: Sequence[str]) -> str:
    """Return the line on the vocabulary, active if local models differ in their number of rows."""
    comment = "vocabulary of every candidate; default: the base's"
    if not all(map(is_local, models)):
        return f"# tokenizer: {{source: union}}   # {comment}"
    checkpoints = [open_model(model) for model in models]
    names = [input_embedding(each.tensors) for each in checkpoints]
    rows = [each.tensors[n].shape[0] for each, n in zip(checkpoints, names, strict=True) if n]
    if len(set(rows)) < 2:
        return f"# tokenizer: {{source: union}}   # {comment}"
    counts = ", ".join(map(str, dict.fromkeys(rows)))
    return f"tokenizer: {{source: union}}   # or base: the models have {counts} rows of tokens"


def _flow_yaml(value: str) -> str:
    """Return a text as YAML writes it within a flow mapping."""
    return yaml.safe_dump([value], default_flow_style=True, width=10_000, allow_unicode=True)[1:-2]


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.expanduser().resolve(), folder.resolve())).as_posix()


def _model_name(model: str, folder: Path) -> str:
    """Return a model's path relative to the study's folder, or its hub id."""
    if found := find_folder(model):
        return _relative(found, folder)
    if "+" in model:
        return "+".join(_model_name(part, folder) for part in model.split("+"))
    # where there is a folder zoo, zoo/sotr is no hub id
    if not is_hub_id(model) or Path(model).parent.is_dir():
        raise StudyError(f"--base, --models: {model!r}: no such folder, and no hub id (org/name)")
    return model


def _find_task(task: str, folder: Path, write: Write) -> tuple[str, Path | None]:
    """Return a task's name, and the folder of its file; None where it is lm-eval's own.

    The file of a JSONL file's task is written.
    """
    path = Path(os.path.expanduser(task))  # pathlib's raises for an unknown user's home
    if path.suffix not in (".jsonl", ".yaml"):
        if path.exists():
            raise StudyError(
                f"--tasks: {task} is not a task; give a name that lm-eval knows, a task's "
                ".yaml file or a .jsonl file of questions"
            )
        return task, None
    if not is_there(path, "name a file"):
        raise StudyError(f"--tasks: no file {task}; check the path")
    if path.suffix == ".yaml":
        from objectives.harness.task_index import name_in

        return name_in(path), path.parent
    name = re.sub(r"\W+", "_", path.stem)
    file = folder / TASKS / f"{name}.yaml"
    write(file, task_yaml(name, path, file.parent))
    return name, file.parent


def _count_items(
    names: Sequence[str], include_path: Sequence[Path], *, trust_task_code: bool
) -> tuple[list[str], ItemCounts, str]:
    """Return notes, the items of each split, and a comment on how many items there are.

    Where the tasks have fewer items than the default, search and select get a fifth of them each,
    test two fifths, and what is left are items to tune weights on.
    """
    from objectives.harness.tasks import load_tasks

    wanted = ItemCounts()
    try:
        tasks = load_tasks(
            [TaskEntry(task=name) for name in names],
            include_path,
            trust_task_code=trust_task_code,
            cache=default_folder(),
        )
    except ObjectiveError as error:
        if not isinstance(error.__cause__, ConnectionError):
            raise
        return [f"{error}; the study has the default number of items"], wanted, "not counted yet"
    count = len({item.key for task in tasks for item in task.items})
    if count < _FEWEST:
        raise StudyError(
            f"--tasks: {', '.join(names)} have {count} different questions; give {_FEWEST} or more"
        )
    if count < wanted.search + wanted.select + wanted.test:
        fifth = max(1, count // 5)
        test = max(1, min(2 * fifth, count - 2 * fifth))
        wanted = ItemCounts(search=fifth, select=fifth, test=test)
    return [], wanted, f"of the {count} there are"
