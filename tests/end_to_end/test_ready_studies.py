"""The ready studies: those of real models are read, and their small twins find something."""

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from merge_engine.building.builder import Builder
from merge_engine.models.cache_folder import default_folder
from merge_engine.models.chat_templates import CHAT_TEMPLATES
from merge_engine.models.model_set import ModelSet
from objectives.harness.task_index import find_tasks
from search.cli import main
from search.proposing.recipes import to_recipe
from search.proposing.space import Space
from search.proposing.starts import warm_starts
from search.storing.folder import DATABASE
from search.storing.result import read_result
from search.storing.store import Store
from search.storing.trials import TrialLog
from search.study.reading import load_study
from search.study.spec import ModelDifference
from tiny_models import LETTERS, pickled_twin
from vocabularies import ENDS, make_with_tokens

STUDIES = Path(__file__).parents[2] / "studies"
READY = sorted(file.parent.name for file in STUDIES.glob("*/tiny.yaml"))


def test_every_study_is_read_and_its_tasks_are_known():
    objectives = [load_study(file).objective for file in STUDIES.glob("*/study.yaml")]
    names = [entry.task for objective in objectives for entry in objective.tasks]
    folders = {folder for objective in objectives for folder in objective.include_path}
    find_tasks(names, [*folders], default_folder())  # refuses an unknown one


@pytest.mark.parametrize("name", READY)
def test_small_twin_of_a_study_has_its_settings(name):
    real, twin = (load_study(STUDIES / name / file) for file in ("study.yaml", "tiny.yaml"))
    assert real.search.methods == twin.search.methods
    assert {type(donor) for donor in real.models} == {type(donor) for donor in twin.models}
    assert bool(real.objective.constraints) == bool(twin.objective.constraints)


def test_published_recipe_has_its_published_alpha():
    spec = load_study(STUDIES / "alpha" / "study.yaml")
    label, point = warm_starts(Space.from_spec(spec, (), "float16"))[0]
    assert label == "start 1"
    assert point["scale"] == pytest.approx(0.3)


PLAIN = [*ENDS, *LETTERS, *(f"<word {number}>" for number in range(400))]
LLAMA = [*PLAIN[:310], *(f"<|reserved_{number}|>" for number in range(6))]
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
CHATML = ["<|im_end|>", "<|im_start|>"]
CHATML_CHAT = CHAT_TEMPLATES["chatml"]
LLAMA_CHAT = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}"
    "<|eot_id|>{% endfor %}"
)
# Tokens, added tokens, rows and template of each model, as of the real ones at 1 / 401 and 1 / 100.
STOCK_MIX = {
    "Sao10K/L3-8B-Stheno-v3.2": (LLAMA, HEADERS, 320, LLAMA_CHAT),
    "refuelai/Llama-3-Refueled": (LLAMA, HEADERS, 320, LLAMA_CHAT),
    "cognitivecomputations/dolphin-2.9-llama3-8b": (
        LLAMA,
        [*HEADERS, *CHATML],
        322,
        CHAT_TEMPLATES["chatml"],
    ),
    "cgato/L3-TheSpice-8b-v0.8.3": (LLAMA, HEADERS, 320, None),
    "NeverSleep/Llama-3-Lumimaid-8B-v0.1-OAS": (LLAMA, HEADERS, 320, LLAMA_CHAT),
    "NousResearch/Hermes-2-Theta-Llama-3-8B": (  # ChatML in the place of reserved tokens
        *([*LLAMA[:312], *CHATML, *LLAMA[314:]], HEADERS, 320, CHATML_CHAT),
    ),
}
ALPHA = {
    "psmathur/orca_mini_v3_13b": (PLAIN[:320], [], 320, None),
    "WizardLM/WizardLM-13B-V1.2": (PLAIN[:320], ["[PAD]"], 321, None),
    "garage-bAInd/Platypus2-13B": (PLAIN[:320], [], 320, None),
}
FAMILIES = {"stock_mix": STOCK_MIX, "alpha": ALPHA}


@pytest.fixture(scope="module")
def real(make_study, tmp_path_factory):
    """Runs a real study over tiny models of its models' kinds; returns the folder."""

    def run(name, trials):
        folder = tmp_path_factory.mktemp(name)
        text = (STUDIES / name / "study.yaml").read_text()
        for seed, (model, (tokens, added, rows, template)) in enumerate(FAMILIES[name].items()):
            place = folder / "models" / model
            made = make_with_tokens(place, tokens, added, rows=rows, seed=seed, template=template)
            if name == "alpha":  # uploads of 2023
                place = pickled_twin(made, folder / "pickled" / model, shards=2)
            text = text.replace(model, str(place))
        study = yaml.safe_load(text)
        if "start" in study["search"]:
            recipe = (STUDIES / name / study["search"]["start"]).read_text()
            for model in FAMILIES[name]:
                recipe = recipe.replace(model, str(folder / "pickled" / model))
            (folder / "published.yaml").write_text(recipe)
            study["search"]["start"] = str(folder / "published.yaml")
        study["search"] |= {"trials": trials, "tune": False}
        chat = study["objective"].get("apply_chat_template", False)
        tasks = {"objective__apply_chat_template": chat}
        file = make_study(
            folder / "study", **tasks, **{k: study[k] for k in study if k != "objective"}
        )
        command = ["run", str(file), "--out", str(folder / "run"), "--device", "cpu"]
        assert main(command) == 0
        return folder

    return run


@pytest.mark.parametrize(("name", "trials"), [("stock_mix", 6), ("alpha", 8)])
def test_real_study_runs_on_tiny_models_of_its_rows_templates_and_formats(real, name, trials):
    folder = real(name, trials)
    run, base = folder / "run", next(iter(FAMILIES[name]))
    built = folder / "built"
    assert main(["build", str(run / "recipe.yaml"), str(built), "--device", "cpu"]) == 0
    mine, theirs = (load_file(f / "model.safetensors") for f in (run / "checkpoint", built))
    assert all(torch.equal(mine[tensor], theirs[tensor]) for tensor in {*mine, *theirs})
    assert len(mine["lm_head.weight"]) == len(mine["model.embed_tokens.weight"]) == 320
    result = AutoTokenizer.from_pretrained(run / "checkpoint")
    own = AutoTokenizer.from_pretrained(folder / "models" / base)
    assert result.get_vocab() == own.get_vocab()
    assert result.chat_template == own.chat_template
    records = TrialLog(Store(run / DATABASE).study()).records()
    states = [record.state for record in records]
    assert (states.count("complete"), states.count("fail")) == (trials, 0)


def test_row_that_is_another_token_in_hermes_is_named(make_study, tmp_path, capsys):
    names = [name for name in STOCK_MIX if "dolphin" not in name]
    for seed, name in enumerate(names):
        tokens, added, rows, template = STOCK_MIX[name]
        make_with_tokens(tmp_path / name, tokens, added, rows=rows, seed=seed, template=template)
    folders = [str(tmp_path / name) for name in names]
    search = {"methods": ["task_arithmetic"], "trials": 4}
    study = make_study(tmp_path / "s", base_model=folders[0], models=folders[1:], search=search)
    for command in (["check", str(study)], ["run", str(study), "--out", str(tmp_path / "run")]):
        assert main([*command, "--device", "cpu"]) == 0
        said = capsys.readouterr()
        (note,) = [line for line in (said.out + said.err).splitlines() if "differ in the" in line]
        assert "row 312 is '<|reserved_2|>' and '<|im_end|>'" in note
    recipe = tmp_path / "run" / "recipe.yaml"
    assert main(["build", str(recipe), str(tmp_path / "out"), "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "row 312 is '<|reserved_2|>' and '<|im_end|>'" in said.out + said.err


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
        study["search"]["tune"] = False  # which would take most of the time
        folder = tmp_path_factory.mktemp(name)
        (folder / "study.yaml").write_text(yaml.safe_dump(study))
        command = ["run", str(folder / "study.yaml"), "--out", str(folder / "run")]
        assert main([*command, "--device", "cpu"]) == 0
        result = read_result(folder / "run")
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
    result, trials = run("no_forgetting", 40, {"search": 120, "select": 80, "test": 120})
    violations = [trial.violation for trial in trials]
    assert violations[result.winner.trial] == 0
    assert any(violations)
    gained = result.winner.test.tasks["demo_sort"] - result.base.test.tasks["demo_sort"]
    assert gained > 0.15


@pytest.mark.slow
def test_every_method_is_tried_once_at_least(run):
    # a third of the trials has room for all warm starts
    result, trials = run("stock_mix", 60, {"search": 20, "select": 20, "test": 20})
    tried = {trial.point["method"] for trial in trials}
    assert tried == set(load_study(STUDIES / "stock_mix" / "tiny.yaml").search.methods)
    assert result.failed_trials == 0
