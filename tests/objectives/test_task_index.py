"""lm-eval's names are found without its whole index, and mean the same."""

from __future__ import annotations

import pytest
from lm_eval.tasks import TaskManager

from objectives.harness.task_index import find_registered, named_by, registered_names
from objectives.harness.tasks import task_manager

# A group of groups, a tag, a group with settings of its own for its members, a tag that only an
# included file names, and single tasks.
NAMES = ["leaderboard", "ai2_arc", "mmlu", "kbl", "arc_easy", "gsm8k", "wikitext"]


def test_names_to_suggest_are_there_without_parsing():
    assert {"leaderboard", "leaderboard_bbh_snarks", "mmlu", "gsm8k"} <= {*registered_names()}


def test_unknown_names_are_left_out():
    assert find_registered(["no_such_task_anywhere"]) == {}


def test_a_registered_group_is_found_with_all_that_it_stands_for(monkeypatch):
    monkeypatch.setattr("lm_eval.tasks._index.TaskIndex._iter_yaml_files", lambda root: [])
    manager = task_manager(["leaderboard"], [], unsafe_code=False)
    assert "leaderboard_bbh_snarks" in manager.task_index
    assert manager.task_index["leaderboard_musr"].cfg["group"] == "leaderboard_musr"


@pytest.mark.slow
def test_names_mean_what_they_mean_in_the_whole_index():
    whole = TaskManager().task_index
    expected, waiting = {}, [*NAMES]
    while waiting:
        if (one := waiting.pop()) in whole and one not in expected:
            expected[one] = whole[one]
            waiting += named_by(whole[one])
    assert expected.keys() >= {*NAMES}
    assert find_registered(NAMES) == expected
