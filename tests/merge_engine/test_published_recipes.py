"""Two recipes our users start from, as written, on tiny models laid out as a hub cache."""

from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.torch import load_file

from search.cli import main

STOCK = """
models:
- model: refuelai/Llama-3-Refueled
- model: cognitivecomputations/dolphin-2.9-llama3-8b
- model: cgato/L3-TheSpice-8b-v0.8.3
- model: NeverSleep/Llama-3-Lumimaid-8B-v0.1-OAS
- model: NousResearch/Hermes-2-Theta-Llama-3-8B
merge_method: model_stock
base_model: Sao10K/L3-8B-Stheno-v3.2
normalize: false
int8_mask: true
dtype: bfloat16
"""
ARITHMETIC = """
merge_method: task_arithmetic
base_model: garage-bAInd/Platypus2-13B
models:
- model: psmathur/orca_mini_v3_13b
  parameters:
    weight: 1.0
- model: WizardLM/WizardLM-13B-V1.2
  parameters:
    weight: 0.3
"""
REVISION = "0" * 40


@pytest.fixture(scope="module")
def cache(make_model, tmp_path_factory):
    """A hub cache that holds every model of both recipes, in bfloat16."""
    folder = tmp_path_factory.mktemp("hub")
    for text in (STOCK, ARITHMETIC):
        recipe = yaml.safe_load(text)
        base = make_in_cache(folder, recipe["base_model"], make_model, seed=0)
        for seed, entry in enumerate(recipe["models"], start=1):
            make_in_cache(folder, entry["model"], make_model, seed=seed, base=base)
    return folder


@pytest.fixture
def hub(cache, monkeypatch):
    """The cache as the hub client's own; it is offline, so all else is missing."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def make_in_cache(cache: Path, name: str, make_model, **options) -> Path:
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    return make_model(folder / "snapshots" / REVISION, dtype=torch.bfloat16, **options)


def built(text: str, folder: Path) -> dict[str, torch.Tensor]:
    """What our command makes of a recipe."""
    (folder / "recipe.yaml").write_text(text)
    assert (
        main(["build", str(folder / "recipe.yaml"), str(folder / "mine"), "--device", "cpu"]) == 0
    )
    return load_file(folder / "mine" / "model.safetensors")


def mergekits(hub: Path, mapping: dict, folder: Path) -> dict[str, torch.Tensor]:
    """What mergekit makes of it; offline it ignores the cache, so it is given folders."""

    def snapshot(name: str) -> str:
        return str(hub / f"models--{name.replace('/', '--')}" / "snapshots" / REVISION)

    models = [entry | {"model": snapshot(entry["model"])} for entry in mapping["models"]]
    found = mapping | {"models": models, "base_model": snapshot(mapping["base_model"])}
    config = MergeConfiguration.model_validate(found)
    run_merge(config, str(folder / "theirs"), MergeOptions(quiet=True, write_model_card=False))
    return load_file(folder / "theirs" / "model.safetensors")


@pytest.mark.oracle
@pytest.mark.parametrize("text", [STOCK, ARITHMETIC], ids=["model_stock", "task_arithmetic"])
def test_recipe_as_written_agrees_with_mergekit_in_float32_to_a_rounding(hub, tmp_path, text):
    mine = built(text, tmp_path)
    exact = yaml.safe_load(text) | {"dtype": "float32", "out_dtype": "bfloat16"}
    theirs = mergekits(hub, exact, tmp_path)
    assert mine.keys() == theirs.keys()
    differing = elements = 0
    for name, tensor in mine.items():
        assert tensor.dtype == torch.bfloat16
        steps = tensor.view(torch.int16).int() - theirs[name].view(torch.int16).int()
        assert steps.abs().max() <= 1  # in the last place: a rounding that went the other way
        differing += int(steps.count_nonzero())
        elements += steps.numel()
    assert differing <= 0.005 * elements


@pytest.mark.oracle
@pytest.mark.parametrize("text", [STOCK, ARITHMETIC], ids=["model_stock", "task_arithmetic"])
def test_recipe_as_written_agrees_with_mergekit_as_written_to_its_16_bit_error(hub, tmp_path, text):
    mine = built(text, tmp_path)
    theirs = mergekits(hub, yaml.safe_load(text), tmp_path)
    for name, tensor in mine.items():
        error = tensor.float() - theirs[name].float()  # up to 3 half steps of bfloat16, rms
        assert error.pow(2).mean().sqrt() <= 0.012 * tensor.float().pow(2).mean().sqrt()


@pytest.mark.usefixtures("hub")
def test_keys_at_the_top_level_are_noted(tmp_path, capsys):
    built(STOCK, tmp_path)
    output = " ".join(capsys.readouterr().out.split())
    assert "normalize: False is at the top level, where mergekit ignores it" in output
    assert "model_stock has no parameter 'normalize'; no effect" in output
    assert "int8_mask: True is at the top level" in output


@pytest.mark.usefixtures("hub")
def test_built_folder_has_config_and_tokenizer_of_the_base(tmp_path):
    built(ARITHMETIC, tmp_path)
    names = {path.name for path in (tmp_path / "mine").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= names


def entry(model, **parameters):
    return {"model": model, "parameters": parameters} if parameters else {"model": model}


def layers(model, first, last, **parameters):
    return entry(model, **parameters) | {"layer_range": [first, last]}


FADING = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}]
FADING += [{"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]}, {"value": 0.5}]
SILENT = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]
SHAPES = {  # the forms of recipes that are published most, for the models base, a, b, c
    "linear": {
        "merge_method": "linear",
        "models": [entry("a", weight=1.0), entry("b", weight=0.3), entry("c", weight=0.5)],
    },
    "slerp, gradients by filter over slices": {
        "merge_method": "slerp",
        "base_model": "a",
        "parameters": {"t": FADING},
        "slices": [{"sources": [layers("a", 0, 3), layers("b", 0, 3)]}],
    },
    "slerp, the base not among the models": {
        "merge_method": "slerp",
        "base_model": "base",
        "models": [entry("a")],
        "parameters": {"t": 0.45},
    },
    "ties, gradients and filters by model": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            entry("a", density=[1, 0.7, 0.1], weight=1.0),
            entry("b", density=0.5, weight=[0, 0.3, 0.7, 1]),
            entry("c", density=0.33, weight=[{"filter": "mlp", "value": 0.5}, {"value": 0}]),
        ],
        "parameters": {"normalize": True, "int8_mask": True},
    },
    "stacked layers of two models": {
        "merge_method": "passthrough",
        "slices": [{"sources": [layers("a", 0, 2)]}, {"sources": [layers("b", 1, 3)]}],
    },
    "stacked layers with silent copies": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [layers("a", 0, 2)]},
            {"sources": [layers("a", 1, 2, scale=SILENT)]},
            {"sources": [layers("a", 2, 3)]},
        ],
    },
    "task arithmetic with a negative weight": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [entry("a", weight=1.0), entry("b", weight=-0.4)],
    },
    "task arithmetic, the base among the models": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [entry("base"), entry("a", weight=0.6), entry("b", weight=0.4)],
        "parameters": {"normalize": False, "lambda": 0.8},
    },
    "model stock": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": [entry("a"), entry("b"), entry("c")],
    },
    "nuslerp": {
        "merge_method": "nuslerp",
        "models": [entry("a", weight=0.6), entry("b", weight=0.4)],
    },
    "multislerp": {
        "merge_method": "multislerp",
        "models": [entry("a", weight=0.5), entry("b", weight=0.3), entry("c", weight=0.2)],
    },
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        "base_model": "base",
        "models": [entry("a", weight=0.5, density=0.9, gamma=0.01), entry("b", weight=0.5)],
    },
}
RANDOM_SHAPES = {
    "dare_ties": {
        "merge_method": "dare_ties",
        "base_model": "base",
        "models": [
            entry("base"),
            entry("a", density=0.53, weight=0.4),
            entry("b", density=[0.5, 0.6], weight=[0.2, 0.4]),
        ],
        "parameters": {"int8_mask": True},
    },
    "della": {
        "merge_method": "della",
        "base_model": "base",
        "models": [entry("a", density=0.7, weight=0.5, epsilon=0.1)],
        "parameters": {"lambda": 1.1},
        "chat_template": "llama3",
        "tokenizer_source": "union",
    },
}


def in_zoo(zoo, mapping):
    """The recipe with folders as models, in float32."""

    def placed(part):
        if isinstance(part, list):
            return [placed(each) for each in part]
        if not isinstance(part, dict):
            return part
        keys = ("model", "base_model")
        return {k: str(zoo / v) if k in keys else placed(v) for k, v in part.items()}

    return placed(mapping) | {"dtype": "float32"}


@pytest.mark.oracle
@pytest.mark.parametrize("shape", SHAPES)
def test_published_shape_equals_mergekits(zoo, tmp_path, build, mergekits, shape):
    mapping = in_zoo(zoo, SHAPES[shape])
    mine, theirs = build(mapping, tmp_path / "mine"), mergekits(mapping, tmp_path / "theirs")
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("shape", [*SHAPES, *RANDOM_SHAPES])
def test_published_shape_is_checked_and_built_by_the_commands(zoo, tmp_path, shape):
    mapping = in_zoo(zoo, {**SHAPES, **RANDOM_SHAPES}[shape])
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(mapping))
    assert main(["check", str(tmp_path / "r.yaml"), "--device", "cpu"]) == 0
    assert built(yaml.safe_dump(mapping), tmp_path)
