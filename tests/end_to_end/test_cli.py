"""The commands as a user meets them: what they print, what they return, what they leave behind."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from search.arguments import COMMANDS
from search.cli import main


@pytest.fixture
def recipe(zoo, tmp_path):
    """A recipe file that works."""
    mapping = {
        "merge_method": "ties",
        "base_model": str(zoo / "base"),
        "models": [
            {"model": str(zoo / name), "parameters": {"weight": 0.5, "density": 0.4}}
            for name in "ab"
        ],
        "dtype": "float32",
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(mapping))
    return file


def test_build_makes_a_checkpoint_that_loads(recipe, tmp_path, capsys):
    assert main(["build", str(recipe), str(tmp_path / "out"), "--device", "cpu"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert "tensors of ties" in capsys.readouterr().out


def test_check_of_a_recipe_prints_the_plan_and_reads_no_weights(recipe, capsys):
    assert main(["check", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "recipe: ties, writes float32" in out
    assert "3 layers" in out


def test_check_of_a_study_prints_models_items_and_search(make_study, tmp_path, capsys):
    assert main(["check", str(make_study(tmp_path))]) == 0
    out = capsys.readouterr().out
    assert "study: 16 trials of task_arithmetic, ties" in out
    assert "searched: scale, mix_1, mix_2, density" in out
    assert "search: 24 items (tell 16, pick 8)" in out
    assert "memory:" in out
    assert "kernels: run in chunks" in out
    assert not (tmp_path / "run").exists()


def test_score_of_a_recipe_is_that_of_the_checkpoint_built_from_it(
    recipe, make_study, tmp_path, capsys
):
    study = make_study(tmp_path)
    assert main(["build", str(recipe), str(tmp_path / "out"), "--device", "cpu"]) == 0
    capsys.readouterr()
    found = []
    for model in (recipe, tmp_path / "out"):
        options = ["--split", "test", "--json", "--device", "cpu"]
        assert main(["score", str(model), str(study), *options]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert len(found[0]["items"]) == 24
    assert found[0]["split"] == "test"


def test_score_prints_a_table(make_study, zoo, tmp_path, capsys):
    assert main(["score", str(zoo / "a"), str(make_study(tmp_path)), "--device", "cpu"]) == 0
    assert "16 select items" in capsys.readouterr().out


def test_export_saves_any_trial_of_a_run(make_study, zoo, tmp_path, capsys):
    study, run, out = make_study(tmp_path), tmp_path / "run", tmp_path / "out"
    options = ["--trials", "6", "--device", "cpu"]
    assert main(["run", str(study), "--out", str(run), *options]) == 0
    said = capsys.readouterr().out
    assert len(re.findall("^time: about .* s an item", said, re.MULTILINE)) == 1
    most = re.search(r"cost: at most ([\d,]+) item evaluations", said)
    asked = json.loads((run / "result.json").read_text())["item_evaluations"]
    assert asked <= int(most[1].replace(",", "")) < 3 * asked
    assert main(["export", str(run), str(out), "--trial", "1", "--device", "cpu"]) == 0
    model = AutoModelForCausalLM.from_pretrained(out).state_dict()  # trial 1: the best donor, alone
    donors = [AutoModelForCausalLM.from_pretrained(zoo / name).state_dict() for name in "abc"]
    same = [all(torch.equal(model[name], each) for name, each in d.items()) for d in donors]
    assert same.count(True) == 1
    capsys.readouterr()
    assert main(["export", str(run), str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "x"), "--trial", "99", "--device", "cpu"]) == 2
    assert "no finished trial 99" in capsys.readouterr().err


def test_code_that_comes_with_a_model_does_not_run_by_default(make_study, zoo, tmp_path, capsys):
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    for name in ("base", "a"):
        copy = shutil.copytree(zoo / name, tmp_path / name)
        config = json.loads((copy / "config.json").read_text())
        own = config | {"model_type": "own", "auto_map": names}
        (copy / "config.json").write_text(json.dumps(own))
        (copy / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    models = {"base_model": str(tmp_path / "base"), "models": [str(tmp_path / "a")]}
    study = make_study(tmp_path, search__methods=["ties"], **models)
    for command in (["check", str(study)], ["run", str(study), "--out", str(tmp_path / "run")]):
        assert main(command) == 2
        assert "set trust_remote_code: true in the study" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_donors_of_other_shapes_are_exit_2_and_nothing_written(
    make_study, make_model, zoo, tmp_path, capsys
):
    wide = make_model(tmp_path / "wide", seed=0, intermediate_size=96)
    study = make_study(tmp_path, models=[str(zoo / "a"), str(wide)])
    for command in (["check", str(study)], ["run", str(study), "--out", str(tmp_path / "run")]):
        assert main(command) == 2
        assert "differ in the shape of 'model.layers.0.mlp" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_second_process_on_a_run_is_refused(make_study, tmp_path, capsys):
    study, run = make_study(tmp_path), tmp_path / "run"
    run.mkdir()
    hold = (
        "import fcntl, sys; lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(run / "lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        assert main(["run", str(study), "--out", str(run), "--device", "cpu"]) == 2
        said = capsys.readouterr()
        assert "another process" in said.err
        assert "memory:" not in said.out  # nothing was loaded
        other.stdin.close()


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_fits_a_screen_and_ends_with_an_example(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"] if command else ["--help"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith(f"example: mergesearch {command or ''}")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_device_is_an_option_of_the_commands_that_compute_on_one(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert ("--device" in capsys.readouterr().out) == (command not in ("init", "report", "push"))


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("search.cli", {"torch", "lm_eval", "optuna", "rich", "pydantic"}),
        # with these, studies, models and tasks are checked
        (
            "search.commands.files, search.showing.terminal, objectives.harness.tasks",
            {"transformers", "optuna", "sqlalchemy", "scipy"},
        ),
    ],
)
def test_heavy_packages_are_not_imported_for_help_and_before_checks(modules, heavy):
    code = f"import sys, {modules}; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_installed_command_is_this_one():
    command = [Path(sys.executable).with_name("mergesearch"), "--version"]
    out = subprocess.run(command, capture_output=True, check=True, text=True)
    assert out.stdout.startswith("mergesearch ")
