"""The ready studies: those of real models are read, and their small twins find something."""

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from merge_engine.building.builder import Builder
from merge_engine.models.model_set import ModelSet
from objectives.harness.task_index import find_tasks
from search.cli import main
from search.proposing.recipes import to_recipe
from search.proposing.space import Space
from search.proposing.starts import warm_starts
from search.storing.folder import DATABASE
from search.storing.result import Result
from search.storing.store import Store
from search.storing.trials import TrialLog
from search.study.reading import load_study
from search.study.spec import ModelDifference

STUDIES = Path(__file__).parents[2] / "studies"
READY = sorted(file.parent.name for file in STUDIES.glob("*/tiny.yaml"))


def test_every_study_is_read_and_its_tasks_are_known():
    objectives = [load_study(file).objective for file in STUDIES.glob("*/study.yaml")]
    names = [entry.task for objective in objectives for entry in objective.tasks]
    folders = {folder for objective in objectives for folder in objective.include_path}
    find_tasks(names, [*folders])  # refuses an unknown one


@pytest.mark.parametrize("name", READY)
def test_small_twin_of_a_study_has_its_settings(name):
    real, twin = (load_study(STUDIES / name / file) for file in ("study.yaml", "tiny.yaml"))
    assert real.search.methods == twin.search.methods
    assert {type(donor) for donor in real.models} == {type(donor) for donor in twin.models}
    assert bool(real.objective.constraints) == bool(twin.objective.constraints)


def test_published_recipe_has_its_published_alpha():
    spec = load_study(STUDIES / "alpha" / "study.yaml")
    label, point = warm_starts(Space.from_spec(spec, (), "float16"))[-1]
    assert label == "start 1"
    assert point["scale"] == pytest.approx(0.3)


@settings(max_examples=5)
@given(st.floats(0.3, 1.5), st.floats(0.3, 1.5))
def test_build_is_the_base_plus_the_donors_differences(zoo, alpha, beta):
    _, built = built_with(zoo, alpha, beta)
    base, a, b, c = (load_file(zoo / name / "model.safetensors") for name in ("base", *"abc"))
    for name, start in base.items():
        expected = start + alpha * (a[name] - b[name]) + beta * (c[name] - start)
        torch.testing.assert_close(built[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.oracle
def test_mergekit_makes_the_same_of_the_recipe(zoo, mergekits, tmp_path):
    recipe, built = built_with(zoo, 0.7, 0.4)
    for name, tensor in mergekits(yaml.safe_load(recipe.to_yaml()), tmp_path).items():
        torch.testing.assert_close(built[name], tensor, rtol=1e-5, atol=1e-6)


def built_with(zoo, alpha, beta):
    """Base + alpha (a - b) + beta (c - base): the recipe and its weights."""
    base, *others = (str(zoo / name) for name in ("base", *"abc"))
    donors = (ModelDifference(model=others[0], minus=others[1]), others[2])
    space = Space(base, donors, ("task_arithmetic",), (0.0, 1.5), {})
    recipe = to_recipe(space, space.point("task_arithmetic", (alpha, beta)))
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    Builder(model, ModelSet.open([base, *others])).build(recipe)
    return recipe, model.state_dict()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a twin with a part of its trials and items; returns the result and the trials."""
    source = importlib.util.spec_from_file_location("demo_family", STUDIES / "demo" / "zoo.py")
    family = importlib.util.module_from_spec(source)
    source.loader.exec_module(family)
    family.train_family(STUDIES / "demo")  # a minute, if nobody has

    def run(name, trials, items):
        text = (STUDIES / name / "tiny.yaml").read_text().replace("..", str(STUDIES))
        study = yaml.safe_load(text)
        study["search"]["trials"], study["objective"]["items"] = trials, items
        folder = tmp_path_factory.mktemp(name)
        (folder / "study.yaml").write_text(yaml.safe_dump(study))
        command = ["run", str(folder / "study.yaml"), "--out", str(folder / "run")]
        assert main([*command, "--device", "cpu"]) == 0
        result = Result.model_validate_json((folder / "run" / "result.json").read_text())
        return result, TrialLog(Store(folder / "run" / DATABASE).study()).records()

    return run


def weights_of(result):
    """The winner's weight of each model, by the name of its folder."""
    entries = result.winner.recipe["models"]
    return {Path(entry["model"]).name: entry["parameters"]["weight"] for entry in entries}


@pytest.mark.slow
def test_alpha_is_found_between_none_and_all_of_the_difference(run):
    result, trials = run("alpha", 12, {"search": 90, "select": 60, "test": 90})
    weights = weights_of(result)
    assert weights.keys() == {"sort", "know"}
    assert weights["sort"] == -weights["know"]
    ends = [t.value for t in trials if t.start in ("base", "scale 1")]
    assert result.search_score > max(ends)
    assert {Path(model).name for model in result.donors} == {"sort", "know"}
    assert result.verdict == "better"


@pytest.mark.slow
def test_floors_that_follow_the_base_keep_its_score(run):
    result, trials = run("no_forgetting", 14, {"search": 120, "select": 80, "test": 120})
    violations = [trial.violation for trial in trials]
    assert violations[result.winner.trial] == 0
    assert any(violations)
    gained = result.winner.test.tasks["demo_sort"] - result.base.test.tasks["demo_sort"]
    assert gained > 0.15


@pytest.mark.slow
def test_every_method_is_tried_once_at_least(run):
    result, trials = run("stock_mix", 16, {"search": 20, "select": 20, "test": 20})
    tried = {trial.point["method"] for trial in trials}
    assert tried == set(load_study(STUDIES / "stock_mix" / "tiny.yaml").search.methods)
    assert result.failed_trials == 0
