"""``init``: the study it writes, what it refuses, and that the study runs."""

import json
import os
import pty
import re

import pytest
import yaml

from search.cli import main
from search.study.reading import load_study

CHOSEN = {"input": "abc ", "choices": ["a", "b", "c"]}


@pytest.fixture
def folder(zoo, tmp_path):
    """A folder with two files of questions, one to write answers to, one to choose from."""
    letters = "abcdefghijklmnopqrst"
    rows = [{"question": f"{a}{b}?", "answer": a} for a in letters for b in "uvw"]
    write_rows(tmp_path / "mine" / "tell it.jsonl", rows)
    rows = [CHOSEN | {"input": f"{a} ", "target": "ABC"[n % 3]} for n, a in enumerate(letters)]
    write_rows(tmp_path / "mine" / "pick.jsonl", rows)
    return tmp_path


def write_rows(file, rows):
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(zoo, *tasks, models="ab", out):
    named = {"--models": [zoo / name for name in models], "--tasks": tasks, "--out": [out]}
    words = [word for option, values in named.items() for word in (option, *map(str, values))]
    return ["init", "--base", str(zoo / "base"), *words]


def tree(folder):
    return sorted(path for path in folder.rglob("*"))


def test_written_study_is_the_short_one_with_our_defaults(zoo, folder, capsys):
    file = folder / "new" / "study.yaml"
    tasks = [folder / "mine" / name for name in ("tell it.jsonl", "pick.jsonl")]
    assert main(command(zoo, *tasks, out=file)) == 0
    short = {
        "base_model": str(zoo / "base"),
        "models": [str(zoo / name) for name in "ab"],
        "objective": {
            "include_path": "tasks",
            "tasks": ["tell_it", "pick"],
            "items": {"search": 16, "select": 16, "test": 32},  # of 80
        },
    }
    (file.parent / "short.yaml").write_text(yaml.safe_dump(short))
    assert load_study(file) == load_study(file.parent / "short.yaml")
    text = file.read_text()
    assert str(zoo) not in text  # relative to the file
    out = capsys.readouterr().out
    assert "search: 14 items (tell_it 11, pick 3)" in out
    assert f"next: mergesearch run {file} --out runs/mine" in out


def test_lines_that_are_commented_out_are_valid_too(zoo, folder):
    file = folder / "study.yaml"
    assert main(command(zoo, folder / "mine" / "pick.jsonl", out=file)) == 0
    (folder / "recipe.yaml").write_text("")
    text, count = re.subn(r"^( *)# (\w+: .*)$", r"\1\2", file.read_text(), flags=re.MULTILINE)
    assert count == 9
    file.write_text(text)
    spec = load_study(file)
    assert spec.search.methods == ("task_arithmetic", "ties")
    assert spec.objective.constraints == {"pick": 0.5}


def test_study_of_the_users_questions_is_written_and_checked(zoo, folder, capsys):
    file = folder / "study.yaml"
    tasks = [folder / "mine" / name for name in ("tell it.jsonl", "pick.jsonl")]
    assert main(command(zoo, *tasks, out=file)) == 0
    capsys.readouterr()
    assert main(["score", str(zoo / "a"), str(file), "--json", "--device", "cpu"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert score["tasks"].keys() == {"tell_it", "pick"}
    assert score["tokens"] > 0


def test_a_line_that_is_no_question_is_named_and_nothing_is_written(zoo, tmp_path, capsys):
    (tmp_path / "own.jsonl").write_text(json.dumps({"question": "x", "answer": "y"}) + "\n{\n")
    before = tree(tmp_path)
    assert main(command(zoo, tmp_path / "own.jsonl", out=tmp_path / "study.yaml")) == 2
    error = capsys.readouterr().err
    assert "own.jsonl:2: not JSON: " in error
    assert error.count("\n") == 1
    assert tree(tmp_path) == before


def test_nothing_is_left_where_the_plan_fails(zoo, folder, make_model, capsys):
    wide = make_model(folder / "zoo" / "d", seed=0, intermediate_size=96).parent
    before = tree(folder)
    out = folder / "new" / "study.yaml"
    line = command(zoo, folder / "mine" / "pick.jsonl", out=out)
    assert main([*line, "--models", str(wide / "d")]) == 2
    assert "differ in the shape" in capsys.readouterr().err
    assert tree(folder) == before


def test_models_of_the_hub_are_not_fetched(folder, capsys):
    out = folder / "study.yaml"
    line = ["init", "--base", "org/base", "--models", "org/a@v1", "--tasks"]
    assert main([*line, str(folder / "mine" / "pick.jsonl"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "not on this machine: org/base, org/a@v1" in printed
    assert f"next: mergesearch check {out}" in printed
    assert load_study(out).models == ("org/a@v1",)


def test_missing_options_are_prompted_for_in_a_terminal(zoo, folder, monkeypatch, capsys):
    ours, theirs = pty.openpty()
    line = command(zoo, folder / "mine" / "pick.jsonl", out=folder / "study.yaml")
    os.write(ours, f"{zoo / 'base'}\n".encode())
    with os.fdopen(theirs) as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        assert main([*line[:1], *line[3:]]) == 0  # without the base
    assert "base model: " in capsys.readouterr().out
    assert load_study(folder / "study.yaml").base_model == str((zoo / "base").resolve())


@pytest.mark.parametrize("option", ["--base", "--models", "--tasks"])
def test_missing_options_are_an_error_outside_a_terminal(zoo, folder, monkeypatch, capsys, option):
    line = command(zoo, folder / "mine" / "pick.jsonl", out=folder / "study.yaml")
    start = line.index(option)
    end = next(n for n, word in enumerate(line) if n > start and word.startswith("--"))
    with open(os.devnull) as nobody:
        monkeypatch.setattr("sys.stdin", nobody)
        assert main(line[:start] + line[end:]) == 2
    assert f"init: {option} is missing; give " in capsys.readouterr().err
    assert not (folder / "study.yaml").exists()
