"""Inputs that public reports speak of: built right, or refused with advice that is true of them.

Some rows are tests of their own elsewhere; a row here has the report's number.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from architectures import make_architecture, save_family
from mistakes import BUILD, CHECK, Change, config, furnish, recipe, shortcoming, study, write
from search.cli import main
from tiny_models import pickled_twin

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.0.mlp.up_proj.weight"
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


class Case(NamedTuple):
    """One input.

    Args:
        command: Its words, given in a folder with models, study, recipe and task.
        says: Parts of the one line of a refusal, in this order; None: the command succeeds.
        make: Done to the folder before.
        notes: Parts of what is printed, of a command that succeeds.
        then: True of the folder afterwards.
    """

    command: str
    says: tuple[str, ...] | None
    make: Change
    notes: tuple[str, ...] = ()
    then: Callable[[Path], bool] = lambda _: True


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any], *names: str) -> Change:
    """Change the stored tensors of models, by default of b."""

    def change(folder):
        for name in names or ("b",):
            file = folder / name / WEIGHTS
            found = load_file(file)
            found = edit(found) or found
            save_file(
                {k: v.contiguous() for k, v in found.items()}, file, metadata={"format": "pt"}
            )

    return change


def renamed(rename: Callable[[str], str], *names: str) -> Change:
    return tensors(lambda found: {rename(name): value for name, value in found.items()}, *names)


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def kind(model_type: str, *changes: Change, **settings: Any) -> Change:
    """The models are of another architecture."""

    def change(folder):
        for name in ("base", "a", "b"):
            shutil.rmtree(folder / name)
        save_family(folder, model_type, **settings)
        for each in changes:
            each(folder)

    return change


def only(folder_of: str, *files: str) -> Change:
    """Instead of its weights a folder has other files."""

    def change(folder):
        (folder / folder_of / WEIGHTS).unlink()
        for file in files:
            write(f"{folder_of}/{file}", b"x")(folder)

    return change


def moved(into: str) -> Change:
    """Donor b's files lie in a folder of its folder."""

    def change(folder):
        (folder / "b").rename(folder / "moved")
        (folder / "b" / into).parent.mkdir(parents=True)
        (folder / "moved").rename(folder / "b" / into)

    return change


def stale_index(folder: Path) -> None:
    names = load_file(folder / "b" / WEIGHTS)
    shards = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    (folder / "b" / INDEX).write_text(json.dumps({"weight_map": shards}))


def quantised(found: dict[str, torch.Tensor]) -> None:
    found[UP] = found[UP].to(torch.int8)


def quantised_by(method: str, *parts: tuple[str, torch.dtype]) -> Change:
    """Donor b has parts in place of a weight, as a method stores them."""

    def edit(found):
        del found[UP]
        for name, dtype in parts:
            found[UP.removesuffix("weight") + name] = torch.zeros(8, 8).to(dtype)

    return both(tensors(edit), config("b", quantization_config={"quant_method": method}))


def base_alone(**settings: Any) -> Change:
    return recipe(merge_method="linear", base_model=None, parameters={"weight": 1}, **settings)


def text(contents: str, encoding: str = "utf-8") -> Change:
    return write("recipe.yaml", contents.encode(encoding))


def filters(*clauses: dict[str, Any]) -> Change:
    return recipe(parameters={"weight": [*clauses, {"value": 1}], "density": 0.5})


def template_of_list(folder: Path) -> None:
    file = folder / "base" / "tokenizer_config.json"
    named = [{"name": "default", "template": CHAT}, {"name": "tools", "template": "x"}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": named}))


def on_hub(folder: Path) -> None:
    """A repository with ``.bin`` alone, in the hub's cache."""
    repository = folder / "hub" / "models--org--name"
    (repository / "snapshots").mkdir(parents=True)
    pickled_twin(folder / "b", repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    recipe(models=[{"model": "a"}, {"model": "org/name"}])(folder)


def vocabulary(name: str, edit: Callable[[dict[str, int]], object]) -> Change:
    def change(folder):
        file = folder / name / "tokenizer.json"
        contents = json.loads(file.read_text())
        edit(contents["model"]["vocab"])
        file.write_text(json.dumps(contents))

    return change


def swap(tokens: dict[str, int]) -> None:
    tokens["a"], tokens["b"] = tokens["b"], tokens["a"]


def more_tokens(count: int) -> Callable[[dict[str, int]], object]:
    return lambda tokens: tokens.update({f"<new {n}>": len(tokens) + n for n in range(count)})


def longer(rows: int) -> Callable[[dict[str, torch.Tensor]], object]:
    def edit(found):
        for name in (EMBEDDING, "lm_head.weight"):
            found[name] = torch.cat([found[name], found[name][:1].expand(rows, -1)])

    return edit


def adapter(changes: dict[str, Any], **parts: torch.Tensor) -> Change:
    """The recipe is the base with an adapter of these parts."""

    def change(folder):
        (folder / "lora").mkdir()
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        write("lora/adapter_config.json", json.dumps(settings | changes))(folder)
        named = {f"base_model.model.{name}": part for name, part in parts.items()}
        save_file(named, folder / "lora" / "adapter_model.safetensors")
        recipe(merge_method="passthrough", base_model=None, models=[{"model": "base+lora"}])(folder)
        recipe(parameters={})(folder)

    return change


def live_names(folder: Path) -> None:
    """An adapter of a multimodal base, by the names that its modules had in training."""
    parts = {}
    for name, weight in load_file(folder / "base" / WEIGHTS).items():
        if "vision" not in name and name.endswith("q_proj.weight"):
            module = f"model.language_model.layers.{name.split('layers.')[1]}".removesuffix(
                ".weight"
            )
            parts[f"{module}.lora_A.weight"] = torch.ones(2, weight.shape[1])
            parts[f"{module}.lora_B.weight"] = torch.ones(weight.shape[0], 2)
    adapter({}, **parts)(folder)


def rows_of(folder: Path) -> int:
    return len(load_file(folder / "out" / WEIGHTS)[EMBEDDING])


def differing(folder: Path) -> set[str]:
    """Tensors of the result that are not the base's."""
    mine, base = (load_file(folder / name / WEIGHTS) for name in ("out", "base"))
    return {name for name in mine if not torch.equal(mine[name], base[name])}


def fused(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts of a layer as one tensor, as transformers holds them."""
    kept = {name: value for name, value in found.items() if ".experts." not in name}
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([found[f"{experts}.{n}.{part}_proj.weight"] for n in range(4)])
            for part in ("gate", "up", "down")
        )
        kept[f"{experts}.gate_up_proj"] = torch.cat([gate, up], 1)
        kept[f"{experts}.down_proj"] = down
    return kept


def of_experts(count: int) -> Change:
    """Donor b has another number of experts."""

    def change(folder):
        make_architecture("qwen3_moe", num_experts=count).save_pretrained(folder / "b")

    return change


STACK = """merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 2]}]
- sources: [{model: a, layer_range: [0, 2]}]
"""
TWO = """name: one
merge_method: linear
models: [{model: a, parameters: {weight: 1}}]
---
merge_method: linear
models: [{model: one, parameters: {weight: 1}}]
"""
CASES = {
    # recipes
    "k03": Case(
        BUILD, None, recipe(merge_method="slerp", models=[{"model": "a"}], parameters={"t": 0.45})
    ),
    "k03 spelled otherwise": Case(
        BUILD,
        None,
        recipe(
            merge_method="slerp",
            models=[{"model": "./base"}, {"model": "a"}],
            parameters={"t": 0.5},
        ),
    ),
    "k04": Case(BUILD, None, recipe(merge_method="della", chat_template="llama3")),
    "k04 alpaca": Case(BUILD, None, recipe(chat_template="alpaca")),
    "k04 misspelled": Case(
        BUILD, ("recipe.yaml", "'lama3'", "llama3"), recipe(chat_template="lama3")
    ),
    "k10": Case(BUILD, None, recipe(tokenizer_source="model:a")),
    "k17b": Case(
        BUILD,
        ("recipe.yaml", "override_architecture", "config.json"),
        recipe(models=[{"model": {"model": "a", "override_architecture": "LlamaForCausalLM"}}]),
    ),
    "k21": Case(
        BUILD,
        None,
        text(TWO),
    ),
    "k23b": Case(
        BUILD,
        None,
        text(yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": "a"}]}), "utf-16"),
    ),
    "k23b latin": Case(
        BUILD, ("recipe.yaml", "UTF-8"), text("# é\nmerge_method: linear\n", "latin-1")
    ),
    "k25b": Case(BUILD, None, filters({"filter": ["self_attn", "mlp"], "value": 0})),
    "k25c": Case(
        BUILD,
        None,
        filters({"filter": "attentions", "value": 0}),
        ("'attentions' matches no tensor",),
    ),
    "k25c pattern": Case(
        BUILD,
        None,
        filters({"filter": "layers.[0-3]", "value": 0}),
        ("'layers.[0-3]' matches no tensor",),
    ),
    "k25c hidden by an earlier one": Case(
        BUILD,
        None,
        filters({"filter": "mlp", "value": 0}, {"filter": "mlp.up_proj", "value": 1}),
        ("'mlp.up_proj'", "never used"),
    ),
    "k25c behind one of all": Case(
        BUILD, None, filters({"value": 0}, {"filter": "mlp", "value": 1}), ("'mlp'", "never used")
    ),
    "k25c in a study": Case(
        CHECK, ("study.yaml", "search.split", "'attentions'"), study(search__split=["attentions"])
    ),
    "k25d": Case(
        BUILD,
        ("recipe.yaml", "mergekit-moe"),
        text("base_model: base\ngate_mode: hidden\nexperts: []\n"),
    ),
    # files
    "f01b": Case(BUILD, None, on_hub),
    "f02": Case(BUILD, None, stale_index),
    "f04 module": Case(
        BUILD, ("b", "'module.'", "wrapper"), renamed(lambda name: f"module.{name}")
    ),
    "f04 compiled": Case(
        BUILD, ("b", "'_orig_mod.'", "wrapper"), renamed(lambda name: f"_orig_mod.{name}")
    ),
    "f04 peft": Case(
        BUILD,
        ("b", "'base_model.model.'", "wrapper"),
        renamed(lambda name: f"base_model.model.{name}"),
    ),
    "f04 all of them": Case(
        BUILD,
        ("base", "'_forward_module.'", "wrapper"),
        renamed(lambda name: f"_forward_module.{name}", "base", "a", "b"),
    ),
    "f05b": Case(BUILD, None, config("b", architectures=["LLaMAForCausalLM"])),
    "f07b": Case(
        BUILD,
        ("b", "quantised", "8-bit"),
        tensors(
            lambda found: found.update(
                {UP: found[UP].to(torch.int8), UP.replace("weight", "SCB"): torch.ones(64)}
            )
        ),
    ),
    "f07b without a word in its config": Case(BUILD, ("b", "quantised", UP), tensors(quantised)),
    "f07d 4-bit": Case(
        BUILD,
        ("b", "quantised"),
        quantised_by("bitsandbytes", ("weight", torch.uint8), ("weight.absmax", torch.float32)),
    ),
    "f07d gptq": Case(
        BUILD,
        ("b", "quantised (GPTQ"),
        quantised_by("gptq", ("qweight", torch.int32), ("g_idx", torch.int32)),
    ),
    "f07d hqq": Case(
        BUILD,
        ("b", "quantised (hqq"),
        quantised_by("hqq", ("W_q", torch.uint8), ("scale", torch.float32)),
    ),
    "f07d aqlm": Case(
        BUILD,
        ("b", "quantised (aqlm"),
        quantised_by("aqlm", ("codes", torch.int16), ("codebooks", torch.float16)),
    ),
    "f07d exl2": Case(
        BUILD,
        ("b", "quantised (exl2"),
        quantised_by("exl2", ("q_weight", torch.int32), ("q_scale", torch.int32)),
    ),
    "f07d quanto": Case(
        BUILD,
        ("b", "quantised (quanto"),
        quantised_by("quanto", ("weight._data", torch.int8), ("weight._scale", torch.float32)),
    ),
    "f07d nvfp4": Case(
        BUILD,
        ("b", "quantised (modelopt"),
        quantised_by("modelopt", ("weight", torch.uint8), ("weight_scale_2", torch.float32)),
    ),
    "f07d eetq": Case(
        BUILD,
        ("b", "quantised (eetq"),
        quantised_by("eetq", ("weight", torch.int8), ("weight_scales", torch.float16)),
    ),
    "f07d in a study": Case(
        CHECK, ("study.yaml", "b", "quantised (hqq"), quantised_by("hqq", ("W_q", torch.uint8))
    ),
    "f09 gguf": Case(BUILD, ("b", "model.gguf", "GGUF"), only("b", "model.gguf")),
    "f09 consolidated": Case(
        BUILD,
        ("b", "consolidated.safetensors", "authors' own"),
        only("b", "consolidated.safetensors"),
    ),
    "f09 training": Case(
        BUILD, ("b", "training's checkpoints", "checkpoint-20"), moved("checkpoint-20")
    ),
    "f09 snapshots": Case(BUILD, ("b", "hub's cache", "snapshots/abc"), moved("snapshots/abc")),
    "f09 inner folder": Case(BUILD, ("b", "holds one: name ", "b/final"), moved("final")),
    "f09 cache": Case(
        BUILD, ("b", "holds one: name ", "snapshots/x"), moved("models--org--name/snapshots/x")
    ),
    "f09 adapter": Case(
        BUILD, ("b", "without the adapter_config.json"), only("b", "adapter_model.safetensors")
    ),
    "f09 archive": Case(BUILD, ("b", "model.zip: unpack"), only("b", "model.zip")),
    "f09 download": Case(
        BUILD, ("b", "download that has not ended"), only("b", f"{WEIGHTS}.incomplete")
    ),
    "f09 zero": Case(BUILD, ("b", "zero_to_fp32"), only("b", "zero_to_fp32.py")),
    "f09 fsdp": Case(BUILD, ("b", "FSDP"), only("b", "__0_0.distcp")),
    "f09 pointer": Case(
        BUILD,
        ("b", "Git LFS"),
        write(f"b/{WEIGHTS}", "version https://git-lfs.github.com/spec/v1\n"),
    ),
    # what a config says of the function
    "v07 rope": Case(
        CHECK,
        ("study.yaml", "b'", "rope_theta"),
        config("b", rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
    ),
    "v07 rope, as older configs say it": Case(
        CHECK,
        ("study.yaml", "b'", "rope_theta"),
        both(config("b", rope_parameters=None, rope_theta=5e5)),
    ),
    "v07 heads": Case(
        CHECK,
        ("study.yaml", "b'", "num_attention_heads"),
        config("b", num_attention_heads=2, head_dim=16, num_key_value_heads=1),
    ),
    "v07 norm": Case(CHECK, ("study.yaml", "b'", "rms_norm_eps"), config("b", rms_norm_eps=0.1)),
    "v07 activation": Case(
        CHECK, ("study.yaml", "b'", "hidden_act"), config("b", hidden_act="gelu")
    ),
    "v07 in a recipe": Case(BUILD, None, config("b", rms_norm_eps=0.1), ("rms_norm_eps 0.1",)),
    "v07 harmless": Case(
        CHECK,
        None,
        config("b", use_cache=False, max_position_embeddings=99, transformers_version="1"),
    ),
    # vocabularies
    "v04b": Case(
        BUILD,
        None,
        both(vocabulary("base", more_tokens(6)), recipe(tokenizer_source="union")),
        then=lambda folder: rows_of(folder) == 50,
    ),
    "v07b": Case(BUILD, None, vocabulary("a", swap), ("row 3 is 'a' and 'b'",)),
    "layers that the files do not have": Case(
        BUILD, ("base/config.json", "4", "3 layers"), config("base", num_hidden_layers=4)
    ),
    "layers that the files do not have, scored": Case(
        "score a study.yaml --device cpu",
        ("a/config.json", "3000", "3 layers"),
        config("a", num_hidden_layers=3000),
    ),
    "names that no architecture has": Case(
        BUILD,
        None,
        renamed(lambda name: f"llm.{name}", "base", "a", "b"),
        ("will not load", "'lm_head.weight'", "'llm.lm_head.weight'"),
    ),
    "layers that a cut file has lost": Case(
        CHECK,
        ("b/config.json", "3", "2 layers"),
        tensors(lambda found: {n: t for n, t in found.items() if ".layers.2." not in n}),
    ),
    "tensor of another shape, scored": Case(
        "score a study.yaml --device cpu",
        ("'a'", UP, "config.json", "fetch"),
        tensors(lambda found: {n: t[:-1] if n == UP else t for n, t in found.items()}, "a"),
    ),
    "tensor that the files do not have, scored": Case(
        "score a study.yaml --device cpu",
        ("'a'", UP, "fetch"),
        tensors(lambda found: {n: t for n, t in found.items() if n != UP}, "a"),
    ),
    "rows that the config does not have": Case(
        BUILD, None, config("base", vocab_size=10), ("vocab_size 10", "48 rows")
    ),
    "v07b in a study": Case(CHECK, None, vocabulary("a", swap), ("row 3 is 'a' and 'b'",)),
    "r01": Case(
        CHECK,
        ("study.yaml", "b'", "tokenizer_source: union"),
        both(tensors(longer(2)), config("b", vocab_size=50), vocabulary("b", more_tokens(6))),
    ),
    "r01 as it says": Case(
        CHECK,
        None,
        both(
            tensors(longer(2)),
            config("b", vocab_size=50),
            vocabulary("b", more_tokens(6)),
            study(tokenizer_source="union"),
        ),
    ),
    # adapters
    "l01c": Case(
        BUILD,
        None,
        adapter(
            {"modules_to_save": ["embed_tokens", "lm_head"]},
            **{
                "model.embed_tokens.weight": torch.ones(50, 32),
                "lm_head.weight": torch.ones(50, 32),
            },
        ),
        then=lambda folder: rows_of(folder) == 50,
    ),
    "l01d": Case(
        BUILD,
        None,
        adapter(
            {"trainable_token_indices": {"embed_tokens": [0, 2]}},
            **{"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 32)},
        ),
        then=lambda folder: differing(folder) == {EMBEDDING},
    ),
    "l02b": Case(
        BUILD, None, kind("gemma3", live_names), then=lambda folder: len(differing(folder)) == 2
    ),
    "l02 scored": Case(
        "score base+lora study.yaml --device cpu",
        None,
        adapter(
            {},
            **{
                "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32),
                "model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(32, 2),
            },
        ),
        ("base+lora",),
    ),
    # what goes along with the weights
    "t02": Case(
        BUILD,
        None,
        both(write("base/spiece.model", b"x"), write("base/sentencepiece.bpe.model", b"y")),
        then=lambda folder: (
            (folder / "out" / "spiece.model").read_bytes() == b"x"
            and (folder / "out" / "sentencepiece.bpe.model").read_bytes() == b"y"
        ),
    ),
    "x01": Case(
        BUILD,
        None,
        both(
            config("base", auto_map={"AutoConfig": "own.OwnConfig"}),
            write("base/own.py", "class OwnConfig: ...\n"),
        ),
        then=lambda folder: (folder / "out" / "own.py").is_file(),
    ),
    # prompts
    "r13": Case(
        CHECK,
        ("study.yaml", "'tell'", "system_instruction", "no system message"),
        both(
            write(
                "base/chat_template.jinja",
                "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            ),
            study(objective__apply_chat_template=True, objective__system_instruction="Be brief."),
        ),
    ),
    "r13 in capitals": Case(
        CHECK,
        None,
        both(
            write(
                "base/chat_template.jinja",
                "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
            ),
            study(objective__apply_chat_template=True, objective__system_instruction="Be brief."),
        ),
    ),
    "row without a field": Case(
        CHECK,
        None,
        lambda f: write("tasks/tell.jsonl", (f / "tasks/tell.jsonl").read_text() + '{"q": 1}\n')(f),
        ("1 of 21 rows have no 'question'", "row 20"),
    ),
    "r13 as Gemma refuses it": Case(
        CHECK,
        ("study.yaml", "'tell'", "system_instruction", "no system message"),
        both(
            write(
                "base/chat_template.jinja",
                "{% if messages[0].role == 'system' %}"
                "{{ raise_exception('System role not supported') }}{% endif %}"
                "{% for m in messages %}{{ m.content }}{% endfor %}",
            ),
            study(objective__apply_chat_template=True, objective__system_instruction="Be brief."),
        ),
    ),
    # experts, masks, heads
    "m04b": Case(
        BUILD,
        ("recipe.yaml", "experts"),
        kind("qwen3_moe", tensors(fused), recipe(merge_method="task_arithmetic")),
    ),
    "m04b linear": Case(
        BUILD,
        ("recipe.yaml", "experts"),
        kind("qwen3_moe", tensors(fused), recipe(merge_method="linear")),
    ),
    "m04b experts of another number": Case(
        BUILD,
        ("recipe.yaml", "base'", "b'", "differ in the shape", "gate.weight"),
        kind("qwen3_moe", of_experts(8)),
    ),
    "r08": Case(
        CHECK,
        ("study.yaml", "'lm_head.weight'", "untied"),
        both(
            *(config(name, tie_word_embeddings=True) for name in ("base", "b")),
            tensors(lambda found: found.pop("lm_head.weight") is None, "base", "b"),
        ),
    ),
    "s01b": Case(BUILD, None, kind("qwen3_moe", text(STACK), mlp_only_layers=[0])),
    "n01 masks": Case(
        BUILD,
        None,
        kind(
            "gpt2",
            tensors(
                lambda found: found.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)})
            ),
        ),
    ),
    "n01 positions": Case(
        BUILD,
        None,
        kind(
            "bert",
            tensors(lambda found: found.update({"bert.embeddings.position_ids": torch.arange(9)})),
        ),
    ),
    "n01 prefix": Case(
        BUILD, None, kind("gpt2", renamed(lambda name: name.removeprefix("transformer."), "base"))
    ),
    "r03": Case(CHECK, None, kind("mixtral")),
    "r07": Case(CHECK, None, kind("gemma3")),
    "r07b": Case(CHECK, None, kind("llava")),
    "r07b t5": Case(CHECK, None, kind("t5")),
    "r09b": Case(CHECK, None, kind("gpt_neox")),
    "r04b": Case(
        CHECK,
        None,
        kind(
            "gemma2",
            tensors(
                lambda found: found.update(
                    {"lm_head.weight": found["model.embed_tokens.weight"].clone()}
                )
            ),
            *(config(name, tie_word_embeddings=None) for name in ("base", "a", "b")),
        ),
    ),
    "l02c": Case(BUILD, None, kind("llama", tie_word_embeddings=True)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reported_input_is_right_or_refused_with_its_reason(
    case, zoo, tmp_path, monkeypatch, capfd
):
    furnish(tmp_path, zoo)
    case.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    capfd.readouterr()
    code = main(case.command.split())
    said = capfd.readouterr()
    if case.says is None:
        assert (code, said.err) == (0, "")
        printed = " ".join(said.out.split())
        assert all(part in printed for part in case.notes), printed
        assert case.then(tmp_path)
        return
    assert shortcoming(case.says, code, said.err) is None
    assert not (tmp_path / "out").exists()
