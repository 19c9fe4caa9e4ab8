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

from objectives.harness.task_files import with_includes
from objectives.harness.task_index import LM_EVAL_TASKS

_STANDARD = "tag:yaml.org,2002:"  # of YAML's own types


def find_code(file: Path) -> str | None:
    """Return the first thing in a task file or its includes that runs code; None: nothing.

    lm-eval's own files are as trusted as lm-eval.

    Raises:
        ObjectiveError: A file cannot be read.
    """
    for each, config in with_includes(file, LM_EVAL_TASKS.resolve()):
        for event in yaml.parse(each.read_bytes()):  # no objects are constructed
            tag = getattr(event, "tag", None) or "!"
            if tag != "!" and (not tag.startswith(_STANDARD) or "python" in tag):
                return f"{tag} {getattr(event, 'value', '')} in {each}"
        if metric := next(_scripts(config), None):
            return f"the metric {metric!r} in {each}"
    return None


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
