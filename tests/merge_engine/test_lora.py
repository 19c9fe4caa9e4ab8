"""``base+adapter`` against peft's own merge_and_unload."""

import json
import re
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_models
from architectures import make_architecture, save_family
from merge_engine.errors import MergeError
from merge_engine.models.opening import open_model
from merge_engine.recipe.recipe_file import load_recipe

KINDS = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 3, "target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "rank_pattern": {"layers.1.mlp.up_proj": 2, "q_proj": 8},
        "alpha_pattern": {"up_proj": 5, r".*layers\.[01]\.self_attn\.q_proj": 7},
    },
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "o_proj"]},
    "saved": {"r": 4, "target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]},
    "dora": {"target_modules": ["q_proj", "up_proj", "embed_tokens", "lm_head"], "use_dora": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 1]},
    "tokens of two": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [0, 2], "lm_head": [7]},
    },
}
PLAIN = KINDS["plain"]
SAVED = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
# Base, number of rows that it was resized to in training, settings.
CASES = {
    **{f"llama {kind}": ("llama", None, config) for kind, config in KINDS.items()},
    "lora_bias": ("qwen", None, {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "biases": ("qwen", None, {"target_modules": ["q_proj"], "bias": "all"}),
    "conv1d": ("gpt2", None, {"target_modules": ["c_attn", "c_proj"]}),
    "conv1d dora": ("gpt2", None, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "resized": ("llama", 52, PLAIN),
    "made smaller": ("llama", 44, PLAIN),
    "resized, both changed": ("llama", 52, {"target_modules": ["embed_tokens", "lm_head"]}),
    "resized, embedding saved": ("llama", 52, SAVED),
    "resized, both saved": ("llama", 52, SAVED | {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "resized, tokens": ("llama", 52, KINDS["tokens"] | {"trainable_token_indices": [1, 50]}),
    "tied": ("tied", None, PLAIN),
    "tied, head saved": ("tied", None, SAVED | {"modules_to_save": ["lm_head"]}),
    "tied, embedding saved": ("tied", None, SAVED),
    "tied, saved and kept tied": ("tied", None, SAVED | {"ensure_weight_tying": True}),
    "tied, tokens": ("tied", None, KINDS["tokens"]),
    "tied, resized": ("tied", 52, PLAIN),
    "tied, resized, embedding saved": ("tied", 52, SAVED),
    "tied, resized, tokens": ("tied", 52, KINDS["tokens"] | {"trainable_token_indices": [1, 50]}),
}
# What peft's merge_and_unload adds to both sides of a tied weight, though only one had it.
UNTIED = {
    "head": ("tied", None, {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": ("tied", None, {"target_modules": ["q_proj", "embed_tokens"]}),
    "dora": ("tied", None, {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "resized": ("tied", 52, {"target_modules": ["q_proj", "lm_head"]}),
    "tokens of the head": (
        "tied",
        None,
        KINDS["tokens of two"] | {"trainable_token_indices": {"lm_head": [1]}},
    ),
    "tokens of two": ("tied", None, KINDS["tokens of two"]),
    "gpt2": ("gpt2", None, {"target_modules": ["c_attn", "lm_head", "wte"]}),
    "kept tied": (
        "tied",
        None,
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
}


@pytest.fixture(scope="module")
def bases(zoo, make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    make_model(folder / "tied", seed=0, tie_word_embeddings=True)
    for name, kind in (("qwen", "Qwen2"), ("gpt2", "GPT2")):
        model = tiny_models.make_model(kind)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(folder / name)
        tiny_models.tiny_tokenizer().save_pretrained(folder / name)
    return {"llama": zoo / "base"} | {name: folder / name for name in ("tied", "qwen", "gpt2")}


def load(base, rows=None):
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        torch.manual_seed(7)
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def save_adapter(base, folder, rows=None, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(load(base, rows), LoraConfig(task_type="CAUSAL_LM", **config))
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        adapted.save_pretrained(folder)
    return folder


def rename(adapter, change):
    """Rename the adapter's tensors; None leaves one out."""
    file = adapter / "adapter_model.safetensors"
    named = {change(key): tensor for key, tensor in load_file(file).items()}
    save_file({key: tensor for key, tensor in named.items() if key}, file)


def assert_is_merged(mine, base, adapter, rows=None):
    """Compare a model's tensors with those of merge_and_unload."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel

        live = PeftModel.from_pretrained(load(base, rows), adapter).merge_and_unload()
    theirs = live.state_dict()
    for name, info in mine.tensors.items():
        assert info.shape == theirs[name].shape
        torch.testing.assert_close(mine.read(name), theirs[name], rtol=1e-6, atol=1e-7, msg=name)
    tied = live.get_input_embeddings().weight is live.get_output_embeddings().weight
    assert bool(mine.config["tie_word_embeddings"]) == tied
    assert theirs.keys() - mine.tensors.keys() == ({"lm_head.weight"} if tied else set())
    assert mine.config["vocab_size"] == live.get_input_embeddings().weight.shape[0]


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_merge_and_unload(bases, tmp_path, case):
    kind, rows, config = CASES[case]
    adapter = save_adapter(bases[kind], tmp_path / "adapter", rows, **config)
    mine = open_model(f"{bases[kind]}+{adapter}")
    assert_is_merged(mine, bases[kind], adapter, rows)
    base = open_model(str(bases[kind]))
    changed = {n for n in base.tensors if not torch.equal(mine.read(n), base.read(n))}
    assert changed
    assert {mine.read_dtype(name) for name in changed} == {torch.float32}


@pytest.mark.parametrize("case", UNTIED)
def test_head_and_embedding_of_a_tied_base_differ_as_in_training(bases, tmp_path, build, case):
    kind, rows, config = UNTIED[case]
    adapter = save_adapter(bases[kind], tmp_path / "adapter", rows, **config)
    entry = {"model": f"{bases[kind]}+{adapter}", "parameters": {"weight": 1}}
    build({"merge_method": "linear", "models": [entry]}, tmp_path / "out")
    built = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert built.config.tie_word_embeddings == (case == "kept tied")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel

        trained = PeftModel.from_pretrained(load(bases[kind], rows), adapter)
    tokens = torch.arange(44)[None]
    with torch.no_grad():
        mine, theirs = built(tokens).logits, trained(tokens).logits
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_names_may_carry_the_adapters_name_and_modules_to_save(bases, tmp_path):
    config = SAVED | {"modules_to_save": ["embed_tokens", "lm_head"], "use_dora": True}
    adapter = save_adapter(bases["tied"], tmp_path / "adapter", **config)
    expected = open_model(f"{bases['tied']}+{adapter}")
    values = {name: expected.read(name) for name in expected.tensors}
    rename(
        adapter,
        lambda key: (
            key.replace("_A.", "_A.default.").replace("_B.", "_B.default.")
            if "lora" in key
            else key.replace(".weight", ".modules_to_save.default.weight")
        ).replace("_vector", "_vector.default.weight"),
    )
    mine = open_model(f"{bases['tied']}+{adapter}")
    assert mine.tensors.keys() == values.keys()
    assert all(torch.equal(mine.read(name), tensor) for name, tensor in values.items())


@pytest.fixture
def resized(bases, tmp_path):
    """An adapter with eight tokens more, 44 to 51, than its base's tokenizer, which has 44."""
    adapter = save_adapter(bases["llama"], tmp_path / "adapter", 52, **PLAIN)
    tokenizer = tiny_models.tiny_tokenizer()
    tokenizer.add_tokens([f"<t{number}>" for number in range(8)])
    tokenizer.save_pretrained(adapter)
    return f"{bases['llama']}+{adapter}"


def test_build_of_a_resized_adapter_has_its_rows_and_tokens(resized, tmp_path, build):
    entry = {"model": resized, "parameters": {"weight": 1}}
    built = build({"merge_method": "linear", "models": [entry]}, tmp_path / "out")
    assert len(built["lm_head.weight"]) == len(built["model.embed_tokens.weight"]) == 52
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 52
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 52
    model(torch.tensor([[51]]))


@pytest.mark.parametrize("first", [True, False])
def test_resized_adapter_and_donor_are_merged_over_the_union(
    bases, zoo, resized, tmp_path, build, first
):
    names = [resized, str(zoo / "a")] if first else [str(zoo / "a"), resized]
    entries = [{"model": name, "parameters": {"weight": 0.5}} for name in names]
    recipe = {"merge_method": "linear", "models": entries, "base_model": names[0]}
    with pytest.raises(MergeError, match="tokenizer_source: union"):
        build(recipe, tmp_path / "out")
    built = build(recipe | {"tokenizer_source": "union"}, tmp_path / "out")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert len(tokens) == AutoModelForCausalLM.from_pretrained(tmp_path / "out").vocab_size == 52
    name = "lm_head.weight"
    mine, other = open_model(resized).read(name), open_model(str(zoo / "a")).read(name)
    torch.testing.assert_close(built[name][tokens["<t3>"]], mine[47])
    torch.testing.assert_close(
        built[name][tokens["e"]], (mine + torch.cat([other, mine[48:]]))[7] / 2
    )
    assert tokens["e"] == 7


def test_tokenizer_with_tokens_beyond_the_rows_is_the_bases(bases, tmp_path):
    adapter = save_adapter(bases["llama"], tmp_path / "adapter", **PLAIN)
    model = f"{bases['llama']}+{adapter}"
    tokenizer = tiny_models.tiny_tokenizer()
    assert open_model(model).tokenizer_folder == bases["llama"]
    for count, folder in ((4, adapter), (5, bases["llama"])):  # the base has 48 rows
        tokenizer.add_tokens([f"<t{number}>" for number in range(count)])
        tokenizer.save_pretrained(adapter)
        assert open_model(model).tokenizer_folder == folder


def test_recipe_merges_adapters_of_one_base(zoo, tmp_path, build):
    shutil.copytree(zoo / "base", tmp_path / "base")
    for seed, kind in enumerate(("plain", "rslora")):
        save_adapter(
            zoo / "base", tmp_path / kind, **KINDS[kind] | {"init_lora_weights": bool(seed)}
        )
    (tmp_path / "r.yaml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\nparameters: {weight: 0.5}\n"
        "models: [{model: base+plain}, {model: {model: {path: base}, lora: {path: rslora}}}]\n"
    )
    recipe, _ = load_recipe(tmp_path / "r.yaml")
    models = [source.model for source in recipe.models]
    assert models == [f"{tmp_path}/base+{tmp_path}/{kind}" for kind in ("plain", "rslora")]
    built = build(recipe.model_dump(mode="json", exclude_defaults=True), tmp_path / "out")
    name = "model.layers.1.self_attn.q_proj.weight"
    one, other = (open_model(model).read(name) for model in models)
    torch.testing.assert_close(built[name], (one + other) / 2)


def test_adapter_in_half_precision_is_added_in_float32(zoo, make_model, tmp_path):
    base = make_model(tmp_path / "base", seed=0, base=zoo / "base", dtype=torch.bfloat16)
    adapter = save_adapter(zoo / "base", tmp_path / "adapter", **KINDS["plain"])
    name = "model.layers.1.self_attn.q_proj.weight"
    mine = open_model(f"{base}+{adapter}")
    assert mine.read(name).dtype == torch.float32
    assert mine.tensors[name].dtype == torch.bfloat16
    assert not torch.equal(mine.read(name), mine.read(name).bfloat16().float())


def test_adapter_of_another_base_is_refused_by_name(zoo, make_model, tmp_path):
    adapter = save_adapter(zoo / "base", tmp_path / "adapter", **KINDS["plain"])
    wide = make_model(tmp_path / "wide", seed=0, hidden_size=40)
    short = make_model(tmp_path / "short", seed=0, num_hidden_layers=2)
    message = r"q_proj.weight' of shape \[32, 32\], which in '.*wide' has .*was trained on '.*base'"
    with pytest.raises(MergeError, match=message):
        open_model(f"{wide}+{adapter}")
    with pytest.raises(MergeError, match=r"changes 'model.layers.2.*', which is not in '.*short'"):
        open_model(f"{short}+{adapter}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("init_lora_weights", "pissa"),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
    ],
)
def test_adapter_of_another_formula_is_refused_by_name(bases, tmp_path, key, value):
    adapter = save_adapter(bases["llama"], tmp_path / "adapter", **PLAIN)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(MergeError, match=f"{key} is {re.escape(repr(value))}.*merge_and_unload"):
        open_model(f"{bases['llama']}+{adapter}")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("alpha_pattern", [1], "damaged: alpha_pattern: "),
        ("use_dora", True, "does not go with use_dora: True"),
        ("trainable_token_indices", [1, 2, 3], r"has the shape \[2, 32\] instead of \[3, 32\]"),
        ("trainable_token_indices", [1, 48], "had 49 rows or more in training, .* has 48"),
    ],
)
def test_settings_that_do_not_fit_the_tensors_are_refused(bases, tmp_path, key, value, message):
    adapter = save_adapter(bases["llama"], tmp_path / "adapter", **KINDS["tokens"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(MergeError, match=message):
        open_model(f"{bases['llama']}+{adapter}")


@pytest.mark.parametrize("model_type", ["gemma3", "llava", "nemotron_h"])
def test_adapter_trained_under_the_live_models_names_is_applied(model_type, tmp_path):
    family = save_family(tmp_path, model_type, ())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        trained = get_peft_model(make_architecture(model_type), config)
        trained.save_pretrained(tmp_path / "adapter")
        trained.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    mine = open_model(f"{family / 'base'}+{tmp_path / 'adapter'}")
    assert mine.tensors.keys() == merged.keys()
    before = load_file(family / "base" / "model.safetensors")
    assert any(not torch.equal(before[name], tensor) for name, tensor in merged.items())
    for name, tensor in merged.items():
        torch.testing.assert_close(mine.read(name), tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_rows_that_the_adapter_lacks_are_said_to_be_lacking(bases, tmp_path, target):
    """Of a resized model with one of the two as a target, peft saves that one only."""
    adapter = save_adapter(bases["llama"], tmp_path / "adapter", 52, target_modules=[target])
    message = rf"52 in '[a-z_.]*{target}.weight'.*name the resized base that it was trained on"
    with pytest.raises(MergeError, match=message):
        open_model(f"{bases['llama']}+{adapter}")
    rename(adapter, lambda key: None if "base_layer" in key else key)
    with pytest.raises(MergeError, match=r"52 rows .* has 48, .*name the resized base"):
        open_model(f"{bases['llama']}+{adapter}")


def test_bias_that_the_base_lacks_is_refused_by_name(bases, tmp_path):
    config = {"target_modules": ["q_proj"], "lora_bias": True}
    adapter = save_adapter(bases["llama"], tmp_path / "adapter", **config)
    with pytest.raises(
        MergeError, match=r"lora_bias changes '.*q_proj.bias', but '.*' has no bias"
    ):
        open_model(f"{bases['llama']}+{adapter}")


def test_folder_with_a_plus_in_its_name_is_a_folder(zoo, tmp_path):
    shutil.copytree(zoo / "a", tmp_path / "a+b")
    model = open_model(str(tmp_path / "a+b"))
    assert model.tensors
    adapter = save_adapter(zoo / "base", tmp_path / "adapter", **KINDS["plain"])
    assert open_model(f"{tmp_path / 'a+b'}+{adapter}").tensors == model.tensors


def test_pickled_adapter_reads_like_safetensors(zoo, tmp_path):
    adapter = save_adapter(zoo / "base", tmp_path / "adapter", **KINDS["plain"])
    mine = open_model(f"{zoo / 'base'}+{adapter}")
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    torch.save(load_file(adapter / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    other = open_model(f"{zoo / 'base'}+{pickled}")
    assert all(torch.equal(mine.read(name), other.read(name)) for name in mine.tensors)
    assert other.fingerprint != open_model(str(zoo / "base")).fingerprint
