"""``base+adapter`` against peft's own merge_and_unload."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from merge_engine.errors import MergeError
from merge_engine.models.checkpoint import open_model
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
}


def save_adapter(base, folder, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model

        model = AutoModelForCausalLM.from_pretrained(base)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_merge_and_unload(zoo, tmp_path, kind):
    adapter = save_adapter(zoo / "base", tmp_path / "adapter", **KINDS[kind])
    mine = open_model(f"{zoo / 'base'}+{adapter}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel

        live = AutoModelForCausalLM.from_pretrained(zoo / "base")
        theirs = PeftModel.from_pretrained(live, adapter).merge_and_unload().state_dict()
    assert mine.tensors.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine.read(name), tensor, rtol=1e-6, atol=1e-7, msg=name)
    base = open_model(str(zoo / "base"))
    assert any(not torch.equal(mine.read(name), base.read(name)) for name in theirs)


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
        ("fan_in_fan_out", True),
        ("use_dora", True),
        ("peft_type", "IA3"),
        ("init_lora_weights", "pissa"),
    ],
)
def test_adapter_of_another_formula_is_refused_by_name(zoo, tmp_path, key, value):
    adapter = save_adapter(zoo / "base", tmp_path / "adapter", **KINDS["plain"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(MergeError, match=f"{key} is {value!r}, .*merge_and_unload"):
        open_model(f"{zoo / 'base'}+{adapter}")


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
    assert other.content_hash != open_model(str(zoo / "base")).content_hash
