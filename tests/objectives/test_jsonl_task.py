"""A JSONL file of questions becomes an lm-eval task, or its first wrong line is named."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from objectives.base import ObjectiveError
from objectives.harness.jsonl_task import task_yaml

GENERATED = {"question": "abc?", "answer": "a"}
CHOICE = {"input": "abc ", "choices": ["a", "b", "c"]}


def task_of(folder, rows):
    """The task file of a JSONL file; a row that is a text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "own.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return task_yaml("own", folder / "own.jsonl", folder / "tasks")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (GENERATED, {"output_type": "generate_until", "doc_to_target": "answer"}),
        ({"prompt": "1+1=", "output": 2}, {"doc_to_text": "{{prompt}}", "target_delimiter": ""}),
        (CHOICE | {"label": 2}, {"output_type": "multiple_choice", "doc_to_target": "label"}),
        (CHOICE | {"answer": "b"}, {"doc_to_target": "{{choices.index(answer)}}"}),
        (
            CHOICE | {"answer": "B"},
            {"doc_to_target": "{{'ABCDEFGHIJKLMNOPQRSTUVWXYZ'.index(answer)}}"},
        ),
    ],
)
def test_fields_decide_the_task(tmp_path, row, expected):
    rows = [row | {next(iter(row)): f"{letter}{next(iter(row.values()))}"} for letter in "abcdefgh"]
    task = yaml.safe_load(task_of(tmp_path, rows))
    assert {name: task[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"question": ', ":2: not JSON: "),
        ('["abc?", "a"]', ":2: not a JSON object; write one {...} a line"),
        ({"q": "x", "answer": "y"}, ":2: no field question among q, answer; use the same names"),
        ({"question": "x"}, ":2: no field answer among question"),
        (GENERATED | {"answer": 1}, ":2: answer is 1, and 'a' before; make all texts"),
        (GENERATED | {"question": " "}, ":2: question is ' '; write a text"),
        (GENERATED | {"answer": "a\nb"}, ":2: answer is 'a\\nb'; write one line"),
        (GENERATED | {"answer": " a"}, ":2: answer is ' a'; write one line without blanks"),
        (GENERATED | {"choices": ["a"]}, ":1: choices is None; write a list of texts"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, second, message):
    with pytest.raises(ObjectiveError, match=re.escape(f"own.jsonl{message}")):
        task_of(tmp_path, [GENERATED, second])


def test_a_choice_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ObjectiveError, match=":2: label is 3, which is none of the 3 choices"):
        task_of(tmp_path, [CHOICE | {"label": 2}, CHOICE | {"label": 3}])


def test_names_and_paths_that_yaml_would_misread_are_quoted(tmp_path):
    data = tmp_path / "a: #b, {c}.jsonl"
    data.write_text(json.dumps(GENERATED) + "\n")
    task = yaml.safe_load(task_yaml("123", data, tmp_path / "tasks"))
    assert task["task"] == "123"
    assert task["dataset_kwargs"] == {"data_files": {"test": f"../{data.name}"}}
