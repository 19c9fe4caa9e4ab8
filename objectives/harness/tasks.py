"""lm-eval's tasks, found and loaded: their items and metrics, all that needs no model.

Nothing here imports transformers, which takes seconds: what is wrong with a task is said before.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]  # published without types
import numpy as np
import torch
import yaml
from jinja2 import UndefinedError
from lm_eval.api.metrics import bits_per_byte, mean, weighted_perplexity
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from objectives.base import Item, ObjectiveError, objective_errors
from objectives.entries import PromptEntry, TaskEntry, TextEntry
from objectives.harness.quiet import quiet
from objectives.harness.task_index import LM_EVAL_TASKS, find_registered, named_by, registered_names

PROMPTS = "prompt"  # name of the task that prompts make
PREFERRED_METRICS = ("acc", "exact_match")

# Aggregations of (log-likelihood, bytes or words) per item. An item's value is then
# exp(log-likelihood per unit): a probability, so higher is better and its range is [0, 1].
PER_UNIT = (weighted_perplexity, bits_per_byte)


@dataclass(frozen=True)
class Metric:
    """How one task's answers become one number per item."""

    name: str
    filter: Any  # lm-eval's FilterEnsemble: model output to answer
    aggregation: Any  # lm-eval's function of all items' metrics


class TaskRandomState:
    """The global random generators as a task's code finds them, from one piece of it to the next.

    They begin with ``simple_evaluate``'s default seeds; everybody else's are left as found.
    """

    def __init__(self) -> None:
        # data preparation in task files draws from these generators, the old numpy one too
        self._states: tuple[Any, ...] | None = None

    @contextlib.contextmanager
    def thrown(self) -> Iterator[None]:
        """Let a task's code draw from them."""
        others = _random_states()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            if self._states is None:
                random.seed(0)
                np.random.seed(1234)  # noqa: NPY002
                torch.manual_seed(1234)
            else:
                _set_random_states(self._states)
            try:
                yield
            finally:
                self._states = _random_states()
                _set_random_states(others)


def _random_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def _set_random_states(states: tuple[Any, ...]) -> None:
    python, numpy, of_torch = states
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(of_torch)


@dataclass(frozen=True)
class LoadedTask:
    """A task with its data.

    Attributes:
        name: Its own.
        task: lm-eval's.
        metric: The one that is used.
        weight: In the study's mean.
        items: One for each document of its evaluation split.
        dice: What building its prompts draws from.
    """

    name: str
    task: Task
    metric: Metric
    weight: float
    items: tuple[Item, ...]
    dice: TaskRandomState


class _BesideItsYaml(TaskFactory):  # type: ignore[misc]  # lm-eval is published without types
    """Builds tasks as if started in the folder of their YAML, where their files are."""

    def __init__(self, *, unsafe_code: bool) -> None:
        super().__init__()
        self._unsafe_code = unsafe_code

    def build(self, entry: Entry, **settings: Any) -> Any:
        with _inside_folder_of(entry):
            return super().build(entry, **settings)

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Task:
        if (entry.cfg or {}).get("unsafe_code") and not self._unsafe_code:
            raise _unsafe(entry.name)
        where = f"task {entry.name!r} ({entry.yaml_path})"
        with _inside_folder_of(entry), objective_errors(f"{where} could not be loaded"):
            try:
                return super()._build_task(entry, overrides)
            except datasets.exceptions.DatasetGenerationError as error:
                raise ObjectiveError(
                    f"{where}: {_broken_line(entry) or error.__cause__}"
                ) from error
            except UndefinedError as error:
                raise ObjectiveError(
                    f"{where}: {error}; correct it, or give the rows of its data that field"
                ) from error
            except (FileNotFoundError, ConnectionError) as error:
                raise ObjectiveError(
                    f"{where}: its data was not found: {error}; check dataset_path and "
                    "data_files, which are relative to that YAML"
                ) from error


def _broken_line(entry: Entry) -> str | None:
    """The first line of a task's JSONL files that is no JSON; the reader of data names none."""
    files = ((entry.cfg or {}).get("dataset_kwargs") or {}).get("data_files") or {}
    for file in files.values() if isinstance(files, dict) else ():
        if isinstance(file, str) and file.endswith(".jsonl"):
            lines = Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
            for number, line in enumerate(lines, start=1):
                try:
                    json.loads(line or "{}")
                except ValueError as error:
                    return f"{Path(file).absolute()}:{number}: no JSON: {error}; mend it"
    return None


def _inside_folder_of(entry: Entry) -> contextlib.AbstractContextManager[None]:
    # lm-eval's own YAMLs have no files, and folder names there can be taken for data sets
    if entry.yaml_path is None or entry.yaml_path.is_relative_to(LM_EVAL_TASKS):
        return contextlib.nullcontext()
    return contextlib.chdir(entry.yaml_path.parent)


def task_manager(
    names: Sequence[str], include_path: Sequence[Path], *, unsafe_code: bool
) -> TaskManager:
    """Index the given folders, and of lm-eval's own tasks those that the names stand for.

    Args:
        names: Tasks, groups and tags that have to be there.
        include_path: Folders with task YAMLs; their names come before lm-eval's.
        unsafe_code: Tasks that run code a model wrote may be built.

    Raises:
        ObjectiveError: A name is in neither.
    """
    folders = [folder.resolve() for folder in include_path]
    manager = TaskManager(include_defaults=False, include_path=folders)
    wanted = {*names, *(name for entry in manager.task_index.values() for name in named_by(entry))}
    if missing := wanted - manager.task_index.keys():
        for name, entry in find_registered(missing).items():
            manager.task_index.setdefault(name, entry)
    for name in _missing(names, manager):
        raise _unknown_task(name, [*manager.all_tasks, *registered_names()], folders)
    manager._factory = _BesideItsYaml(unsafe_code=unsafe_code)
    return manager


def _missing(names: Iterable[object], manager: TaskManager) -> Iterator[str]:
    """The names not in the index, those a group lists included."""
    for name in names:
        if not isinstance(name, str):  # a task defined inside its group
            continue
        if (entry := manager.task_index.get(name)) is None:
            yield name
        elif entry.kind is Kind.GROUP and isinstance(entry.cfg.get("task"), list):
            yield from _missing(entry.cfg["task"], manager)


def _unknown_task(name: str, known: Sequence[str], folders: Sequence[Path]) -> ObjectiveError:
    close = difflib.get_close_matches(name, known)
    searched = ", ".join([*map(str, folders), "lm-eval's own tasks"])
    unread = [path for folder in folders for path in sorted(folder.rglob("*.yaml")) if _bad(path)]
    fixes = [f"did you mean {' or '.join(map(repr, close))}?"] if close else []
    fixes += [f"{path} cannot be read: mend it" for path in unread]
    return ObjectiveError(
        f"no task {name!r} in {searched}; {'; '.join(fixes) or 'check its spelling'}"
    )


def _bad(path: Path) -> bool:
    """Whether lm-eval's index passed over this file without a word."""
    try:
        load_yaml(path, resolve_func=False)
    except (OSError, ValueError, yaml.YAMLError):
        return True
    return False


def name_in(file: Path) -> str:
    """The name of the task or group that a YAML file defines.

    Raises:
        ObjectiveError: It defines none.
    """
    try:
        config = load_yaml(file, resolve_func=False)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ObjectiveError(f"{file}: no task file: {' '.join(str(error).split())}") from None
    for kind in ("task", "group"):
        if isinstance(name := config.get(kind), str):
            return name
    raise ObjectiveError(f"{file}: no task file of lm-eval; it needs a line like 'task: name'")


def load_tasks(
    entries: Sequence[TaskEntry | TextEntry],
    include_path: Sequence[Path] = (),
    *,
    unsafe_code: bool = False,
) -> list[LoadedTask]:
    """Find and load a study's tasks, and check of them what can be checked without a model.

    Global random states are left as found.

    Args:
        entries: The study's tasks; each leaf task may occur once.
        include_path: Folders with task YAMLs, searched before lm-eval's own tasks. A task's
            relative files are looked for beside its YAML.
        unsafe_code: Tasks that run code the model wrote are let through; they run it here.

    Raises:
        ObjectiveError: A task, metric, folder or data file is unknown or not usable.
    """
    if not entries:
        raise ObjectiveError("tasks: the list is empty; name one or more")
    for folder in include_path:
        if not folder.is_dir():
            raise ObjectiveError(f"include_path: {folder} is not a folder; check the path")
    loaded: dict[str, LoadedTask] = {}
    with quiet(logging.WARNING):
        names = [entry.task for entry in entries if isinstance(entry, TaskEntry)]
        manager = task_manager(names, include_path, unsafe_code=unsafe_code)
        for entry in entries:
            dice = TaskRandomState()
            with dice.thrown():
                tasks = _load(entry, manager)
            if twice := loaded.keys() & tasks.keys():
                raise ObjectiveError(
                    f"task {min(twice)!r} is listed twice; give each task one entry"
                )
            for name, task in tasks.items():
                weight = entry.weight / len(tasks)
                wanted = entry if isinstance(entry, TaskEntry) else TaskEntry(task=name)
                metric = _prepared(name, task, wanted)
                loaded[name] = LoadedTask(name, task, metric, weight, _items(name, task), dice)
    return list(loaded.values())


def load_prompts(entry: PromptEntry) -> LoadedTask:
    """Return prompts as a task named "prompt"; see ``load_tasks``."""
    dice = TaskRandomState()
    with quiet(logging.WARNING), dice.thrown():
        task = ConfigurableTask(config=_prompt_task(entry))
    metric = _prepared(PROMPTS, task, TaskEntry(task=PROMPTS))
    return LoadedTask(PROMPTS, task, metric, 1.0, _items(PROMPTS, task), dice)


def _prepared(name: str, task: Task, wanted: TaskEntry) -> Metric:
    """Give a task its settings, and refuse one that cannot be asked or compared."""
    if getattr(task, "MULTIMODAL", False):
        raise ObjectiveError(f"task {name!r} needs more than text; leave it out")
    own = task.get_config("num_fewshot")
    if wanted.num_fewshot is not None and own == 0 != wanted.num_fewshot:
        raise ObjectiveError(  # lm-eval would keep the 0 and say nothing
            f"task {name!r}: num_fewshot is {wanted.num_fewshot} but the task itself fixes 0; "
            "leave num_fewshot out"
        )
    task.set_config("num_fewshot", own or 0 if wanted.num_fewshot is None else wanted.num_fewshot)
    task.set_fewshot_seed(1234)
    if _is_written(task):
        check_greedy(name, normalize_gen_kwargs(task.get_config("generation_kwargs") or {}))
    return _choose_metric(f"task {name!r}", task, wanted.metric)


def check_greedy(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings of lm-eval with which a task's answers are drawn at random.

    Raises:
        ObjectiveError: They are.
    """
    if settings["do_sample"]:
        raise ObjectiveError(
            f"task {name!r}: its answers are sampled, so a score would be luck; "
            "set do_sample: false in its generation_kwargs"
        )


def _is_written(task: Task) -> bool:
    """Whether the model writes the answers, instead of predicting given ones."""
    return bool(task.OUTPUT_TYPE == "generate_until")


def _items(name: str, task: Task) -> tuple[Item, ...]:
    """The task's items, as the splits see them."""
    with (
        objective_errors(f"task {name!r}: its items could not be read"),
        TaskRandomState().thrown(),
    ):
        return tuple(
            Item(name, _content_key(task, document), row, generated=_is_written(task))
            for row, document in enumerate(task.eval_docs)
        )


def _load(entry: TaskEntry | TextEntry, manager: TaskManager) -> dict[str, Task]:
    if isinstance(entry, TextEntry):
        with objective_errors(f"task {entry.name!r} could not be loaded"):
            return {entry.name: ConfigurableTask(config=_text_task(entry))}
    tasks: dict[str, Task] = manager.load([entry.task])["tasks"]
    for name, task in tasks.items():
        # a Python task may say so only once it is there
        if getattr(task, "UNSAFE_CODE", False) and not manager._factory._unsafe_code:
            raise _unsafe(name)
    if not tasks:
        raise ObjectiveError(f"task {entry.task!r} is a group without tasks; leave it out")
    return tasks


def _text_task(entry: TextEntry) -> dict[str, Any]:
    """lm-eval's own configuration of a perplexity task."""
    return {
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


def _prompt_task(entry: PromptEntry) -> dict[str, Any]:
    """lm-eval's own configuration of a generation task."""
    rows = [{"prompt": prompt} for prompt in entry.prompts]
    return {
        "task": PROMPTS,
        "custom_dataset": lambda: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "",
        "generation_kwargs": {"until": [], "max_gen_toks": entry.max_tokens, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def _not_blank(documents: datasets.Dataset) -> datasets.Dataset:
    return documents.filter(lambda document: bool(document["text"].strip()))


def _unsafe(name: str) -> ObjectiveError:
    return ObjectiveError(
        f"task {name!r} runs code the model writes, and merged models are untrusted; leave it "
        "out, or set unsafe_code: true on a machine that may be harmed"
    )


def _choose_metric(where: str, task: Task, wanted: str | None) -> Metric:
    """The metric to use and its filter; ``TaskEntry.metric`` has the rule."""
    name, _, filter_name = (wanted or "").partition(",")
    refused = {metric: _why_not(task, metric) for metric in task.aggregation()}
    usable = [metric for metric, reason in refused.items() if reason is None]
    listed = f"usable: {', '.join(usable) or 'none'}"
    if name and name not in refused:
        raise ObjectiveError(f"{where} has no metric {name!r}; {listed}")
    if name and refused[name]:
        raise ObjectiveError(f"{where}: metric {name!r} {refused[name]}; {listed}")
    if not usable:
        reasons = ", ".join(f"{metric!r} {reason}" for metric, reason in refused.items())
        raise ObjectiveError(f"{where} has no usable metric ({reasons}); leave it out")
    preferred = [metric for metric in PREFERRED_METRICS if metric in usable]
    filters = {ensemble.name: ensemble for ensemble in task._filters}
    if filter_name and filter_name not in filters:
        raise ObjectiveError(f"{where} has no filter {filter_name!r}; it has {', '.join(filters)}")
    chosen = name or (preferred or usable)[0]
    ensemble = filters[filter_name or next(iter(filters))]
    return Metric(chosen, ensemble, task.aggregation()[chosen])


def _why_not(task: Task, metric: str) -> str | None:
    """Why a metric cannot be compared item by item, or None if it can.

    Only where the task's score is the plain mean over its items does a value per item mean what
    the task means: f1 or bleu exist for the whole set alone. Perplexities per byte or word are
    taken item by item instead; see ``PER_UNIT``.
    """
    if task.aggregation()[metric] in PER_UNIT:
        return None
    if task.aggregation()[metric] is not mean:
        return "is not a mean of one number per item"
    if not task.higher_is_better().get(metric, True):
        return "is better when lower"
    return None


def digest(text: str) -> str:
    """A hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _content_key(task: Task, doc: Mapping[str, Any]) -> str:
    """Hash what is asked and what is right, without the examples shown before it.

    The examples are drawn at random, so with them a document that occurs twice would look like
    two.
    """
    choices = task.doc_to_choice(doc) if task.get_config("doc_to_choice") is not None else None
    content = [task.doc_to_text(doc), choices, task.doc_to_target(doc)]
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)
    return digest(text)
