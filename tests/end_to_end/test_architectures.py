"""Whatever architecture: a study of it runs, and what it exports is what was searched."""

from random import Random

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, Gemma3nConfig, LlamaForCausalLM

from architectures import DENSE, ENCODER_DECODER, EXPERTS, MULTIMODAL, save_family
from in_memory import IN_MEMORY
from merge_engine.building.builder import Builder
from merge_engine.building.units import Units
from merge_engine.models.architecture import auto_class, load_config
from merge_engine.models.checkpoint import Checkpoint
from merge_engine.models.conversion import find_conversions
from merge_engine.models.model_set import ModelSet
from merge_engine.recipe.recipe_file import load_recipe, parse_recipe
from search.cli import main
from search.proposing.tuned_path import tuned_units
from tiny_models import make_tokenizer

MIXED = ["linear", "model_stock", "ties", "dare_linear"]  # of methods that name all models
ALL = tuple(dict.fromkeys((*DENSE, *EXPERTS, *MULTIMODAL, *ENCODER_DECODER)))


@pytest.fixture(params=ALL)
def family(request, tmp_path):
    """A folder with a base and two fine-tunes of it, as transformers saves them."""
    return save_family(tmp_path / request.param, request.param)


def test_study_runs_and_its_checkpoint_is_the_recipe(family, make_study, tmp_path):
    study = make_study(
        tmp_path / "study",
        base_model=str(family / "base"),
        models=[str(family / name) for name in "ab"],
        search={"methods": ["task_arithmetic", "ties"], "trials": 3},
        objective__items={"search": 8, "select": 8, "test": 8},
    )
    if family.name in DENSE:  # whose forward passes are tested elsewhere: without a written task
        text = study.read_text()
        study.write_text(text.replace("  - task: tell\n    weight: 2.0\n", ""))
    run = tmp_path / "run"
    assert main(["run", str(study), "--out", str(run), "--device", "cpu"]) == 0
    saved = stored(run / "checkpoint")
    assert saved.keys() == stored(family / "base").keys()
    assert main(["build", str(run / "recipe.yaml"), str(tmp_path / "built")]) == 0
    assert_equal(saved, stored(tmp_path / "built"))
    loaded, report = load(run / "checkpoint")
    assert not report["missing_keys"]
    recipe, _ = load_recipe(run / "recipe.yaml")
    live, _ = load(family / "base")
    Builder(live, ModelSet.open(recipe.models_read)).build(recipe)
    assert_equal(live.state_dict(), loaded.state_dict())


@pytest.mark.parametrize(("base", "donors"), [("multimodal", "text"), ("text", "multimodal")])
def test_text_only_and_multimodal_models_are_searched_together(
    base, donors, make_study, tmp_path, capsys
):
    """Of fine-tunes of one kind and a base of the other, the text is merged, the rest kept."""
    whole = save_family(tmp_path / "multimodal", "gemma3", ("a", "b"))
    for name in ("base", "a", "b"):
        model, _ = load(whole / name)
        text = AutoModelForCausalLM.from_config(model.config.text_config)
        text.config.tie_word_embeddings = True
        text.model.load_state_dict(model.model.language_model.state_dict())
        text.tie_weights()
        text.save_pretrained(tmp_path / "text" / name)
        make_tokenizer().save_pretrained(tmp_path / "text" / name)
    study = make_study(
        tmp_path / "study",
        base_model=str(tmp_path / base / "base"),
        models=[str(tmp_path / donors / name) for name in "ab"],
        search={"methods": MIXED, "trials": 12},
        objective__items={"search": 8, "select": 8, "test": 8},
    )
    run = tmp_path / "run"
    assert main(["run", str(study), "--out", str(run), "--device", "cpu"]) == 0
    said = "".join(capsys.readouterr())
    assert "failed" not in said
    assert "config.json" not in said
    saved, start = stored(run / "checkpoint"), stored(tmp_path / base / "base")
    assert saved.keys() == start.keys()
    for name, tensor in saved.items():
        if "vision" in name or "projector" in name:
            assert torch.equal(tensor, start[name]), name
    assert main(["build", str(run / "recipe.yaml"), str(tmp_path / "built")]) == 0
    assert_equal(saved, stored(tmp_path / "built"))
    text = study.read_text().replace("- linear\n", "- linear\n  - slerp\n")
    study.write_text(text)
    assert main(["check", str(study), "--device", "cpu"]) == 2
    assert "the recipes of slerp do not name them all; leave it out" in capsys.readouterr().err


def test_encoder_is_scored_by_an_objective_of_ones_own_alone(make_study, tmp_path, capsys):
    family = save_family(tmp_path, "bert")
    changes = {
        "base_model": str(family / "base"),
        "models": [str(family / name) for name in "ab"],
        "search": {"methods": ["task_arithmetic"], "trials": 3, "tune": False},
        "objective__items": {"search": 8, "select": 8, "test": 8},
    }
    own = [{"objective": "labels:Labels"}]
    study = make_study(tmp_path / "own", **changes, objective__tasks=own)
    assert main(["run", str(study), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    loaded, report = load(tmp_path / "run" / "checkpoint")
    assert type(loaded).__name__ == "BertForSequenceClassification"
    assert not report["missing_keys"]
    study = make_study(tmp_path / "tasks", **changes)
    assert main(["run", str(study), "--out", str(tmp_path / "no"), "--device", "cpu"]) == 2
    assert "BertForSequenceClassification, which writes no text" in capsys.readouterr().err


def test_type_that_needs_a_package_is_refused_by_its_name(make_study, tmp_path, capsys):
    family = save_family(tmp_path, "llama")
    for name in ("base", "a", "b"):
        config = Gemma3nConfig(
            text_config={"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
            architectures=["Gemma3nForConditionalGeneration"],
        )
        config.save_pretrained(family / name)
    donors = [str(family / name) for name in "ab"]
    study = make_study(tmp_path / "study", base_model=str(family / "base"), models=donors)
    assert main(["check", str(study), "--device", "cpu"]) == 2
    assert "timm" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "run"])
def test_tensors_that_do_not_become_the_live_models_are_refused_before_it_is_loaded(
    command, make_study, tmp_path, capsys, monkeypatch
):
    tied = save_family(tmp_path / "tied", "llama", (), tie_word_embeddings=True)
    untied = save_family(tmp_path / "untied", "llama")
    donors = [str(untied / name) for name in "ab"]
    study = make_study(tmp_path / "study", base_model=str(tied / "base"), models=donors)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", None)  # would raise
    out = ["--out", str(tmp_path / "run")] if command == "run" else []
    assert main([command, str(study), *out, "--device", "cpu"]) == 2
    assert "'lm_head.weight', which the live model ties" in capsys.readouterr().err


def load(folder):
    auto = auto_class(load_config(folder))
    return auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)


def stored(folder):
    checkpoint = Checkpoint(str(folder))
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def assert_equal(tensors, others):
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


# mergekit's table of the type names tensors that the tiny model does not have
UNKNOWN_TO_MERGEKIT = ("gemma3", "qwen3_vl", "gpt_neox")


@pytest.mark.oracle
def test_mergekit_agrees_on_the_tensors_of_the_live_model(family, build, mergekits, tmp_path):
    if family.name in UNKNOWN_TO_MERGEKIT:
        pytest.skip("mergekit wants tensors that this type does not have")
    weights = {"a": 0.6, "b": 0.5}
    entries = [{"model": str(family / n), "parameters": {"weight": w}} for n, w in weights.items()]
    mapping = {"merge_method": "ties", "models": entries, "dtype": "float32"}
    mapping["base_model"] = str(family / "base")
    theirs = mergekits(mapping, tmp_path / "theirs")
    ours = build(mapping, tmp_path / "ours")
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    live = dict(ours)
    for conversion in find_conversions(load(family / "base")[0], shapes):
        live |= conversion.convert({name: ours[name] for name in conversion.names})
    assert theirs.keys() <= live.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(live[name], tensor, rtol=1e-5, atol=1e-6)


def assert_equals_mergekits(ours, theirs, model):
    """Compare stored tensors with mergekit's, which has those of the live model of some types."""
    live, shapes = dict(ours), {name: tuple(tensor.shape) for name, tensor in ours.items()}
    for conversion in find_conversions(model, shapes):
        live |= conversion.convert({name: ours[name] for name in conversion.names})
    assert theirs.keys() <= live.keys()
    for name, tensor in theirs.items():
        error = (live[name] - tensor).abs().max()
        assert error <= 1e-5 * tensor.abs().max(), name


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "minimax", "nemotron_h"])
@pytest.mark.parametrize("by", ["tensor", "split"])
def test_mergekit_rebuilds_a_recipe_with_a_weight_for_every_unit(name, by, mergekits, tmp_path):
    """The last three have other names for tensors in memory than in a checkpoint."""
    family = save_family(tmp_path / name, name)
    model_set = ModelSet.open([str(family / each) for each in ("base", "a", "b")])
    random = Random(0)
    if by == "tensor":
        filters = tuned_units("tensor", model_set, ((),)).filters
    else:
        parts = [*((n,) for n in model_set.names if "norm" in n or ".gate." in n), ()]
        filters = Units.of_filters(model_set.names, parts).with_live_names(model_set).filters

    def weight():
        clauses = []
        for of_unit in filters:
            value = {"value": random.uniform(-1, 1)}
            clauses += [{"filter": each, **value} for each in of_unit] or [value]
        return clauses

    entries = [{"model": str(family / n), "parameters": {"weight": weight()}} for n in "ab"]
    recipe, notes = parse_recipe(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(family / "base"),
            "models": entries,
            "dtype": "float32",
        },
        "recipe",
    )
    assert not notes
    model_set.place(torch.device("cpu"), IN_MEMORY)
    live, _ = load(family / "base")
    builder = Builder(live, model_set)
    builder.build(recipe)
    theirs = mergekits(yaml.safe_load(recipe.to_yaml()), tmp_path / "theirs")
    assert_equals_mergekits(dict(builder.tensors()), theirs, live)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe"])
def test_mergekit_makes_the_checkpoint_of_a_search_that_tuned_weights(
    name, make_study, mergekits, tmp_path
):
    """Of a model with a head of its own, and of two whose experts are stacked in memory."""
    family = save_family(tmp_path / name, name)
    study = make_study(
        tmp_path / "study",
        base_model=str(family / "base"),
        models=[str(family / each) for each in "ab"],
        search={"methods": ["task_arithmetic"], "trials": 1, "tune": True},
        objective__items={"search": 8, "select": 8, "test": 8},
    )
    run = tmp_path / "run"
    assert main(["run", str(study), "--out", str(run), "--device", "cpu"]) == 0
    mapping = yaml.safe_load((run / "recipe.yaml").read_text())
    assert all(len(entry["parameters"]["weight"]) > 10 for entry in mapping["models"])
    theirs = mergekits(mapping, tmp_path / "theirs")
    assert_equals_mergekits(stored(run / "checkpoint"), theirs, load(family / "base")[0])
