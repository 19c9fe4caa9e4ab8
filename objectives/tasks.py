"""lm-eval's tasks: found, loaded, and their whole split's prompts built at once."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import inspect
import json
import logging
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import datasets  # type: ignore[import-untyped]  # published without types
import numpy as np
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import bits_per_byte, mean, weighted_perplexity
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from objectives.base import Item, ObjectiveError, Shown
from objectives.registered import LM_EVAL_TASKS, find_registered, named_by, registered_names

if TYPE_CHECKING:  # it imports all of transformers, which takes seconds
    from lm_eval.models.huggingface import HFLM

_LOG = logging.getLogger(__name__)

PREFERRED_METRICS = ("acc", "exact_match")

# Aggregations of (log-likelihood, bytes or words) per item. An item's value is then
# exp(log-likelihood per unit): a probability, so higher is better and its range is [0, 1].
PER_UNIT = (weighted_perplexity, bits_per_byte)

# Where a task's data is, which may change; what it says is compared item by item.
_WHEREABOUTS = ("metadata", "dataset_path", "dataset_name", "dataset_kwargs")


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
class TextSpec:
    """Texts to be predicted, as an entry of a study's task list.

    An item is worth its probability per byte, ``exp(log-likelihood / bytes)``: one over its byte
    perplexity. Longer texts than the model holds are scored in windows, as lm-eval does.

    Attributes:
        name: What the task is called.
        files: Plain UTF-8 text; blank items are left out.
        unit: What one item is: a whole file, a paragraph (blank lines between them) or a line.
        weight: In the study's mean, of any scale.
    """

    name: str
    files: tuple[Path, ...]
    unit: Literal["document", "paragraph", "line"] = "paragraph"
    weight: float = 1.0


@dataclass(frozen=True)
class PromptSpec:
    """Prompts to be continued greedily, as the only entry of a task list: nothing is right.

    Attributes:
        prompts: One or more.
        max_tokens: To be written for each at most.
        name: What the task is called.
        weight: Of no account.
    """

    prompts: tuple[str, ...]
    max_tokens: int
    name: str = "prompt"
    weight: float = 1.0


Spec = TaskSpec | TextSpec | PromptSpec


@dataclass(frozen=True)
class Prompting:
    """How every task of a study is asked.

    Attributes:
        apply_chat_template: Through the tokenizer's chat template.
        system_instruction: What a system prompt says, or, without a template, the text that
            every prompt begins with.
    """

    apply_chat_template: bool = False
    system_instruction: str | None = None


PLAIN = Prompting()


@dataclass(frozen=True)
class Metric:
    """How one task's answers become one number per item."""

    name: str
    filter: Any  # lm-eval's FilterEnsemble: model output to answer
    aggregation: Any  # lm-eval's function of all items' metrics


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

    @property
    def is_written(self) -> bool:
        """Whether the model writes its answer, instead of predicting given ones."""
        return bool(self.requests[0].request_type == "generate_until")


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
        with _inside_folder_of(entry), reported(f"{where} could not be loaded"):
            try:
                return super()._build_task(entry, overrides)
            except datasets.exceptions.DatasetGenerationError as error:
                raise ObjectiveError(
                    f"{where}: {_broken_line(entry) or error.__cause__}"
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


def check_specs(specs: Sequence[Spec], include_path: Sequence[Path]) -> None:
    """Refuse what no task manager has to be asked about."""
    if not specs:
        raise ObjectiveError("tasks: the list is empty; name one or more")
    for spec in specs:
        name = spec.task if isinstance(spec, TaskSpec) else spec.name
        if not 0 < spec.weight < math.inf:
            raise ObjectiveError(
                f"task {name!r}: weight is {spec.weight}; make it a positive number"
            )
    for folder in include_path:
        if not folder.is_dir():
            raise ObjectiveError(f"include_path: {folder} is not a folder; check the path")


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


def item_keys(spec: TaskSpec, manager: TaskManager) -> set[str]:
    """The keys of the items that a name stands for, found without a model."""
    keys: set[str] = set()
    for name, task in _load(spec, manager).items():
        with reported(f"task {name!r}: its items could not be read"):
            keys.update(_content_key(task, document) for document in task.eval_docs)
    return keys


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


def build_questions(
    spec: Spec, manager: TaskManager, language_model: HFLM, prompting: Prompting
) -> dict[str, list[Question]]:
    """Load the tasks a name stands for and build all their questions, by task name."""
    questions = {}
    with _seeded():
        for name, task in _load(spec, manager).items():
            if getattr(task, "MULTIMODAL", False):
                raise ObjectiveError(f"task {name!r} needs more than text; leave it out")
            wanted = spec if isinstance(spec, TaskSpec) else TaskSpec(name)
            metric = _choose_metric(task, wanted.metric)
            _build_requests(task, wanted.num_fewshot, language_model, prompting)
            by_doc: dict[int, list[Instance]] = defaultdict(list)
            for request in sorted(task.instances, key=lambda request: request.idx):
                by_doc[cast("int", request.doc_id)].append(request)
            questions[name] = [
                Question(task, metric, tuple(by_doc[doc_id])) for doc_id in sorted(by_doc)
            ]
    return questions


def _load(spec: Spec, manager: TaskManager) -> dict[str, Task]:
    if isinstance(spec, TaskSpec):
        tasks: dict[str, Task] = manager.load([spec.task])["tasks"]
        for name, task in tasks.items():
            # a Python task may say so only once it is there
            if getattr(task, "UNSAFE_CODE", False) and not manager._factory._unsafe_code:
                raise _unsafe(name)
        if not tasks:
            raise ObjectiveError(f"task {spec.task!r} is a group without tasks; leave it out")
        return tasks
    with reported(f"task {spec.name!r} could not be loaded"):
        config = _text_task(spec) if isinstance(spec, TextSpec) else _prompt_task(spec)
        return {spec.name: ConfigurableTask(config=config)}


def _text_task(spec: TextSpec) -> dict[str, Any]:
    """lm-eval's own configuration of a perplexity task."""
    return {
        "task": spec.name,
        "dataset_path": "text",
        "dataset_kwargs": {
            "data_files": {"test": [str(file) for file in spec.files]},
            "sample_by": spec.unit,
        },
        "test_split": "test",
        "process_docs": _not_blank,
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }


def _prompt_task(spec: PromptSpec) -> dict[str, Any]:
    """lm-eval's own configuration of a generation task."""
    rows = [{"prompt": prompt} for prompt in spec.prompts]
    return {
        "task": spec.name,
        "custom_dataset": lambda: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "",
        "generation_kwargs": {"until": [], "max_gen_toks": spec.max_tokens, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def _not_blank(documents: datasets.Dataset) -> datasets.Dataset:
    return documents.filter(lambda document: bool(document["text"].strip()))


def name_of(task: Task) -> str:
    """The task's own name."""
    return str(task.get_config("task"))  # task.task_name would draw from the global random state


def _unsafe(name: str) -> ObjectiveError:
    return ObjectiveError(
        f"task {name!r} runs code the model writes, and merged models are untrusted; leave it "
        "out, or set unsafe_code: true on a machine that may be harmed"
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


def _build_requests(
    task: Task, num_fewshot: int | None, language_model: HFLM, prompting: Prompting
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
        chat = prompting.apply_chat_template
        task.build_all_requests(
            system_instruction=prompting.system_instruction,
            apply_chat_template=chat,
            fewshot_as_multiturn=True,
            chat_template=language_model.apply_chat_template if chat else None,
            tokenizer_name=language_model.tokenizer_name if chat else "",
        )


def check_requests(name: str, questions: Sequence[Question], language_model: HFLM) -> None:
    """Refuse what lm-eval would fail on in mid-study.

    Raises:
        ObjectiveError: Answers are sampled, or leave no room for a prompt.
    """
    room = language_model.max_length
    for request in (request for question in questions for request in question.requests):
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


def shown(questions: Sequence[Question], language_model: HFLM) -> list[Shown]:
    """What a model is given for some questions; says once how many prompts lose their beginning.

    lm-eval would say so on each call, prompt by prompt.
    """
    rules: dict[str, str] = {}
    cut: Counter[str] = Counter()
    found = []
    for question in questions:
        name = name_of(question.task)
        if name not in rules:
            rules[name] = _rules(question)
        tokens = [_tokens(request, language_model) for request in question.requests]
        pairs = zip(question.requests, tokens, strict=True)
        cut[name] += any(_is_cut(request, each, language_model) for request, each in pairs)
        found.append(
            Shown(
                _prompt(question),
                _gold(question),
                _digest(json.dumps(tokens)),
                rules[name],
                reads=_reads(tokens),
                writes=max(_writes(request, language_model) for request in question.requests),
            )
        )
    for name, count in cut.items():
        if count:
            _LOG.warning(
                "task %r: %d of %d prompts do not fit in %d tokens and lose their beginning",
                *(name, count, sum(name_of(q.task) == name for q in questions)),
                language_model.max_length,
            )
    return found


def _tokens(request: Instance, language_model: HFLM) -> list[int]:
    """The tokens of prompt and answer, as lm-eval encodes them."""
    if request.request_type == "loglikelihood" and request.args[0]:
        prompt, answer = language_model._encode_pair(*request.args)
        return [*prompt, *answer]
    text = request.args[1 if request.request_type == "loglikelihood" else 0]
    return cast("list[int]", language_model.tok_encode(text))


def _reads(tokens: Sequence[list[int]]) -> int:
    """How many tokens a question's requests have, what they begin with alike counted once."""
    columns = enumerate(zip(*tokens, strict=False))
    shortest = min(map(len, tokens))
    alike = next((place for place, column in columns if len(set(column)) > 1), shortest)
    return sum(map(len, tokens)) - alike * (len(tokens) - 1)


def _writes(request: Instance, language_model: HFLM) -> int:
    """How many tokens a model may write for a request."""
    if request.request_type != "generate_until":
        return 0
    settings = normalize_gen_kwargs(request.args[1], language_model.max_gen_toks)
    return cast("int", settings["max_gen_toks"])


def _is_cut(request: Instance, tokens: Sequence[int], language_model: HFLM) -> bool:
    """Whether lm-eval drops the first tokens of this prompt."""
    room: int = language_model.max_length
    if request.request_type == "loglikelihood":
        room += 1  # the last token of an answer is never fed to the model
    elif request.request_type == "generate_until":
        room -= _writes(request, language_model)
    else:  # rolling: long texts are scored in windows
        return False
    return len(tokens) > room


def _prompt(question: Question) -> str:
    """The text of all its requests; of a choice, the prompt once and each answer to it."""
    parts: list[str] = []
    for request in question.requests:
        texts = [json.dumps(part) if isinstance(part, dict) else part for part in request.args]
        parts += [text for text in texts if text not in parts[:1]]
    return "\n".join(parts)


def _gold(question: Question) -> str:
    doc = question.requests[0].doc
    content = {"target": question.task.doc_to_target(doc), "row": doc}
    return json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)


def _rules(question: Question) -> str:
    """Hash of the task's file, the source of the functions it names, metric and filter."""
    task, metric = question.task, question.metric
    config = {key: value for key, value in task.dump_config().items() if key not in _WHEREABOUTS}
    rules = [config, metric.name, metric.filter.name]
    return _digest(json.dumps(rules, sort_keys=True, default=_source))


def _source(value: object) -> str:
    """A function's source, or what something is: never its address, which is new every time."""
    if inspect.isfunction(value):
        return inspect.getsource(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def item_of(question: Question) -> Item:
    """The question as the splits see it."""
    task, request = question.task, question.requests[0]
    key, row = _content_key(task, request.doc), cast("int", request.doc_id)
    return Item(name_of(task), key, row, written=question.is_written)


def _content_key(task: Task, doc: Mapping[str, Any]) -> str:
    """Hash what is asked and what is right, without the examples shown before it.

    The examples are drawn at random, so with them a document that occurs twice would look like
    two.
    """
    choices = task.doc_to_choice(doc) if task.get_config("doc_to_choice") is not None else None
    content = [task.doc_to_text(doc), choices, task.doc_to_target(doc)]
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)
    return _digest(text)


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
