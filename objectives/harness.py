"""lm-eval's tasks, loaded once, asked of one live model item by item.

``simple_evaluate`` loads tasks, builds prompts and wraps a model on every call. Here that happens
once, in ``Harness.prepare``; ``score`` only asks the model, and gives lm-eval's own values, item
for item. Three things make that hold:

* prompts of the whole split are built at once, with ``simple_evaluate``'s seeds, because the
  few-shot sampler is one random stream: building a subset would change everybody's examples;
* answers are cleared before each call, because lm-eval appends to them and reads the first;
* decoding settings a model ships with (a repetition penalty, say) are set aside while it
  generates, because they would change greedy answers; its end-of-text tokens are kept.

No cache of lm-eval's is used: they are keyed by prompt, and here the weights change under them.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import importlib
import json
import logging
import math
import numbers
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets  # type: ignore[import-untyped]  # published without types
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
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from objectives.base import Item, ObjectiveError
from objectives.fast import FastHFLM

_LOG = logging.getLogger(__name__)

PREFERRED_METRICS = ("acc", "exact_match")

_LM_EVAL_TASKS = Path(importlib.import_module("lm_eval.tasks").__path__[0])
_WITH_PROGRESS_BARS = ("lm_eval.api.task", "lm_eval.api.model", "lm_eval.models.huggingface")


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
class _Metric:
    """How one task's answers become one number per item."""

    name: str
    filter: Any  # lm-eval's FilterEnsemble: model output to answer


@dataclass(frozen=True)
class _Question:
    """One document of one task: the requests made for it, and how they are judged."""

    task: Task
    metric: _Metric
    requests: tuple[Instance, ...]

    @property
    def where(self) -> str:
        return f"task {_name(self.task)!r}, doc {self.requests[0].doc_id}"


class Harness:
    """An objective made of lm-eval tasks, for one live model. Made by ``Harness.prepare``."""

    def __init__(
        self, tasks: Mapping[str, float], questions: Sequence[_Question], language_model: HFLM
    ) -> None:
        self.tasks = tasks
        self.items: Sequence[Item] = tuple(map(_item, questions))
        self._questions = questions
        self._language_model = language_model

    @classmethod
    def prepare(  # noqa: PLR0913  # the study file's own settings, each by name
        cls,
        specs: Sequence[TaskSpec],
        *,
        include_path: Sequence[Path] = (),
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 32,
        apply_chat_template: bool = False,
        max_length: int | None = None,
    ) -> Harness:
        """Load the tasks, build every prompt and wrap the model, once for the whole study.

        Global random states are left as found. The model is put in evaluation mode; do this
        before writing weights into it, because lm-eval ties what its config says is tied.

        Args:
            specs: The study's tasks; each leaf task may occur once.
            include_path: Folders with task YAMLs, searched before lm-eval's own tasks. A task's
                relative files are looked for beside its YAML.
            model: The live model every later ``score`` is given.
            tokenizer: Its tokenizer; copied, so that lm-eval's padding token stays ours.
            batch_size: Sequences per forward pass.
            apply_chat_template: Ask through the tokenizer's chat template.
            max_length: Tokens of prompt and answer together, longer ones lose their beginning;
                None takes the model's.

        Raises:
            ObjectiveError: A task, metric, folder or data file is unknown or not usable.
        """
        _check_specs(specs, include_path)
        _check_model(model, tokenizer, batch_size, apply_chat_template)
        with _quiet(logging.ERROR):  # it warns that a model object is not a path
            language_model = FastHFLM(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),
                batch_size=batch_size,
                max_length=max_length,
            )
        weights: dict[str, float] = {}
        questions: list[_Question] = []
        with _quiet(logging.WARNING):
            manager = _task_manager([spec.task for spec in specs], include_path)
            for spec in specs:
                by_task = _questions(spec, manager, language_model, apply_chat_template)
                for name, of_task in by_task.items():
                    if name in weights:
                        raise ObjectiveError(
                            f"task {name!r} is listed twice; give each task one entry"
                        )
                    weights[name] = spec.weight / len(by_task)
                    questions += of_task
                    _check_requests(name, of_task, language_model)
        return cls(weights, tuple(questions), language_model)

    def score(self, model: nn.Module, items: Sequence[int]) -> list[float]:
        """Ask the model the numbered items; see ``Objective.score``.

        Raises:
            ObjectiveError: The model is another one or in training mode, a number is not an
                item's, or an answer is not a number.
        """
        if model is not self._language_model.model:
            raise ObjectiveError(
                "score: got another model than the one prepared; write weights into that one"
            )
        if model.training:
            raise ObjectiveError("score: the model is in training mode; call model.eval() first")
        for number in items:
            if not 0 <= number < len(self._questions):
                raise ObjectiveError(
                    f"score: item {number} does not exist; there are {len(self._questions)}"
                )
        wanted = {number: self._questions[number] for number in items}
        with _quiet(logging.ERROR), _plain_decoding(model):  # cut prompts were reported once
            self._answer(wanted.values())
        values = {number: _value(question) for number, question in wanted.items()}
        return [values[number] for number in items]

    def _answer(self, questions: Iterable[_Question]) -> None:
        """Put the model's output into the requests, then each task's filter over its own."""
        by_type: dict[str, list[Instance]] = defaultdict(list)
        by_task: dict[str, list[_Question]] = defaultdict(list)
        for question in questions:
            by_task[_name(question.task)].append(question)
            for request in question.requests:
                request.resps, request.filtered_resps = [], {}
                by_type[request.request_type] += [request] * (request.repeats or 1)
        for request_type, requests in by_type.items():
            responses = getattr(self._language_model, request_type)(requests, disable_tqdm=True)
            for request, response in zip(requests, responses, strict=True):
                request.resps.append(response)
        for of_task in by_task.values():
            of_task[0].metric.filter.apply([r for question in of_task for r in question.requests])


class _BesideItsYaml(TaskFactory):  # type: ignore[misc]  # lm-eval is published without types
    """Builds tasks as if started in the folder of their YAML, where their files are."""

    def build(self, entry: Entry, **settings: Any) -> Any:
        with _inside_folder_of(entry):
            return super().build(entry, **settings)

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Task:
        if (entry.cfg or {}).get("unsafe_code"):
            raise _unsafe(entry.name)
        where = f"task {entry.name!r} ({entry.yaml_path})"
        with _inside_folder_of(entry), _reported(f"{where} could not be loaded"):
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


def _check_specs(specs: Sequence[TaskSpec], include_path: Sequence[Path]) -> None:
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


def _check_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    apply_chat_template: bool,
) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ObjectiveError(f"got a {type(model).__name__}; lm-eval asks transformers models only")
    if batch_size < 1:
        raise ObjectiveError(f"batch_size is {batch_size}; make it 1 or more")
    if tokenizer.eos_token_id is None:
        raise ObjectiveError("the tokenizer has no end-of-text token; set its eos_token")
    if apply_chat_template and tokenizer.chat_template is None:
        raise ObjectiveError(
            "apply_chat_template is set but the tokenizer has no chat template; unset it"
        )


def _task_manager(names: Sequence[str], include_path: Sequence[Path]) -> TaskManager:
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


def _questions(
    spec: TaskSpec, manager: TaskManager, language_model: HFLM, apply_chat_template: bool
) -> dict[str, list[_Question]]:
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
                _Question(task, metric, tuple(by_doc[doc_id])) for doc_id in sorted(by_doc)
            ]
    if not questions:
        raise ObjectiveError(f"task {spec.task!r} is a group without tasks; leave it out")
    return questions


def _name(task: Task) -> str:
    return str(task.get_config("task"))  # task.task_name would draw from the global random state


def _unsafe(name: str) -> ObjectiveError:
    return ObjectiveError(
        f"task {name!r} runs code the model writes, and merged models are untrusted; leave it out"
    )


def _choose_metric(task: Task, wanted: str | None) -> _Metric:
    """The metric to use and its filter; ``TaskSpec.metric`` has the rule."""
    name, _, filter_name = (wanted or "").partition(",")
    refused = {metric: _why_not(task, metric) for metric in task.aggregation()}
    usable = [metric for metric, reason in refused.items() if reason is None]
    listed = f"usable: {', '.join(usable) or 'none'}"
    where = f"task {_name(task)!r}"
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
    return _Metric(name or (preferred or usable)[0], filters[filter_name or next(iter(filters))])


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
            f"task {_name(task)!r}: num_fewshot is {num_fewshot} but the task itself fixes 0; "
            "leave num_fewshot out"
        )
    task.set_config("num_fewshot", num_fewshot if num_fewshot is not None else own or 0)
    task.set_fewshot_seed(1234)
    with _reported(f"task {_name(task)!r}: its prompts could not be built"):
        task.build_all_requests(
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=True,
            chat_template=language_model.apply_chat_template if apply_chat_template else None,
            tokenizer_name=language_model.tokenizer_name if apply_chat_template else "",
        )


def _check_requests(name: str, questions: Sequence[_Question], language_model: HFLM) -> None:
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


def _item(question: _Question) -> Item:
    task, request = question.task, question.requests[0]
    return Item(_name(task), _content_key(task, request.doc), cast("int", request.doc_id))


def _content_key(task: Task, doc: Mapping[str, Any]) -> str:
    """Hash what is asked and what is right, without the examples shown before it.

    The examples are drawn at random, so with them a document that occurs twice would look like
    two.
    """
    choices = task.doc_to_choice(doc) if task.get_config("doc_to_choice") is not None else None
    content = [task.doc_to_text(doc), choices, task.doc_to_target(doc)]
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _value(question: _Question) -> float:
    """The task's own judgement of the answers now in the requests."""
    name = question.metric.name
    for request in question.requests:
        # a NaN wins every argmax, so a broken model would pass for one that answers "A"
        if request.request_type != "generate_until" and any(map(_has_nan, request.resps)):
            raise ObjectiveError(f"{question.where}: the model's log-likelihood is not a number")
    answers = [request.filtered_resps[question.metric.filter.name] for request in question.requests]
    with _reported(f"{question.where}: its answers could not be judged"):
        metrics = question.task.process_results(question.requests[0].doc, answers)
    value = metrics.get(name)
    if not isinstance(value, numbers.Real | np.bool_):
        raise ObjectiveError(
            f"{question.where}: {name!r} is {value!r}, not one number per item; "
            f"the task gives {', '.join(metrics)}"
        )
    if math.isnan(value):
        raise ObjectiveError(f"{question.where}: {name!r} is not a number (NaN)")
    return float(value)


def _has_nan(response: float | tuple[float, bool]) -> bool:
    return math.isnan(response[0] if isinstance(response, tuple) else response)


@contextlib.contextmanager
def _reported(where: str) -> Iterator[None]:
    """Blame a task's own file and code, which may raise anything, on the task."""
    try:
        yield
    except ObjectiveError:
        raise
    except Exception as error:
        raise ObjectiveError(f"{where}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _plain_decoding(model: nn.Module) -> Iterator[None]:
    """Set the model's decoding defaults aside, all but its special tokens."""
    own = model.generation_config
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    make = cast("Any", GenerationConfig)  # its constructor has no types
    plain = make(**{name: getattr(own, name, None) for name in tokens})
    model.generation_config = plain
    try:
        yield
    finally:
        model.generation_config = own


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


@contextlib.contextmanager
def _quiet(level: int) -> Iterator[None]:
    """Keep lm-eval's log at ``level`` and all progress bars off."""
    log = logging.getLogger("lm_eval")
    own_level = log.level
    modules: list[Any] = [importlib.import_module(name) for name in _WITH_PROGRESS_BARS]
    own_bars = [module.tqdm for module in modules]
    data_bars_shown = not datasets.are_progress_bars_disabled()
    log.setLevel(level)
    datasets.disable_progress_bars()
    for module in modules:  # some of lm-eval's bars have no switch
        module.tqdm = functools.partial(module.tqdm, disable=True)
    try:
        yield
    finally:
        log.setLevel(own_level)
        if data_bars_shown:
            datasets.enable_progress_bars()
        for module, bar in zip(modules, own_bars, strict=True):
            module.tqdm = bar
