"""Load lm-eval's tasks with their items and metrics: everything that needs no model.

Nothing here imports transformers, which takes seconds, so errors in tasks are reported before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]  # published without types
import numpy as np
import torch
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from objectives.base import Item, ObjectiveError, objective_errors, time_limit
from objectives.entries import PromptEntry, TaskEntry, TextEntry
from objectives.harness.metrics import Metric, choose_metric
from objectives.harness.quiet import quiet
from objectives.harness.task_code import sandbox_templates
from objectives.harness.task_factory import SafeTaskFactory
from objectives.harness.task_index import find_tasks

_LOG = logging.getLogger(__name__)
_DOCUMENT_SECONDS = 10.0  # for the templates of one row


class TaskRandomState:
    """Global random states of one task's code, kept between its calls.

    Task code draws from the global generators of Python, numpy and torch. The first state is that
    of ``simple_evaluate``'s default seeds.
    """

    def __init__(self) -> None:
        self._states: tuple[Any, ...] | None = None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Run a task's code with its own random states, then restore the previous ones."""
        others = _get_states()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            if self._states is None:
                random.seed(0)
                np.random.seed(1234)  # noqa: NPY002
                torch.manual_seed(1234)
            else:
                _set_states(self._states)
            try:
                yield
            finally:
                self._states = _get_states()
                _set_states(others)


def _get_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def _set_states(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])


@dataclass(frozen=True)
class LoadedTask:
    """A task of lm-eval with its data: one item per document of its evaluation split.

    Building its prompts draws from ``random_state``. ``sample`` is a long item as JSON: question,
    choices (null: none) and target: nine of ten are no longer.
    """

    name: str
    task: Task
    metric: Metric
    weight: float
    items: tuple[Item, ...]
    random_state: TaskRandomState
    sample: str


def load_tasks(
    entries: Sequence[TaskEntry | TextEntry],
    include_path: Sequence[Path] = (),
    *,
    unsafe_code: bool = False,
    trust_task_code: bool = False,
    cache: Path | None = None,
) -> list[LoadedTask]:
    """Load a study's tasks, with every check that needs no model, and leave random states alone.

    Args:
        entries: The study's tasks; each leaf task may occur once.
        include_path: Folders with task YAMLs, searched before lm-eval's own tasks. Relative data
            files are looked up in the folder of a task's YAML.
        unsafe_code: Allow tasks that run code the model wrote; they run it on this machine.
        trust_task_code: Allow task files outside lm-eval that bring Python code.
        cache: Folder that keeps lm-eval's index of task names between processes; None: no folder.

    Raises:
        ObjectiveError: A task, metric, folder or data file is unknown or not usable.
    """
    if not entries:
        raise ObjectiveError("tasks: the list is empty; name one or more")
    if unread := [each for each in include_path if not os.access(each / ".", os.R_OK | os.X_OK)]:
        raise ObjectiveError(
            f"include_path: {unread[0]} is not a folder that may be read; check the path"
        )
    loaded: dict[str, LoadedTask] = {}
    factory = SafeTaskFactory(unsafe_code=unsafe_code, trust_task_code=trust_task_code)
    sandbox_templates()
    with quiet(logging.WARNING):
        names = [entry.task for entry in entries if isinstance(entry, TaskEntry)]
        with objective_errors("objective.include_path: its task files could not be read"):
            manager = find_tasks(names, include_path, cache)
        for entry in entries:
            random_state = TaskRandomState()
            with random_state.active():
                if isinstance(entry, TextEntry):
                    tasks = {entry.name: _text_task(entry)}
                else:
                    tasks = _build_tasks(entry.task, factory, manager)
            if twice := loaded.keys() & tasks.keys():
                raise ObjectiveError(
                    f"task {min(twice)!r} is listed twice; give each task one entry"
                )
            for name, task in tasks.items():
                weight = entry.weight / len(tasks)
                settings = entry if isinstance(entry, TaskEntry) else TaskEntry(task=name)
                with objective_errors(f"task {name!r} cannot be used"):
                    loaded[name] = _prepare(name, task, settings, weight, random_state)
    return list(loaded.values())


def load_prompts(entry: PromptEntry) -> LoadedTask:
    """Return prompts as a task; its items are the prompts, in their order."""
    name, rows = "prompt", [{"prompt": prompt} for prompt in entry.prompts]
    config = {
        "task": name,
        "custom_dataset": lambda: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "",
        "generation_kwargs": {"until": [], "max_gen_toks": entry.max_tokens, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    random_state = TaskRandomState()
    with quiet(logging.WARNING):
        with random_state.active():
            task = ConfigurableTask(config=config)
        return _prepare(name, task, TaskEntry(task=name), 1.0, random_state)


def _text_task(entry: TextEntry) -> Task:
    config = {
        "task": entry.name,
        "dataset_path": "text",
        "dataset_kwargs": {
            "data_files": {"test": [str(file) for file in entry.text]},
            "sample_by": entry.unit,
        },
        "test_split": "test",
        "process_docs": _not_blank,
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    with objective_errors(f"task {entry.name!r} could not be loaded"):
        has_text = [_has_text(file) for file in entry.text]
        if not any(has_text):
            raise ObjectiveError(f"{entry.text[0]}: has no text; name a file with some")
        return ConfigurableTask(config=config)


def _has_text(file: Path) -> bool:
    """Return whether a file is not blank; refuse other bytes, of which datasets names no file."""
    with file.open(encoding="utf-8") as opened:
        try:
            return bool(opened.read().strip())
        except UnicodeDecodeError as error:
            raise ObjectiveError(f"{file}: not UTF-8 text: {error}; save it as UTF-8") from None


# Its source is part of the items' ``rules`` hash: a change refuses the runs made before it.
def _not_blank(documents: datasets.Dataset) -> datasets.Dataset:
    return documents.filter(lambda document: bool(document["text"].strip()))


def _build_tasks(name: str, factory: SafeTaskFactory, manager: TaskManager) -> dict[str, Task]:
    # Private, but reading a task's name draws from the global random generator: only lm-eval's
    # own ``load`` leaves the prompts drawn afterwards as they are in ``simple_evaluate``.
    manager._factory = factory
    with objective_errors(f"task {name!r} could not be loaded"):
        tasks: dict[str, Task] = manager.load([name])["tasks"]
    for leaf, task in tasks.items():
        # a task written in Python, or inside its group's file, has it on the built task alone
        factory.check_safe(leaf, getattr(task, "UNSAFE_CODE", False))
    if not tasks:
        raise ObjectiveError(f"task {name!r} is a group without tasks; leave it out")
    return tasks


def _prepare(
    name: str, task: Task, settings: TaskEntry, weight: float, random_state: TaskRandomState
) -> LoadedTask:
    """Apply an entry's settings to a task, and refuse one that cannot be evaluated."""
    if getattr(task, "MULTIMODAL", False):
        raise ObjectiveError(f"task {name!r} needs more than text; leave it out")
    shots, own = settings.num_fewshot, task.get_config("num_fewshot")
    if shots is not None and own == 0 != shots:
        raise ObjectiveError(  # lm-eval would silently keep the 0
            f"task {name!r}: num_fewshot is {shots} but the task itself fixes 0; "
            "leave num_fewshot out"
        )
    task.set_config("num_fewshot", own or 0 if shots is None else shots)
    task.set_fewshot_seed(1234)
    if generated := task.OUTPUT_TYPE == "generate_until":
        check_greedy(name, normalize_gen_kwargs(task.get_config("generation_kwargs") or {}))
    metric = choose_metric(name, task, settings.metric)
    with objective_errors(f"task {name!r}: its filter {metric.filter.name!r} cannot be used"):
        for make in metric.filter.filters:
            make()
    where = f"task {name!r}: its items could not be read"
    with objective_errors(where), TaskRandomState().active():
        contents = [_content(name, task, document) for document in task.eval_docs]
        _note_gaps(name, task)
    items = tuple(
        Item(name, digest(content), row, generated=generated)
        for row, content in enumerate(contents)
    )
    sample = next(iter(sorted(contents, key=len)[9 * len(contents) // 10 :]), "")
    return LoadedTask(name, task, metric, weight, items, random_state, sample)


def _note_gaps(name: str, task: Task) -> None:
    """Warn of rows of a JSON file that lack a field which others have: templates read None."""
    if task.get_config("dataset_path") != "json":
        return
    settings = ("doc_to_text", "doc_to_target", "doc_to_choice")
    used = {*re.findall(r"\w+", " ".join(str(task.get_config(key)) for key in settings))}
    rows = list(task.eval_docs)
    for field in sorted(used & {key for row in rows for key in row}):
        lacking = [number for number, row in enumerate(rows) if row.get(field) is None]
        if 0 < len(lacking) < len(rows):
            _LOG.warning(
                "task %r: %d of %d rows have no %r, which is then None in its prompts; the first "
                "is row %d, counted from 0",
                *(name, len(lacking), len(rows), field, lacking[0]),
            )


def check_greedy(name: str, settings: Mapping[str, Any]) -> None:
    """Raise an ``ObjectiveError`` for generation settings that sample, or stop at no text."""
    if odd := [text for text in settings["until"] if not isinstance(text, str)]:
        raise ObjectiveError(
            f"task {name!r}: until is {odd[0]!r}; write a text or a list of texts in its "
            "generation_kwargs"
        )
    if settings["do_sample"]:
        raise ObjectiveError(
            f"task {name!r}: its answers are sampled, so a score would be luck; "
            "set do_sample: false in its generation_kwargs"
        )


def _content(name: str, task: Task, doc: Mapping[str, Any]) -> str:
    """Return a document's question, choices and target as JSON, without few-shot examples.

    Those are drawn at random, and of a document that occurs twice the text has to be the same.
    """
    has_choices = task.get_config("doc_to_choice") is not None
    with time_limit(_DOCUMENT_SECONDS, f"task {name!r}: the prompt of a row"):
        choices = task.doc_to_choice(doc) if has_choices else None
        content = [task.doc_to_text(doc), choices, task.doc_to_target(doc)]
    return json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)


def digest(text: str) -> str:
    """Return the SHA-256 of a text as hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()
