"""lm-eval's index is built once, kept, and means the same when it is read again."""

from __future__ import annotations

import pytest
import yaml
from lm_eval.tasks import TaskManager

from objectives.base import ObjectiveError
from objectives.harness import task_index
from objectives.harness.task_index import find_tasks, registered_tasks


def replace_index(monkeypatch, manager):
    """Let ``manager`` stand for all of lm-eval's tasks; returns a list of its uses."""
    built = []

    def whole_or_own(include_defaults=True, include_path=()):
        if include_defaults:
            built.append(manager)
            return manager
        return TaskManager(include_defaults=False, include_path=include_path)

    monkeypatch.setattr(task_index, "TaskManager", whole_or_own)
    return built


@pytest.fixture
def small_lm_eval(tmp_path, monkeypatch):
    """A small folder in place of lm-eval's tasks, and an empty cache."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name in ("spelling", "grammar"):
        config = {"task": name, "tag": "language", "doc_to_text": "q", "unsafe_code": True}
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump(config))
    (tasks / "group.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["language"]}))
    monkeypatch.setattr(task_index, "LM_EVAL_TASKS", tasks)
    manager = TaskManager(include_defaults=False, include_path=tasks)
    return replace_index(monkeypatch, manager)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def read_again(cache):
    registered_tasks.cache_clear()
    return registered_tasks(cache)


def test_the_index_is_built_once_and_read_afterwards(small_lm_eval, cache):
    first, second = read_again(cache), read_again(cache)
    assert len(small_lm_eval) == 1
    assert first.keys() == second.keys() == {"spelling", "grammar", "language", "both"}
    for name, entry in second.items():
        assert (entry.kind, entry.yaml_path, entry.tags) == (
            first[name].kind,
            first[name].yaml_path,
            first[name].tags,
        )
    assert second["both"].cfg["task"] == ["language"]
    assert second["grammar"].cfg["unsafe_code"]


def test_a_damaged_index_is_built_again(small_lm_eval, cache):
    read_again(cache)
    (file,) = (cache / "task_index").iterdir()
    file.write_text(file.read_text()[:-20])
    assert read_again(cache).keys() == {"spelling", "grammar", "language", "both"}
    assert len(small_lm_eval) == 2


def test_without_a_folder_to_write_to_the_index_is_built_each_time(small_lm_eval, cache):
    cache.write_text("a file, not a folder")
    assert read_again(cache).keys() == read_again(cache).keys() != set()
    assert len(small_lm_eval) == 2


def test_tasks_of_the_users_own_folders_need_no_index(small_lm_eval, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.yaml").write_text(yaml.safe_dump({"task": "mine"}))
    assert find_tasks(["mine"], [own]).task_index.keys() == {"mine"}
    assert not small_lm_eval


def test_a_name_in_the_users_own_folder_takes_precedence(small_lm_eval, cache, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "grammar.yaml").write_text(yaml.safe_dump({"task": "grammar"}))
    index = find_tasks(["grammar", "spelling"], [own], cache).task_index
    assert index["grammar"].yaml_path == own / "grammar.yaml"
    assert index["spelling"].yaml_path == tmp_path / "tasks" / "spelling.yaml"


def test_a_misspelt_name_is_refused_with_suggestions(small_lm_eval, cache):
    with pytest.raises(ObjectiveError, match=r"no task 'grammer'.*did you mean 'grammar'"):
        find_tasks(["grammer"], [], cache)


@pytest.mark.parametrize(
    ("name", "way"), [("my.jsonl", "mergesearch init --tasks"), ("./my.yaml", "'include_path'")]
)
def test_a_file_in_place_of_a_name_is_refused_with_the_way_to_use_it(
    small_lm_eval, cache, name, way
):
    with pytest.raises(ObjectiveError, match=f"no task '{name}'.*{way}"):
        find_tasks([name], [], cache)


@pytest.mark.slow
def test_the_kept_index_means_what_lm_evals_own_means(cache, monkeypatch):
    manager = TaskManager()
    built = replace_index(monkeypatch, manager)
    read_again(cache)
    whole, index = manager.task_index, read_again(cache)
    assert len(built) == 1
    assert index.keys() == whole.keys() >= {"leaderboard", "mmlu", "arc_easy", "ai2_arc"}
    for name, entry in whole.items():
        kept = index[name]
        assert (kept.kind, kept.yaml_path, kept.tags) == (entry.kind, entry.yaml_path, entry.tags)
        assert {*task_index.members(kept)} == {*task_index.members(entry)}
