"""A run on real tasks and real models: what it leaves, and what a kill costs it."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
import torch
import yaml
from optuna.trial import TrialState
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from merge_engine.recipe import load_recipe
from search.bench import Machine, make_bench
from search.cli import main
from search.result import Result
from search.runner import DATABASE
from search.spec import load_study
from search.storage import Store


def trials_of(run):
    return Store(run / DATABASE).study().get_trials(deepcopy=False)


def decisions(run):
    return [(trial.number, trial.params, trial.value) for trial in trials_of(run)]


def answers_of(run):
    with sqlite3.connect(run / DATABASE) as database:
        return sorted(
            database.execute("select recipe, split, block, answers from mergesearch_answers")
        )


@pytest.fixture(scope="module")
def finished(make_study, tmp_path_factory):
    """A study's file and the folder of its finished run."""
    folder = tmp_path_factory.mktemp("finished")
    study = make_study(folder)
    assert main(["run", str(study), "--out", str(folder / "run"), "--device", "cpu"]) == 0
    return study, folder / "run"


def test_run_leaves_result_recipe_and_checkpoint(finished, zoo):
    _, run = finished
    result = Result.model_validate_json((run / "result.json").read_text())
    recipe, _ = load_recipe(run / "recipe.yaml")
    assert recipe.model_dump(mode="json") == result.winner.recipe
    assert recipe.dtype == "float32"
    assert recipe.out_dtype == "float32"
    assert recipe.base_model
    assert result.trials == 16
    assert set(result.donors) == {str(zoo / name) for name in "abc"}
    assert set(result.winner.test.tasks) == {"pick", "tell"}
    assert result.times_tested == 1
    assert sorted(path.name for path in (run / "checkpoint").iterdir()) == [
        "config.json",
        "generation_config.json",
        "mergekit_config.yml",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_checkpoint_holds_the_recipe_built_again(finished):
    study, run = finished
    bench = make_bench(load_study(study), Machine("cpu"))
    bench.builder.build(load_recipe(run / "recipe.yaml")[0])
    saved = AutoModelForCausalLM.from_pretrained(run / "checkpoint").state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in bench.builder.tensors())


def test_every_candidate_answers_the_same_items_and_splits_are_disjoint(finished):
    study, run = finished
    bench = make_bench(load_study(study), Machine("cpu"))
    keys = {
        split: {bench.objective.items[number].key for number in getattr(bench.splits, split)}
        for split in ("search", "select", "test")
    }
    assert [len(found) for found in keys.values()] == [24, 16, 24]
    assert len(set.union(*keys.values())) == 64
    searched = [row for row in answers_of(run) if row[1] == "search"]
    lengths = {(recipe, block): len(json.loads(a)) for recipe, _, block, a in searched}
    assert set(lengths.values()) == {8}
    recipes = {recipe for recipe, _ in lengths}
    assert len(lengths) == 3 * len(recipes)


def test_warm_starts_come_first_and_base_scores_as_the_base(finished, zoo):
    study, run = finished
    starts = [trial.user_attrs.get("start") for trial in trials_of(run)]
    assert starts[0] == "base"
    assert str(zoo / "b") in starts
    bench = make_bench(
        load_study(study), Machine("cpu")
    )  # holds the base as loaded by transformers
    alone = bench.objective.score(bench.builder.model, bench.splits.search)
    stored = [row for row in answers_of(run) if row[1] == "search"]
    key = bench.space.baselines()[str(zoo / "base")].key
    assert [a for row in stored if row[0] == key for a in json.loads(row[3])] == alone


def test_running_again_changes_nothing_and_asks_nothing(finished):
    study, run = finished
    before, result = answers_of(run), json.loads((run / "result.json").read_text())
    written = (run / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    assert main(["run", str(study), "--out", str(run), "--device", "cpu"]) == 0
    assert answers_of(run) == before
    assert (run / "checkpoint" / "model.safetensors").stat().st_mtime_ns == written
    again = json.loads((run / "result.json").read_text())
    assert {**again, "seconds": 0} == {**result, "seconds": 0}


def test_same_seed_makes_the_same_decisions_and_another_seed_others(finished, tmp_path):
    study, run = finished
    for seed, folder in ((0, tmp_path / "same"), (1, tmp_path / "other")):
        options = ["--trials", "14", "--seed", str(seed), "--device", "cpu"]
        assert main(["run", str(study), "--out", str(folder), *options]) == 0
    assert decisions(tmp_path / "same") == decisions(run)[:14]
    assert decisions(tmp_path / "other") != decisions(run)[:14]


def test_killed_run_goes_on_as_if_nothing_had_happened(finished, tmp_path):
    study, whole = finished
    run = tmp_path / "run"
    command = [sys.executable, "-m", "search.cli", "run", str(study), "--out", str(run)]
    command += ["--device", "cpu"]
    for wanted in (20, 26):  # blocks of answers after which it is shot
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ) as process:
            while process.poll() is None and _blocks(run) < wanted:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
    assert 0 < len([t for t in trials_of(run) if t.state == TrialState.COMPLETE]) < 16
    assert main(command[3:]) == 0
    assert decisions(run) == decisions(whole)
    assert answers_of(run) == answers_of(whole)
    assert (run / "recipe.yaml").read_text() == (whole / "recipe.yaml").read_text()


def _blocks(run):
    try:
        return len(answers_of(run))
    except sqlite3.Error:  # not made yet
        return 0


def test_another_study_is_refused_with_the_difference(finished, tmp_path, capsys):
    study, run = finished
    changed = yaml.safe_load(study.read_text())
    changed["search"]["methods"].remove("ties")
    other = study.with_name("other.yaml")
    other.write_text(yaml.safe_dump(changed))
    assert main(["run", str(other), "--out", str(run), "--device", "cpu"]) == 2
    assert "search.methods was ['task_arithmetic', 'ties'" in capsys.readouterr().err


def test_changed_items_are_refused(finished, capsys):
    study, run = finished
    data = study.parent / "tasks" / "pick.jsonl"
    before = data.read_text()
    data.write_text(before.replace("=", ":", 1))
    try:
        assert main(["run", str(study), "--out", str(run), "--device", "cpu"]) == 2
    finally:
        data.write_text(before)
    assert "the tasks' items have changed" in capsys.readouterr().err


def donor_with(zoo, folder, norm):
    """Donor c with another final norm."""
    shutil.copytree(zoo / "c", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], norm)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_failed_trial_is_told_and_the_search_goes_on(make_study, zoo, tmp_path):
    large = donor_with(zoo, tmp_path / "large", 1000.0)  # times 100 it is more than float16 holds
    changes = {"dtype": "float16", "search__scale": [0, 100], "search__trials": 20}
    study = make_study(tmp_path, models=[str(zoo / "a"), large], **changes)
    assert main(["run", str(study), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    failed = [t for t in trials_of(tmp_path / "run") if t.state == TrialState.FAIL]
    assert failed
    errors = [trial.user_attrs["error"] for trial in failed]
    assert any("'model.norm.weight' has NaN or Inf" in error for error in errors)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["failed_trials"] == len(failed)
    assert result["trials"] == 20 - len(failed)


def test_floor_on_a_task_decides_who_wins(make_study, tmp_path):
    study = make_study(tmp_path, objective__constraints={"tell": 0.06})
    run = tmp_path / "run"
    assert main(["run", str(study), "--out", str(run), "--device", "cpu"]) == 0
    missed = {trial.number: trial.constraints["floors"] for trial in trials_of(run)}
    assert any(missed.values())  # the floor is not for nothing
    assert not all(missed.values())
    result = json.loads((run / "result.json").read_text())
    assert missed[result["winner"]["trial"]] == 0
