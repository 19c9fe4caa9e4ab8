"""Tuning within a run: points of the path are trials, and a killed run goes on with the same path.

Real tiny models and real lm-eval tasks.
"""

import json

import numpy as np
import pytest
import yaml

from merge_engine.recipe.recipe_file import load_recipe
from search.cli import main
from search.proposing.tuned_path import PATH_PREFIX
from search.proposing.tuning import FIRST_POINT, GRADIENT_COST
from search.storing.folder import DATABASE
from search.storing.store import Store
from search.storing.trials import OpenTrial, TrialLog


@pytest.fixture(scope="module")
def study(make_study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    return make_study(folder, search__trials=5, search__tune=True)


def start(study, run):
    return main(["run", str(study), "--out", str(run), "--device", "cpu"])


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    assert start(study, run) == 0
    return run


def steps_and_points(run):
    store = Store(run / DATABASE)
    steps = [(one.path, one.step, one.losses) for one in store.steps()]
    return steps, [point.tobytes() for point in store.states(points=True)]


def test_points_of_the_path_are_the_first_trials(finished):
    trials = TrialLog(Store(finished / DATABASE).study()).complete()
    labels = [trial.start for trial in trials]
    assert labels[:2] == [
        f"{PATH_PREFIX}{FIRST_POINT} steps",
        f"{PATH_PREFIX}{2 * FIRST_POINT} steps",
    ]
    assert [trial.point["position"] for trial in trials[:2]] == [1.0, 2.0]
    assert trials[0].point["strength"] == 1.0
    assert trials[0].recipe != trials[1].recipe


def test_tuning_lowers_the_loss_of_its_items(finished):
    losses = [np.mean([*one.losses.values()]) for one in Store(finished / DATABASE).steps()[1:]]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_gradients_are_counted_as_evaluations(finished):
    result = json.loads((finished / "result.json").read_text())
    steps = Store(finished / DATABASE).steps()
    items = 16 * sum(one.step > 0 for one in steps)
    assert result["split_evaluations"]["tune"] == GRADIENT_COST * items
    assert result["item_evaluations"] == sum(result["split_evaluations"].values())


@pytest.mark.parametrize("after", [0, 7, FIRST_POINT])
def test_killed_run_goes_on_with_the_same_path(study, finished, after, tmp_path, monkeypatch):
    run, save, saved = tmp_path / "run", Store.save_step, []

    def save_and_die(store, step, state):
        save(store, step, state)
        saved.append(step)
        if step.step == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "save_step", save_and_die)
        assert start(study, run) != 0
    assert saved[-1].step == after
    assert start(study, run) == 0
    assert steps_and_points(run) == steps_and_points(finished)
    recipes = [(folder / "recipe.yaml").read_text() for folder in (run, finished)]
    assert recipes[0] == recipes[1]


def test_run_killed_before_a_point_is_told_goes_on_with_the_path(
    study, finished, tmp_path, monkeypatch
):
    def die(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OpenTrial, "tell", die)
        assert start(study, tmp_path / "run") != 0
    assert start(study, tmp_path / "run") == 0
    assert steps_and_points(tmp_path / "run") == steps_and_points(finished)
    recipes = [(folder / "recipe.yaml").read_text() for folder in (tmp_path / "run", finished)]
    assert recipes[0] == recipes[1]


def test_recipe_has_no_more_donors_than_it_may(study, tmp_path):
    mapping = yaml.safe_load(study.read_text())
    mapping["search"] |= {"at_most": 2, "trials": 1, "scale": [0.6, 1.0]}  # the start has 0.5
    file = study.parent / "two.yaml"
    file.write_text(yaml.safe_dump(mapping))
    assert start(file, tmp_path / "run") == 0
    store = Store(tmp_path / "run" / DATABASE)
    (trial,) = TrialLog(store.study()).complete()
    assert 0.6 <= trial.point["scale"] <= 1.0
    weights = store.states(points=True)[-1][-1]
    assert weights.any(axis=0).sum() == 2
    recipe, _ = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert len(recipe.donors) == 2


def test_averages_are_tuned_too(study, tmp_path):
    mapping = yaml.safe_load(study.read_text())
    mapping["search"] |= {"methods": ["linear"], "trials": 1}
    file = study.parent / "linear.yaml"
    file.write_text(yaml.safe_dump(mapping))
    assert start(file, tmp_path / "run") == 0
    first, last = (state[-1] for state in Store(tmp_path / "run" / DATABASE).states(points=True))
    assert not np.allclose(first, last)


def test_study_without_gradients_is_refused_if_it_is_to_be_tuned(study, tmp_path, capsys):
    mapping = yaml.safe_load(study.read_text())
    mapping["search"]["methods"] = ["ties"]
    file = study.parent / "ties.yaml"
    file.write_text(yaml.safe_dump(mapping))
    assert start(file, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "search.tune" in error
    assert "task_arithmetic" in error


def test_page_shows_every_step_and_every_point_of_the_path(finished):
    store, page = Store(finished / DATABASE), (finished / "report.html").read_text()
    steps = [one for one in store.steps() if one.step]
    assert f"{len(steps)} gradient steps" in page
    assert all(f"<title>step {one.step}: " in page for one in steps)
    trials = TrialLog(store.study()).complete()
    points = [trial for trial in trials if (trial.start or "").startswith(PATH_PREFIX)]
    assert all(f"<title>trial {trial.number}, {trial.start}: " in page for trial in points)
