"""Build lm-eval tasks from their files, with errors that name the file and what to do."""

from __future__ import annotations

import contextlib
import functools
import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FunctionType, NoneType
from typing import Any

import datasets  # type: ignore[import-untyped]  # published without types
from jinja2 import UndefinedError
from lm_eval import utils
from lm_eval.api.task import Task

# Private: the one place where lm-eval builds each task of a group from the task's own file.
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry
from typing_extensions import override

from objectives.base import ObjectiveError, objective_errors, reason, time_limit
from objectives.harness.encoding import TEMPLATE_SECONDS
from objectives.harness.task_code import find_code
from objectives.harness.task_files import check_plain
from objectives.harness.task_index import LM_EVAL_TASKS

TEMPLATE_MAKES = 10_000_000  # characters at most
# Limits of time of a task's own code: of its import, or a function of a whole data set; of a
# function of a row. What scores a response is limited where it is called.
DATASET_SECONDS, ROW_SECONDS = 60.0, 10.0
_OF_DATASETS = ("process_docs", "custom_dataset")
_SCORES = "process_results"
_DATA = ("dataset_path", "custom_dataset", "class")  # where a task's rows come from
_TEXTS = (
    *("dataset_path", "dataset_name", "description", "target_delimiter", "fewshot_delimiter"),
    "gen_prefix",
)
# Settings of which other types break lm-eval, and what to write. ``[]`` is every entry of a list;
# what is in one may not be left out.
_TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "num_fewshot": ((int,), "a whole number"),
    **dict.fromkeys(_TEXTS, ((str,), "a text, in quotes")),
    "doc_to_text": ((str, int, FunctionType), "a text, in quotes"),
    "process_docs": ((FunctionType,), "a !function"),
    **dict.fromkeys(("dataset_kwargs", "generation_kwargs"), ((dict,), "a mapping")),
    "dataset_kwargs.data_files": ((str, list, dict), "a file, a list of files or a mapping"),
    **dict.fromkeys(("metric_list", "filter_list"), ((list,), "a list of mappings")),
    "metric_list[]": ((dict,), "a mapping with a metric"),
    "metric_list[].metric": ((str, FunctionType), "the name of a metric"),
    "filter_list[]": ((dict,), "a mapping with name and filter"),
    "filter_list[].name": ((str,), "a name"),
    "filter_list[].filter": ((list,), "a list of mappings"),
    "filter_list[].filter[]": ((dict,), "a mapping with a function"),
    "filter_list[].filter[].function": ((str,), "the name of a function of lm-eval"),
}


class SafeTaskFactory(TaskFactory):  # type: ignore[misc]  # lm-eval is published without types
    """Builds each task in the folder of its YAML, where its data files are."""

    def __init__(self, *, unsafe_code: bool, trust_task_code: bool) -> None:
        super().__init__()
        self._unsafe_code, self._trust_task_code = unsafe_code, trust_task_code

    @override
    def build(self, entry: Entry, **settings: Any) -> Any:
        self._check_trusted(entry)
        with _inside_folder_of(entry):
            return super().build(entry, **settings)

    @override
    def _load_full_config(
        self, entry: Entry, overrides: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        if _is_lm_evals(entry):
            return super()._load_full_config(entry, overrides)  # type: ignore[no-any-return]
        where = f"task {entry.name!r} ({entry.yaml_path}): its"
        with time_limit(DATASET_SECONDS, f"{where} code"):
            config: dict[str, Any] = super()._load_full_config(entry, overrides)
        for path, (types, wanted) in _TYPES.items():
            types = types if "[]" in path else (*types, NoneType)
            for value in _settings_at(path.split("."), config):
                if not isinstance(value, types):
                    raise ObjectiveError(f"{where} {path} is {value!r}; write {wanted}")
        is_group = not isinstance(config.get("task"), str)
        if not is_group and not any(config.get(key) for key in _DATA):
            raise ObjectiveError(f"{where} dataset_path is missing; write json, or a data set's")
        return {key: _limited(value, key, where) for key, value in config.items()}

    @override
    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Task:
        self._check_trusted(entry)
        self.check_safe(entry.name, (entry.cfg or {}).get("unsafe_code"))
        where = f"task {entry.name!r} ({entry.yaml_path})"
        named = objective_errors(f"{where} could not be loaded")
        with _inside_folder_of(entry), named, limited_templates(entry.name):
            for file in _data_files(entry):
                check_plain(file.absolute(), f"{where}: data_files: ")
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
            except (FileNotFoundError, ConnectionError, StopIteration) as error:
                # datasets' own stop has no text
                said = reason(error) if str(error) else "no file fits data_files"
                raise ObjectiveError(
                    f"{where}: its data was not found: {said}; check dataset_path and "
                    "data_files, which are relative to that YAML"
                ) from error

    def _check_trusted(self, entry: Entry) -> None:
        """Raise an ``ObjectiveError`` for damaged files, or for code that is not trusted."""
        if entry.yaml_path is None:
            return
        if (code := find_code(entry.yaml_path)) and not self._trust_task_code:
            raise ObjectiveError(
                f"task {entry.name!r} contains Python code ({code}); read it, and if you "
                "trust it, set trust_task_code: true in the study's objective, or give init "
                "--trust-task-code"
            )

    def check_safe(self, name: str, is_unsafe: object) -> None:
        """Raise an ``ObjectiveError`` for a task that runs a model's code, unless it is allowed."""
        if is_unsafe and not self._unsafe_code:
            raise ObjectiveError(
                f"task {name!r} runs code the model writes, and merged models are untrusted; "
                "leave it out, or set unsafe_code: true on a machine that may be harmed"
            )


def _settings_at(path: Sequence[str], config: Mapping[str, Any]) -> Iterator[Any]:
    """Yield a task's settings at a path of ``_TYPES``; None where there is none."""
    key, *rest = path
    value = config.get(key.removesuffix("[]"))
    for each in (value or []) if key.endswith("[]") else [value]:
        if not rest:
            yield each
        elif each is not None:
            yield from _settings_at(rest, each)


def _limited(value: Any, key: str, where: str) -> Any:
    """Return a task's setting, in which each function has a limit of time."""
    if isinstance(value, dict):
        return {name: _limited(part, name, where) for name, part in value.items()}
    if isinstance(value, list):
        return [_limited(part, key, where) for part in value]
    if not isinstance(value, FunctionType) or key == _SCORES:
        return value

    @functools.wraps(value)
    def limited(*arguments: Any, **settings: Any) -> Any:
        seconds = DATASET_SECONDS if key in _OF_DATASETS else ROW_SECONDS
        with time_limit(seconds, f"{where} {key}"):
            return value(*arguments, **settings)

    return limited


@contextlib.contextmanager
def limited_templates(task: str) -> Iterator[None]:
    """Limit the time and the output of rendering each of a task's templates."""
    apply = utils.apply_template

    def limited(template: str, document: dict[str, Any]) -> str:
        with time_limit(TEMPLATE_SECONDS, f"task {task!r}: the template {template[:50]!r}"):
            text: str = apply(template, document)
        if len(text) > TEMPLATE_MAKES:
            raise ObjectiveError(
                f"task {task!r}: the template {template[:50]!r} makes {len(text):,} characters; "
                "correct it"
            )
        return text

    utils.apply_template = limited  # lm-eval has no setting for it
    try:
        yield
    finally:
        utils.apply_template = apply


def _is_lm_evals(entry: Entry) -> bool:
    """Return whether a task is lm-eval's own, whose code is trusted, and may take long."""
    return entry.yaml_path is None or entry.yaml_path.is_relative_to(LM_EVAL_TASKS)


def _inside_folder_of(entry: Entry) -> contextlib.AbstractContextManager[None]:
    # lm-eval's own tasks have no data files, and its folder names can be mistaken for data sets
    if entry.yaml_path is None or _is_lm_evals(entry):
        return contextlib.nullcontext()
    return contextlib.chdir(entry.yaml_path.parent)


def _broken_line(entry: Entry) -> str | None:
    """Return an error that names the first line of a task's JSONL files that is not JSON."""
    for file in _data_files(entry):
        if file.suffix == ".jsonl":
            lines = file.read_text(encoding="utf-8-sig", errors="replace").split("\n")
            for number, line in enumerate(lines, start=1):
                try:
                    json.loads(line or "{}")
                except ValueError as error:
                    return f"{file.absolute()}:{number}: not JSON: {error}; correct it"
    return None


def _data_files(entry: Entry) -> list[Path]:
    """List a task's data files, relative to the folder of its YAML."""
    settings = (entry.cfg or {}).get("dataset_kwargs")
    files = settings.get("data_files") if isinstance(settings, dict) else None
    listed = files.values() if isinstance(files, dict) else [files]
    each = [name for part in listed for name in (part if isinstance(part, list) else [part])]
    found = [glob.iglob(name) for name in each if isinstance(name, str)]
    return [Path(name) for names in found for name in names]
