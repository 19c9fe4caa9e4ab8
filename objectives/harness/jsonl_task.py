"""Write an lm-eval task file for a JSONL file of questions. Imports neither lm-eval nor torch."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Final

from objectives.base import ObjectiveError

QUESTIONS: Final = ("question", "prompt", "input")  # names a field of the file may have
ANSWERS: Final = ("answer", "target", "output", "label")
CHOICES: Final = "choices"

TASK: Final = """\
# The questions of {file}, written by mergesearch init; change it as you like.
task: {name}
dataset_path: json
# relative to this file's folder
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {output_type}
doc_to_text: {text}   # the prompt
doc_to_target: {target}
target_delimiter: {delimiter}   # between question and answer
num_fewshot: 0
{rest}metadata: {{version: 1}}
"""
MULTIPLE_CHOICE: Final = """\
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}   # likelihood per byte
"""
GENERATION: Final = """\
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: {length}   # no shorter than the longest answer
  do_sample: false
filter_list:
  - name: first_line
    filter:
      - {{function: regex, regex_pattern: '\\S[^\\n]*'}}   # blanks around it do not count
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""

Rows = Mapping[int, dict[str, Any]]  # objects of a JSONL file by their line numbers


def task_yaml(name: str, data: Path, folder: Path) -> str:
    """Return a task file: multiple choice where the lines have ``choices``, else generation.

    Args:
        name: Name of the task.
        data: Lines of JSON with a question and an answer.
        folder: Of the task file.

    Raises:
        ObjectiveError: A line is not JSON, or differs from the first in its fields.
    """
    rows = _read_rows(data)
    question = _find_field(rows, data, QUESTIONS)
    answer = _find_field(rows, data, ANSWERS)
    texts = [row[question] for row in rows.values()]
    for line, text in zip(rows, texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise ObjectiveError(f"{data}:{line}: {question} is {text!r}; write a text")
    if is_choice := any(CHOICES in row for row in rows.values()):
        target, rest = _choice_target(rows, data, answer), MULTIPLE_CHOICE
    else:
        target, rest = answer, GENERATION.format(length=_longest_answer(rows, data, answer))
    # a field "prompt" or "input" says itself how it is to be answered
    template = (
        "Question: {{question}}\nAnswer:" if question == "question" else f"{{{{{question}}}}}"
    )
    path = Path(os.path.relpath(data.expanduser().resolve(), folder.resolve())).as_posix()
    path = glob.escape(path)  # datasets takes it for a pattern
    return TASK.format(
        file=data.name,
        name=_quoted(name),
        data=_quoted(path),
        output_type="multiple_choice" if is_choice else "generate_until",
        text=_quoted(template),
        target=_quoted(target),
        delimiter='""' if any(text[-1].isspace() or text[-1] == "=" for text in texts) else '" "',
        rest=rest,
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # YAML reads it alike


def _read_rows(data: Path) -> Rows:
    rows = {}
    try:
        lines = data.read_text(encoding="utf-8-sig").split("\n")  # no other separates lines of JSON
    except OSError as error:
        raise ObjectiveError(f"{data}: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise ObjectiveError(f"{data}: not UTF-8 text: {error}; save it as UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows[number] = _read_row(line, f"{data}:{number}")
    if not rows:
        raise ObjectiveError(f"{data} is empty; write one JSON object a line")
    return rows


def _read_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_without_repeats)
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except RecursionError:
        raise ObjectiveError(f"{where}: nested too deeply; correct it") from None
    except ValueError as error:
        raise ObjectiveError(f"{where}: not JSON: {error}; correct it") from None
    if not isinstance(row, dict):
        raise ObjectiveError(f"{where}: not a JSON object; write one {{...}} a line")
    return row


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} comes twice")
    return found


def _find_field(rows: Rows, data: Path, names: Sequence[str]) -> str:
    """Return the first of the names that the lines have; all must have it, of one type."""
    first = next(iter(rows.values()))
    name = next((name for name in names if name in first), None)
    for line, row in rows.items():
        if name is None or name not in row:
            raise ObjectiveError(
                f"{data}:{line}: no field {name or ' or '.join(names)} among "
                f"{', '.join(row) or 'none'}; use the same names on every line"
            )
        if type(row[name]) is not type(first[name]):
            raise ObjectiveError(
                f"{data}:{line}: {name} is {row[name]!r}, and {first[name]!r} before; make all "
                "texts or all whole numbers"
            )
    return str(name)


def _choice_target(rows: Rows, data: Path, answer: str) -> str:
    """Return ``doc_to_target``; answers must all be indices, texts or letters of choices."""
    forms: dict[str, Callable[[Any, list[str]], bool]] = {
        answer: lambda target, choices: type(target) is int and 0 <= target < len(choices),
        f"{{{{{CHOICES}.index({answer})}}}}": lambda target, choices: target in choices,
        f"{{{{'{ascii_uppercase}'.index({answer})}}}}": lambda target, choices: (
            target in [*ascii_uppercase[: len(choices)]]
        ),
    }
    for line, row in rows.items():
        choices, target = row.get(CHOICES), row[answer]
        if not isinstance(choices, list) or not all(isinstance(one, str) for one in choices):
            raise ObjectiveError(f"{data}:{line}: {CHOICES} is {choices!r}; write a list of texts")
        fitting = {form: fits for form, fits in forms.items() if fits(target, choices)}
        if not fitting:
            raise ObjectiveError(
                f"{data}:{line}: {answer} is {target!r}, which is none of the {len(choices)} "
                f"{CHOICES}; write its number from 0 on, its text or its letter, always the same"
            )
        forms = fitting
    return next(iter(forms))


def _longest_answer(rows: Rows, data: Path, answer: str) -> int:
    """Return an upper bound of the longest answer's tokens: one per byte, and two for the end."""
    for line, row in rows.items():
        target = row[answer]
        if isinstance(target, bool) or not isinstance(target, str | int | float):
            raise ObjectiveError(f"{data}:{line}: {answer} is {target!r}; write a text or a number")
        if str(target).strip().splitlines() != [str(target)]:
            raise ObjectiveError(
                f"{data}:{line}: {answer} is {target!r}; write one line without blanks around it, "
                "for the first line a model writes is compared with it"
            )
    return 2 + max(len(str(row[answer]).encode()) for row in rows.values())
