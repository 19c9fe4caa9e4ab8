"""lm-eval's tasks: found, loaded, and their whole split's prompts built at once."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import json
import logging
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from objectives.base import Item, ObjectiveError

_LOG = logging.getLogger(__name__)

PREFERRED_METRICS = ("acc", "exact_match")

_LM_EVAL_TASKS = Path(importlib.import_module("lm_eval.tasks").__path__[0])


@dataclass(frozen=True)
class TaskSpec:
    """One entry of a study's task list.

    Attributes:
        task: Name of an lm-eval task, group or tag.
        metric: The metric, or ``"metric,filter"``. None takes the task's only usable metric, or
            of several ``acc``, else ``exact_match``, else the first the task lists. Without a
            filter, the task's first filter is meant.
        weight: In the study's mean, of any scale; a group's or tag's is divided equally over its
            tasks.
        num_fewshot: Examples in the prompt; None keeps the task's own number.
    """

    task: str
    metric: str | None = None
    weight: float = 1.0
    num_fewshot: int | None = None


@dataclass(frozen=True)
class Metric:
    """How one task's answers become one number per item."""

    name: str
    filter: Any  # lm-eval's FilterEnsemble: model output to answer


@dataclass(frozen=True)
class Question:
    """One document of one task: the requests made for it, and how they are judged."""

    task: Task
    metric: Metric
    requests: tuple[Instance, ...]

    @property
    def where(self) -> str:
        """What an error names it by."""
        return f"task {name_of(self.task)!r}, doc {self.requests[0].doc_id}"


class _BesideItsYaml(TaskFactory):  # type: ignore[misc]  # lm-eval is published without types
    """Builds tasks as if started in the folder of their YAML, where their files are."""

    def build(self, entry: Entry, **settings: Any) -> Any:
        with _inside_folder_of(entry):
            return super().build(entry, **settings)

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Task:
        if (entry.cfg or {}).get("unsafe_code"):
            raise _unsafe(entry.name)
        where = f"task {entry.name!r} ({entry.yaml_path})"
        with _inside_folder_of(entry), reported(f"{where} could not be loaded"):
            try:
                return super()._build_task(entry, overrides)
            except (FileNotFoundError, ConnectionError) as error:
                raise ObjectiveError(
                    f"{where}: its data was not found: {error}; check dataset_path and "
                    "data_files, which are relative to that YAML"
                ) from error


def _inside_folder_of(entry: Entry) -> contextlib.AbstractContextManager[None]:
    # lm-eval's own YAMLs have no files, and folder names there can be taken for data sets
    if entry.yaml_path is None or entry.yaml_path.is_relative_to(_LM_EVAL_TASKS):
        return contextlib.nullcontext()
    return contextlib.chdir(entry.yaml_path.parent)


def check_specs(specs: Sequence[TaskSpec], include_path: Sequence[Path]) -> None:
    """Refuse what no task manager has to be asked about."""
    if not specs:
        raise ObjectiveError("tasks: the list is empty; name one or more")
    for spec in specs:
        if not 0 < spec.weight < math.inf:
            raise ObjectiveError(
                f"task {spec.task!r}: weight is {spec.weight}; make it a positive number"
            )
    for folder in include_path:
        if not folder.is_dir():
            raise ObjectiveError(f"include_path: {folder} is not a folder")


def task_manager(names: Sequence[str], include_path: Sequence[Path]) -> TaskManager:
    """Index the given folders, and lm-eval's 14,000 files only for a name not found in them.

    Raises:
        ObjectiveError: A name is in neither.
    """
    folders = [folder.resolve() for folder in include_path]
    manager = TaskManager(include_defaults=False, include_path=folders)
    if any(_missing(names, manager)):
        manager = TaskManager(include_defaults=True, include_path=folders)
    for name in _missing(names, manager):
        raise _unknown_task(name, manager.all_tasks, folders)
    manager._factory = _BesideItsYaml()
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
    meant = f"did you mean {' or '.join(map(repr, close))}?" if close else "check its spelling"
    searched = ", ".join([*map(str, folders), "lm-eval's own tasks"])
    unread = [path for folder in folders for path in sorted(folder.rglob("*.yaml")) if _bad(path)]
    unread_note = f" (could not read {', '.join(map(str, unread))})" if unread else ""
    return ObjectiveError(f"no task {name!r} in {searched}{unread_note}; {meant}")


def _bad(path: Path) -> bool:
    """Whether lm-eval's index passed over this file without a word."""
    try:
        load_yaml(path, resolve_func=False)
    except (OSError, ValueError, yaml.YAMLError):
        return True
    return False


def build_questions(
    spec: TaskSpec, manager: TaskManager, language_model: HFLM, apply_chat_template: bool
) -> dict[str, list[Question]]:
    """Load the tasks a name stands for and build all their questions, by task name."""
    questions = {}
    with _seeded():
        for name, task in manager.load([spec.task])["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise _unsafe(name)
            if getattr(task, "MULTIMODAL", False):
                raise ObjectiveError(f"task {name!r} needs more than text; leave it out")
            metric = _choose_metric(task, spec.metric)
            _build_requests(task, spec.num_fewshot, language_model, apply_chat_template)
            by_doc: dict[int, list[Instance]] = defaultdict(list)
            for request in sorted(task.instances, key=lambda request: request.idx):
                by_doc[cast("int", request.doc_id)].append(request)
            questions[name] = [
                Question(task, metric, tuple(by_doc[doc_id])) for doc_id in sorted(by_doc)
            ]
    if not questions:
        raise ObjectiveError(f"task {spec.task!r} is a group without tasks; leave it out")
    return questions


def name_of(task: Task) -> str:
    """The task's own name."""
    return str(task.get_config("task"))  # task.task_name would draw from the global random state


def _unsafe(name: str) -> ObjectiveError:
    return ObjectiveError(
        f"task {name!r} runs code the model writes, and merged models are untrusted; leave it out"
    )


def _choose_metric(task: Task, wanted: str | None) -> Metric:
    """The metric to use and its filter; ``TaskSpec.metric`` has the rule."""
    name, _, filter_name = (wanted or "").partition(",")
    refused = {metric: _why_not(task, metric) for metric in task.aggregation()}
    usable = [metric for metric, reason in refused.items() if reason is None]
    listed = f"usable: {', '.join(usable) or 'none'}"
    where = f"task {name_of(task)!r}"
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
    return Metric(name or (preferred or usable)[0], filters[filter_name or next(iter(filters))])


def _why_not(task: Task, metric: str) -> str | None:
    """Why a metric cannot be compared item by item, or None if it can.

    Only where the task's score is the plain mean over its items does a value per item mean what
    the task means: f1, perplexity or bleu exist for the whole set alone.
    """
    if task.aggregation()[metric] is not mean:
        return "is not a mean of one number per item"
    if not task.higher_is_better().get(metric, True):
        return "is better when lower"
    return None


def _build_requests(
    task: Task, num_fewshot: int | None, language_model: HFLM, apply_chat_template: bool
) -> None:
    """Build the requests of the task's whole split, as ``simple_evaluate`` does."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own == 0 != num_fewshot:
        raise ObjectiveError(  # lm-eval would keep the 0 and say nothing
            f"task {name_of(task)!r}: num_fewshot is {num_fewshot} but the task itself fixes 0; "
            "leave num_fewshot out"
        )
    task.set_config("num_fewshot", num_fewshot if num_fewshot is not None else own or 0)
    task.set_fewshot_seed(1234)
    with reported(f"task {name_of(task)!r}: its prompts could not be built"):
        task.build_all_requests(
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=True,
            chat_template=language_model.apply_chat_template if apply_chat_template else None,
            tokenizer_name=language_model.tokenizer_name if apply_chat_template else "",
        )


def check_requests(name: str, questions: Sequence[Question], language_model: HFLM) -> None:
    """Refuse what lm-eval would fail on in mid-study; say once what it would repeat each time."""
    requests = [request for question in questions for request in question.requests]
    room = language_model.max_length
    for request in requests:
        if request.request_type != "generate_until":
            continue
        settings = normalize_gen_kwargs(request.args[1], language_model.max_gen_toks)
        if settings["do_sample"]:
            raise ObjectiveError(
                f"task {name!r}: its answers are sampled, so a score would be luck; "
                "set do_sample: false in its generation_kwargs"
            )
        if settings["max_gen_toks"] >= room:
            raise ObjectiveError(
                f"task {name!r}: max_gen_toks is {settings['max_gen_toks']} but the model "
                f"holds {room} tokens; set a smaller max_gen_toks"
            )
    if cut := sum(_is_cut(request, language_model) for request in requests):
        _LOG.warning(
            "task %r: %d of %d prompts do not fit in %d tokens and lose their beginning",
            *(name, cut, len(requests), room),
        )


def _is_cut(request: Instance, language_model: HFLM) -> bool:
    """Whether lm-eval drops the first tokens of this prompt."""
    room: int = language_model.max_length
    if request.request_type == "loglikelihood":
        text = "".join(request.args)
        room += 1  # the last token of an answer is never fed to the model
    elif request.request_type == "generate_until":
        text, settings = request.args
        room -= normalize_gen_kwargs(settings, language_model.max_gen_toks)["max_gen_toks"]
    else:  # rolling: long texts are scored in windows
        return False
    return len(language_model.tok_encode(text)) > room


def item_of(question: Question) -> Item:
    """The question as the splits see it."""
    task, request = question.task, question.requests[0]
    return Item(name_of(task), _content_key(task, request.doc), cast("int", request.doc_id))


def _content_key(task: Task, doc: Mapping[str, Any]) -> str:
    """Hash what is asked and what is right, without the examples shown before it.

    The examples are drawn at random, so with them a document that occurs twice would look like
    two.
    """
    choices = task.doc_to_choice(doc) if task.get_config("doc_to_choice") is not None else None
    content = [task.doc_to_text(doc), choices, task.doc_to_target(doc)]
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def reported(where: str) -> Iterator[None]:
    """Blame a task's own file and code, which may raise anything, on the task."""
    try:
        yield
    except ObjectiveError:
        raise
    except Exception as error:
        raise ObjectiveError(f"{where}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """``simple_evaluate``'s default seeds inside, the caller's random states afterwards."""
    # data preparation in task files draws from these global generators, the old numpy one too
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(0)
        np.random.seed(1234)  # noqa: NPY002
        torch.manual_seed(1234)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
