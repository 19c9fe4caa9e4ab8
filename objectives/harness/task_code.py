"""Find Python code in task files without running any of it.

lm-eval imports what ``!function`` names while it reads a task, and has ``evaluate`` run a metric
that it does not know as a script. Its templates are Jinja, which reaches Python outside a sandbox.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval.utils
import yaml
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.registry import metric_registry

from objectives.base import ObjectiveError
from objectives.harness.task_index import LM_EVAL_TASKS, read_task

_STANDARD = "tag:yaml.org,2002:"  # of YAML's own types


def find_code(file: Path) -> str | None:
    """Return the first thing in a task file or its includes that runs code; None: nothing.

    lm-eval's own files are as trusted as lm-eval.

    Raises:
        ObjectiveError: A file cannot be read.
    """
    return next(_code_in(file, set()), None)


def _code_in(file: Path, seen: set[Path]) -> Iterator[str]:
    file = file.expanduser().resolve()
    if file in seen or file.is_relative_to(LM_EVAL_TASKS.resolve()):
        return
    seen.add(file)
    try:  # only events are parsed, no objects are constructed
        for event in yaml.parse(file.read_bytes()):
            tag = getattr(event, "tag", None) or "!"
            if tag != "!" and (not tag.startswith(_STANDARD) or "python" in tag):
                yield f"{tag} {getattr(event, 'value', '')} in {file}"
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ObjectiveError(f"{file}: no task file: {' '.join(str(error).split())}") from None
    config = read_task(file, recursive=False)
    yield from (f"the metric {name!r} in {file}" for name in _scripts(config))
    included = config.get("include") or []
    for other in included if isinstance(included, list) else [included]:
        yield from _code_in(file.parent / str(other), seen)


def _scripts(part: Any) -> Iterator[str]:
    """Yield the metrics anywhere in a configuration that ``evaluate`` would run scripts for."""
    if isinstance(part, dict):
        for metric in listed if isinstance(listed := part.get("metric_list"), list) else []:
            name = metric.get("metric") if isinstance(metric, dict) else None
            if isinstance(name, str) and (name not in metric_registry or metric.get("hf_evaluate")):
                yield name
    if isinstance(part, dict | list):
        for inner in part.values() if isinstance(part, dict) else part:
            yield from _scripts(inner)


def sandbox_templates() -> None:
    """Let lm-eval render all templates in Jinja's sandbox; rendered texts are the same."""
    plain = lm_eval.utils.env
    if not isinstance(plain, SandboxedEnvironment):
        sandbox = SandboxedEnvironment(
            loader=plain.loader,
            undefined=plain.undefined,
            keep_trailing_newline=plain.keep_trailing_newline,
        )
        sandbox.filters |= plain.filters
        lm_eval.utils.env = sandbox
