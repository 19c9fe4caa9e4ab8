"""Whole recipes against mergekit's own ``run_merge``, and what is done better than there."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from merge_engine.building.builder import Builder
from merge_engine.building.plan import plan_merge
from merge_engine.errors import MergeError
from merge_engine.models.model_set import ModelSet
from merge_engine.recipe.recipe_file import parse_recipe
from tiny_models import make_model


def assert_equal(mine, theirs, atol=1e-6):
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=atol, msg=name)


@pytest.fixture
def names(zoo):
    return {name: str(zoo / name) for name in ("base", "a", "b", "c")}


def sources(names, models, layers, **parameters):
    return [
        {"model": names[m], "layer_range": layers, "parameters": parameters.get(m, {})}
        for m in models
    ]


def ties_of_two_slices(names):
    """Every scope of parameters, gradients and filters on both sides of a renumbering."""
    first = {"weight": [{"filter": "mlp", "value": [0.9, 0.1]}, {"value": 0.4}], "density": 0.5}
    return {
        "merge_method": "ties",
        "base_model": names["base"],
        "dtype": "float32",
        "parameters": {"normalize": True, "lambda": 0.8, "density": 0.9},
        "slices": [
            {
                "sources": sources(names, ["base", "a", "b"], [0, 2], a=first),
                "parameters": {"weight": [0.2, 0.6], "lambda": [{"filter": "q_proj", "value": 2}]},
            },
            {
                "sources": sources(
                    names,
                    ["base", "a", "b"],
                    [1, 3],
                    a={"weight": [{"filter": "layers.1.", "value": 0.3}, {"value": 1.1}]},
                    b={"weight": 0.7},
                ),
                "parameters": {"lambda": [{"filter": "layers.2.", "value": 1.5}]},
            },
        ],
    }


def passthrough_stack(names):
    return {
        "merge_method": "linear",
        "dtype": "float32",
        "base_model": names["a"],
        "parameters": {"weight": 1.0},
        "slices": [
            {"sources": sources(names, ["a"], [0, 2])},
            {"sources": sources(names, ["b"], [1, 3])},
            {"sources": sources(names, ["a"], [1, 3])},
            {"sources": sources(names, ["c"], [3, 3])},  # no layers: it gives the head alone
        ],
    }


def slerp_of_slices(names):
    ends = {"base_model": names["b"], "parameters": {"t": [0.1, 0.5, 0.9]}}
    return {
        "merge_method": "slerp",
        "base_model": names["a"],
        "dtype": "float32",
        "out_dtype": "bfloat16",
        "parameters": {"t": 0.3},
        "slices": [
            {"sources": sources(names, ["a", "b"], [0, 1])},
            {"sources": sources(names, ["a", "b"], [0, 3])} | ends,
        ],
    }


def module_of_slices(names):
    whole = ties_of_two_slices(names)
    module = {"slices": whole.pop("slices"), "parameters": {"density": 0.4}}
    return whole | {"modules": {"default": module}}


def module_of_models(names):
    models = [{"model": names[m], "parameters": {"weight": w}} for m, w in (("a", 0.3), ("b", 0.9))]
    module = {"models": models, "parameters": {"lambda": [0.5, 1.5]}}
    return {
        "merge_method": "task_arithmetic",
        "base_model": names["base"],
        "dtype": "float32",
        "modules": {"default": module},
    }


@pytest.mark.oracle
@pytest.mark.parametrize(
    "make",
    [ties_of_two_slices, passthrough_stack, slerp_of_slices, module_of_slices, module_of_models],
)
def test_whole_recipe_equals_mergekits(names, tmp_path, build, mergekits, make):
    mapping = make(names)
    atol = 1e-6 if "out_dtype" not in mapping else 4e-3  # a rounding of bfloat16
    assert_equal(build(mapping, tmp_path / "mine"), mergekits(mapping, tmp_path / "theirs"), atol)


def test_stack_loads_with_its_number_of_layers(names, tmp_path, build):
    built = build(passthrough_stack(names), tmp_path / "mine")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    assert model.config.num_hidden_layers == 6
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in built.items())


def test_last_slice_has_its_models_for_the_head_though_the_first_has_fewer(names, tmp_path, build):
    """mergekit sizes what comes after the layers by the first slice and forgets b here."""
    mapping = passthrough_stack(names)
    mapping["slices"] = [
        {"sources": sources(names, ["a"], [0, 1])},
        {"sources": sources(names, ["a", "b"], [1, 3])},
    ]
    built = build(mapping, tmp_path / "mine")
    a, b = (load_file(f"{names[n]}/model.safetensors") for n in "ab")
    for name in ("lm_head.weight", "model.norm.weight", "model.layers.2.mlp.up_proj.weight"):
        torch.testing.assert_close(built[name], (a[name] + b[name]) / 2)
    assert torch.equal(built["model.embed_tokens.weight"], a["model.embed_tokens.weight"])


@pytest.mark.oracle
def test_gpt2_is_stacked_like_mergekit_does(tmp_path, build, mergekits):
    torch.manual_seed(0)
    shape = {"n_layer": 3, "n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    for name in "ab":
        GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / name)
    names = {name: str(tmp_path / name) for name in "ab"}
    mapping = {
        "merge_method": "linear",
        "dtype": "float32",
        "parameters": {"weight": [{"filter": "mlp", "value": 0.3}, {"value": 1}]},
        "base_model": names["a"],
        "slices": [
            {"sources": sources(names, ["a", "b"], [0, 3], a={"weight": [0.0, 0.5]})},
            {"sources": sources(names, ["b", "a"], [1, 3], b={"weight": [0.1, 0.4]})},
        ],
    }
    assert_equal(
        build(mapping, tmp_path / "mine"),
        mergekits(mapping, tmp_path / "theirs", copy_tokenizer=False),
    )
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["n_layer"] == 5


def test_what_a_config_lists_for_each_layer_is_stacked_too(names, tmp_path, make_model):
    model = make_model(tmp_path / "m", seed=0)
    config = json.loads((model / "config.json").read_text())
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    (model / "config.json").write_text(json.dumps(config | {"layer_types": kinds}))
    mapping = passthrough_stack({**dict.fromkeys("abc", str(model))})
    config = plan_merge(parse_recipe(mapping, "r")[0]).files.config
    assert config["layer_types"] == [*kinds[:2], *kinds[1:], *kinds[1:]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": [0, 4]}, r"slices\[0\]: layer_range \[0, 4\] of '.*/a' goes beyond its 3 layers"),
        ({"a": [2, 1]}, r"slices\[0\]: '.*/a': layer_range \[2, 1\] ends before it starts"),
        ({"a": [-1, 1]}, "slices.0.sources.0.layer_range.0: Input should be greater than or equal"),
        ({"a": [0, 1], "b": [0, 2]}, r"slices\[0\]: '.*/b' gives 2 layers and '.*/a' 1"),
    ],
)
def test_layers_that_are_not_there_are_refused_by_name(names, changes, message):
    entries = [{"model": names[m], "layer_range": layers} for m, layers in changes.items()]
    mapping = passthrough_stack(names) | {"slices": [{"sources": entries}]}
    with pytest.raises(MergeError, match=message):
        plan_merge(parse_recipe(mapping, "r.yaml")[0])


def test_base_that_is_no_source_of_a_slice_is_refused(names):
    mapping = ties_of_two_slices(names)
    mapping["slices"][1]["sources"].pop(0)
    with pytest.raises(MergeError, match=r"slices\[1\]: ties needs a base_model; .* list it among"):
        parse_recipe(mapping, "r.yaml")


def test_live_model_of_other_depth_is_refused(names):
    models = ModelSet.open(names.values())
    live = AutoModelForCausalLM.from_pretrained(names["base"])
    recipe, _ = parse_recipe(passthrough_stack(names), "r.yaml")
    with pytest.raises(MergeError, match="the merge has 6 layers and the live model 3"):
        Builder(live, models).build(recipe)


def test_live_model_is_built_from_slices_of_its_depth(names, tmp_path, build):
    mapping = ties_of_two_slices(names)
    mapping["slices"][1]["sources"] = [
        source | {"layer_range": [2, 3]} for source in mapping["slices"][1]["sources"]
    ]
    live = AutoModelForCausalLM.from_pretrained(names["base"])
    Builder(live, ModelSet.open(names.values())).build(parse_recipe(mapping, "r.yaml")[0])
    built = build(mapping, tmp_path / "mine")
    assert all(torch.equal(tensor, built[name]) for name, tensor in live.state_dict().items())


@pytest.mark.parametrize(
    "make", [ties_of_two_slices, passthrough_stack, slerp_of_slices, module_of_slices]
)
def test_stacked_recipe_survives_yaml(names, make):
    recipe, _ = parse_recipe(make(names), "r.yaml")
    again, notes = parse_recipe(yaml.safe_load(recipe.to_yaml()), "again")
    assert again == recipe
    assert again.key == recipe.key
    assert not notes


def two_models(names, method="task_arithmetic", **models):
    entries = [{"model": names[m], "parameters": {"weight": w}} for m, w in models.items()]
    base = {} if method == "linear" else {"base_model": names["base"]}
    return {"merge_method": method, "models": entries, "dtype": "float32"} | base


@pytest.fixture
def tied(make_model, tmp_path):
    """A tied base and a tied donor, and a donor with a head of its own."""
    base = make_model(tmp_path / "base", seed=0, tie_word_embeddings=True)
    make_model(tmp_path / "tied", seed=1, base=base)
    model = make_model(tmp_path / "untied", seed=2, base=base)
    tensors = load_file(model / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] + 0.01
    save_file(tensors | {"lm_head.weight": head}, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return {name: str(tmp_path / name) for name in ("base", "tied", "untied")}


@pytest.mark.oracle
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("others", [("tied",), ("tied", "untied")])
def test_tied_and_untied_heads_are_merged_like_mergekit_does(
    tied, tmp_path, build, mergekits, method, others
):
    mapping = two_models(tied, method, **dict.fromkeys(others, 0.7))
    mine = build(mapping, tmp_path / "mine")
    assert_equal(mine, mergekits(mapping, tmp_path / "theirs"))
    assert ("lm_head.weight" in mine) == ("untied" in others)


def test_config_is_untied_if_there_is_a_head(tied, tmp_path, build):
    """mergekit copies the base's flag, and what trusts it loads the embedding as the head."""
    mine = build(two_models(tied, tied=0.5, untied=0.5), tmp_path / "mine")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, mine["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_live_model_with_a_tied_head_takes_no_other_head(tied):
    live = AutoModelForCausalLM.from_pretrained(tied["base"])
    with pytest.raises(MergeError, match=r"has 'lm_head.weight', which the live model ties"):
        Builder(live, ModelSet.open(tied.values()))


@pytest.fixture
def biased(make_model, tmp_path):
    """Two donors of which one has biases in its attention, and a base with and one without."""
    plain = make_model(tmp_path / "plain", seed=0)
    base = make_model(tmp_path / "base", seed=0, attention_bias=True)
    make_model(tmp_path / "a", seed=1, base=base)
    make_model(tmp_path / "b", seed=2, base=base)
    make_model(tmp_path / "c", seed=3, base=plain)
    return {name: str(tmp_path / name) for name in ("base", "plain", "a", "b", "c")}


BIAS = "model.layers.1.self_attn.q_proj.bias"


def test_tensor_that_a_donor_lacks_is_merged_from_those_that_have_it(biased, tmp_path, build):
    a, base = (load_file(f"{biased[n]}/model.safetensors")[BIAS] for n in ("a", "base"))
    linear = build(two_models(biased, "linear", a=0.3, c=0.9), tmp_path / "linear")
    torch.testing.assert_close(linear[BIAS], a)  # renormalised over the models present
    vectors = build(two_models(biased, a=0.3, c=0.9), tmp_path / "vectors")
    torch.testing.assert_close(vectors[BIAS], base + 0.3 * (a - base))
    mapping = {"merge_method": "slerp", "base_model": biased["a"], "parameters": {"t": 0.9}}
    mapping["models"] = [{"model": biased["c"]}, {"model": biased["a"]}]
    assert torch.equal(build(mapping, tmp_path / "slerp")[BIAS], a)
    stock = two_models(biased, "model_stock", a=0, b=0, c=0)
    stock["models"] = [{"model": entry["model"]} for entry in stock["models"]]
    assert not torch.equal(build(stock, tmp_path / "stock")[BIAS], base)
    stock["models"] = [*stock["models"][1:], {"model": biased["plain"]}]
    assert torch.equal(build(stock, tmp_path / "too few")[BIAS], base)


def test_tensor_that_the_base_lacks_has_no_task_vector(biased, tmp_path, build):
    mapping = two_models(biased, a=0.3, c=0.9) | {"base_model": biased["plain"]}
    with pytest.raises(MergeError, match=r"k_proj.bias' is missing in the base model '.*plain'"):
        build(mapping, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("gap", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_model_with_a_gap_is_not_merged(names, tmp_path, make_model, gap):
    model = make_model(tmp_path / "gap", seed=0)
    tensors = load_file(model / "model.safetensors")
    tensors.pop(gap)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(MergeError, match=f"lacks '{gap}', which '.*base' has"):
        plan_merge(parse_recipe(two_models(names | {"b": str(model)}, a=1, b=1), "r")[0])


def test_other_vocabulary_without_a_tokenizer_option_names_it(names, tmp_path, make_model):
    other = {"b": str(make_model(tmp_path / "b", seed=0, vocab_size=50))}
    with pytest.raises(MergeError, match=r"\[48, 32\] against \[50, 32\]; .*tokenizer_source"):
        plan_merge(parse_recipe(two_models(names | other, a=1, b=1), "r")[0])


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_number_that_is_none_leaves_a_live_model_of_no_recipe(names, tmp_path, make_model, number):
    model = make_model(tmp_path / "broken", seed=0)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = number
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    mapping = two_models(names | {"b": str(model)}, a=1, b=1)
    live = Builder(
        AutoModelForCausalLM.from_pretrained(names["a"]), ModelSet.open([*names.values()])
    )
    live.model_set = ModelSet.open([names["base"], names["a"], str(model)])
    with pytest.raises(MergeError, match=r"broken/model.safetensors: 'model.norm.weight' has NaN"):
        live.build(parse_recipe(mapping, "r")[0])
    assert live.loaded is None


@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize(
    "method", ["ties", "dare_ties", "breadcrumbs", "della", "sce", "ram", "ramplus_tl"]
)
def test_method_that_would_drop_a_nan_refuses_it_by_file_and_tensor(
    names, tmp_path, make_model, build, method, density
):
    model = make_model(tmp_path / "broken", seed=0)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    mapping = two_models(names | {"b": str(model)}, method, a=1, b=1)
    mapping["parameters"] = {"density": density}
    with pytest.raises(MergeError, match=r"^\S*broken/model.safetensors: 'model.norm.weight' has"):
        build(mapping, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.oracle
@pytest.mark.parametrize(
    "dtypes",
    [{}, {"dtype": "float32", "out_dtype": "float16"}, {"out_dtype": "bfloat16"}],
)
def test_dtypes_of_the_result_are_mergekits(names, tmp_path, make_model, build, mergekits, dtypes):
    half = make_model(tmp_path / "half", seed=5, base=names["base"], dtype=torch.bfloat16)
    mapping = two_models(names | {"b": str(half)}, "linear", a=0.3, b=0.5)
    mapping.pop("dtype")
    mine = build(mapping | dtypes, tmp_path / "mine")
    theirs = mergekits(mapping | dtypes, tmp_path / "theirs")
    assert_equal(mine, theirs, 4e-3 if dtypes else 1e-6)


def test_filter_that_matches_nothing_is_noted(names):
    mapping = two_models(names, "linear", a=1, b=1)
    values = [{"filter": part, "value": 2} for part in ("mlp", "self_attention", "layers.[0-3]")]
    mapping["models"][0]["parameters"]["weight"] = [*values, {"value": 1}]
    attention, layers = plan_merge(parse_recipe(mapping, "r")[0]).notes()
    assert "filter 'self_attention' matches no tensor" in attention
    assert "post_attention_layernorm.weight'" in attention
    assert "'layers.[0-3]'" in layers


@pytest.mark.parametrize("base", ["plain", "masked"])
def test_masks_that_old_gpt2_checkpoints_store_are_left_out(tmp_path, build, base):
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    for name in ("plain", "masked"):
        GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / name)
    file = tmp_path / "masked" / "model.safetensors"
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(2)}
    save_file(load_file(file) | masks, file, {"format": "pt"})
    folders = {name: str(tmp_path / name) for name in ("plain", "masked")}
    mapping = two_models(folders | {"base": folders[base]}, plain=1, masked=0.5)
    built = build(mapping, tmp_path / "out")
    assert built.keys() == load_file(tmp_path / "plain" / "model.safetensors").keys()


def test_stack_of_experts_and_dense_layers_loads_whole(tmp_path, build):
    model = make_model("Qwen2Moe", num_hidden_layers=3, mlp_only_layers=[0])
    model.save_pretrained(tmp_path / "m")
    whole = {"sources": [{"model": str(tmp_path / "m"), "layer_range": [0, 3]}]}
    build({"merge_method": "passthrough", "slices": [whole, whole]}, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert loaded.config.mlp_only_layers == [0, 3]
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
