"""Entries of a task list are checked where they are made."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from objectives.entries import ENTRY_KINDS, PluginEntry, PromptEntry, TaskEntry, TextEntry


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_that_is_no_positive_number_is_refused(weight):
    for make in (
        lambda: TaskEntry(task="t", weight=weight),
        lambda: TextEntry(text=(Path("t"),), name="t", weight=weight),
        lambda: PluginEntry(objective="m:C", weight=weight),
    ):
        with pytest.raises(ValidationError, match="weight"):
            make()


def test_a_key_that_no_entry_has_is_refused():
    with pytest.raises(ValidationError, match="fewshot"):
        TaskEntry(task="t", fewshot=3)


def test_every_kind_of_entry_is_recognised_by_a_key_it_requires():
    for key, kind in ENTRY_KINDS.items():
        assert kind.model_fields[key].is_required()


def test_prompts_without_a_token_to_write_are_refused():
    with pytest.raises(ValidationError, match="max_tokens"):
        PromptEntry(prompts=("a",), max_tokens=0)
