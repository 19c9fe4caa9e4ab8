"""Bad input as people give it: exit code 2, one line that says where and what to do, nothing done.

Three tables: models that are damaged, recipes that ask for what cannot be, and mistakes in
studies, tasks and options. Run as a script, with ``PYTHONPATH=.:tests/support``, it tries each
mistake as a process of its own and prints the slowest.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from mistakes import (
    BUILD,
    CHECK,
    INIT,
    RUN,
    config,
    furnish,
    recipe,
    remove,
    shortcoming,
    study,
    task,
    tree,
    write,
)
from search.cli import main
from tiny_models import make_llama


def refused(folder: Path, capsys: Any, command: list[str], parts: tuple[str, ...]) -> None:
    """A command is refused with one line, and leaves everything as it was."""
    before = tree(folder)
    code = main([*command, "--device", "cpu"])
    assert shortcoming(parts, code, capsys.readouterr().err) is None
    assert tree(folder) == before


# Damaged models, and recipes that ask for what cannot be

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-00002-of-00008.safetensors"
NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
BIAS = "model.layers.1.mlp.up_proj.bias"
DOWN = "model.layers.0.mlp.down_proj.weight"
ADAPTED = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def models(zoo, make_model, tmp_path):
    """A folder with a base and three donors, the last one in shards, for a test to break."""
    for name in ("base", "good", "bad"):
        shutil.copytree(zoo / name.replace("good", "a").replace("bad", "b"), tmp_path / name)
    make_model(tmp_path / "sharded", seed=3, base=zoo / "base", shard_size="20KB")
    return tmp_path


def cut(file: str, length: int) -> Callable[[Path], None]:
    """Keep the first bytes; with a negative length leave out the last."""

    def change(models):
        path = models / file
        path.write_bytes(path.read_bytes()[:length])

    return change


def swap(file: str, name: str, tensor: Callable[[torch.Tensor], torch.Tensor]):
    """Put another tensor in the place of one."""

    def change(models):
        tensors = load_file(models / file)
        tensors[name] = tensor(tensors[name]).contiguous()
        save_file(tensors, models / file, metadata={"format": "pt"})

    return change


def hold(number: float):
    """One element is ``number``."""

    def tensor(old):
        old.view(-1)[3] = number
        return old

    return tensor


def rewrite_header(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change what the header of the bad donor's file says of its tensors."""

    def change(models):
        path = models / "bad" / WEIGHTS
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        edit(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return change


def index(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the sharded donor's index."""

    def change(models):
        path = models / "sharded" / INDEX
        path.write_text(json.dumps(edit(json.loads(path.read_text()))))

    return change


def other_architecture(models):
    shutil.rmtree(models / "bad")
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1)).save_pretrained(models / "bad")


def adapter(
    width: int = 32, base: str = "org/other", edit: Callable[[dict[str, Any]], None] | None = None
) -> Callable[[Path], None]:
    """A LoRA adapter of one weight beside the models, as peft saves it."""

    def change(models):
        (models / "lora").mkdir()
        config = {"peft_type": "LORA", "lora_alpha": 4, "base_model_name_or_path": base}
        (models / "lora" / "adapter_config.json").write_text(json.dumps(config))
        key = f"base_model.model.{ADAPTED}"
        pair = {
            f"{key}.lora_A.weight": torch.ones(2, width),
            f"{key}.lora_B.weight": torch.ones(width, 2),
        }
        if edit:
            edit(pair)
        save_file(pair, models / "lora" / "adapter_model.safetensors")

    return change


class Case(NamedTuple):
    """One kind of bad input.

    Args:
        damage: Done to the folder of models.
        message: What the one line says, in this order: where, what, what to do.
        recipe: Changes to the recipe.
    """

    damage: Callable[[Path], object]
    message: tuple[str, ...]
    recipe: Mapping[str, Any] = MappingProxyType({})


def unharmed(_models):
    pass


def with_donor(name: str, **settings: Any) -> dict[str, Any]:
    return {"models": [{"model": "good"}, {"model": name}]} | settings


def with_settings(method: str, good: dict[str, Any], bad: dict[str, Any]) -> dict[str, Any]:
    donors = [{"model": "good", "parameters": good}, {"model": "bad", "parameters": bad}]
    based = {"base_model": None} if method in ("linear", "multislerp") else {}
    return {"merge_method": method, "models": donors, "parameters": {}} | based


SHARDED, LORA = with_donor("sharded"), with_donor("base+lora")
DAMAGED = {
    "weights cut short": Case(
        cut(f"bad/{WEIGHTS}", -100), (f"bad/{WEIGHTS}", "damaged or cut short", "fetch")
    ),
    "header cut short": Case(
        cut(f"bad/{WEIGHTS}", 200), (f"bad/{WEIGHTS}", "damaged or cut short", "fetch")
    ),
    "empty file": Case(cut(f"bad/{WEIGHTS}", 0), (f"bad/{WEIGHTS}", "damaged or cut", "fetch")),
    "bytes of something else": Case(
        write(f"bad/{WEIGHTS}", b"<!DOCTYPE html>" * 90), (f"bad/{WEIGHTS}", "damaged", "fetch")
    ),
    "pointer instead of the file": Case(
        write(f"bad/{WEIGHTS}", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
        (f"bad/{WEIGHTS}", "Git LFS pointer", "git lfs pull"),
    ),
    "offsets beyond the file": Case(
        rewrite_header(lambda header: header[NORM].update(data_offsets=[0, 1 << 40])),
        (f"bad/{WEIGHTS}", "damaged", "fetch"),
    ),
    "shape that is not the bytes'": Case(
        rewrite_header(lambda header: header[NORM].update(shape=[7])),
        (f"bad/{WEIGHTS}", "damaged", "fetch"),
    ),
    "quantised weights": Case(
        rewrite_header(lambda header: header[NORM].update(dtype="F8_E4M3", shape=[128])),
        ("bad", "quantised (FP8", NORM, "merge the full-precision model"),
    ),
    "base cut short": Case(cut(f"base/{WEIGHTS}", -100), (f"base/{WEIGHTS}", "damaged", "fetch")),
    "no weights": Case(remove(f"bad/{WEIGHTS}"), ("bad", f"no {WEIGHTS}", "fetch")),
    "missing shard": Case(
        remove(f"sharded/{SHARD}"),
        (INDEX, SHARD, "missing", "fetch"),
        SHARDED,
    ),
    "shard cut short": Case(
        cut(f"sharded/{SHARD}", -1),
        (f"sharded/{SHARD}", "damaged", "fetch"),
        SHARDED,
    ),
    "index of a tensor that its shard lacks": Case(
        index(lambda old: {"weight_map": old["weight_map"] | {BIAS: SHARD}}),
        (INDEX, BIAS, "lacks", "fetch"),
        SHARDED,
    ),
    "index that is no JSON": Case(
        cut(f"sharded/{INDEX}", 50), (INDEX, "damaged", "fetch"), SHARDED
    ),
    "index of nothing": Case(index(lambda _: {}), (INDEX, "'weight_map'", "fetch"), SHARDED),
    "index that is a list": Case(index(lambda _: [1]), (INDEX, "damaged", "fetch"), SHARDED),
    "index of numbers": Case(
        index(lambda _: {"weight_map": {UP: 1}}), (INDEX, "'weight_map'", "fetch"), SHARDED
    ),
    "no config": Case(remove("base/config.json"), ("no config.json", "base", "fetch")),
    "config cut short": Case(cut("bad/config.json", 30), ("bad/config.json", "fetch")),
    "config that is a list": Case(write("bad/config.json", b"[1]"), ("bad/config.json", "fetch")),
    "config of other bytes": Case(
        write("bad/config.json", b"\xff\xfe"), ("bad/config.json", "fetch")
    ),
    "NaN in a donor": Case(
        swap(f"bad/{WEIGHTS}", NORM, hold(float("nan"))), (f"bad/{WEIGHTS}", NORM, "NaN", "fetch")
    ),
    "Inf in a donor": Case(
        swap(f"bad/{WEIGHTS}", UP, hold(float("inf"))), (f"bad/{WEIGHTS}", UP, "Inf", "fetch")
    ),
    "NaN in the base": Case(
        swap(f"base/{WEIGHTS}", NORM, hold(float("nan"))), (f"base/{WEIGHTS}", NORM, "NaN", "fetch")
    ),
    "wrong shape": Case(
        swap(f"bad/{WEIGHTS}", DOWN, lambda old: old.T),
        ("bad", DOWN, "[64, 32]", "merge models fine-tuned from one base"),
    ),
    "other vocabulary": Case(
        swap(f"bad/{WEIGHTS}", "lm_head.weight", lambda old: old[:40]),
        ("bad", "lm_head.weight", "[40, 32]", "tokenizer_source"),
    ),
    "other architecture": Case(
        other_architecture, ("base", "bad", "architectures", "only models of one can be merged")
    ),
    "adapter for another base": Case(
        adapter(width=48), ("lora", f"{ADAPTED}.weight", "[48, 48]", "[32, 32]", "org/other"), LORA
    ),
    "adapter cut short": Case(
        lambda models: (adapter()(models), cut("lora/adapter_model.safetensors", -1)(models)),
        ("lora/adapter_model.safetensors", "cut short", "fetch"),
        LORA,
    ),
    "adapter without weights": Case(
        lambda models: (adapter()(models), remove("lora/adapter_model.safetensors")(models)),
        ("lora/adapter_model.safetensors", "missing", "fetch"),
        LORA,
    ),
    "adapter whose config is cut short": Case(
        lambda models: (adapter()(models), cut("lora/adapter_config.json", 9)(models)),
        ("lora/adapter_config.json", "cut short", "fetch"),
        LORA,
    ),
    "NaN in an adapter": Case(
        adapter(edit=lambda pair: next(iter(pair.values())).view(-1)[:1].fill_(float("nan"))),
        ("lora/adapter_model.safetensors", f"{ADAPTED}.weight", "NaN", "fetch"),
        LORA,
    ),
    "adapter of ranks that differ": Case(
        adapter(
            edit=lambda pair: pair.update({k: pair[k][:, :1].contiguous() for k in [*pair][1:]})
        ),
        ("lora", f"{ADAPTED}.lora_A.weight", "ranks 2 and 1", "fetch"),
        LORA,
    ),
    "adapter alone": Case(adapter(), ("lora", "it is an adapter", "BASE+"), with_donor("lora")),
}
MISWRITTEN = {
    "tokenizer cut short": Case(
        cut("bad/tokenizer.json", 100),
        ("bad", "tokenizer", "fetch"),
        {"tokenizer_source": "union"},
    ),
    "density above 1": Case(
        unharmed,
        ("bad", "'density'", "1.5 is outside [0, 1]"),
        with_settings("ties", {"weight": 1}, {"weight": 1, "density": 1.5}),
    ),
    "density below 0": Case(
        unharmed,
        ("bad", "'density'", "-0.1 is outside [0, 1]"),
        with_settings("dare_linear", {"weight": 1}, {"weight": 1, "density": -0.1}),
    ),
    "density that leaves the range in deep layers": Case(
        unharmed,
        ("bad", "'density'", "layers.2.", "1.1 is outside [0, 1]"),
        with_settings("ties", {"weight": 1}, {"weight": 1, "density": [0.5, 1.1]}),
    ),
    "density that is a word": Case(
        unharmed,
        ("density", "'half'"),
        with_settings("ties", {"weight": 1}, {"weight": 1, "density": "half"}),
    ),
    "epsilon above 1": Case(
        unharmed,
        ("bad", "'epsilon'", "1.5 is outside [0, 1]"),
        with_settings("della", {"weight": 1}, {"weight": 1, "density": 0.5, "epsilon": 1.5}),
    ),
    "epsilon too wide for its density": Case(
        unharmed,
        ("della of 'lm_head.weight'", "density 0.1 +- epsilon 0.2", "make epsilon smaller"),
        with_settings(
            "della",
            {"weight": 1, "density": 0.5},
            {"weight": 1, "density": 0.1, "epsilon": 0.2},
        ),
    ),
    "weight that is no number": Case(
        unharmed,
        ("bad", "'weight'", "nan"),
        with_settings("linear", {"weight": 1}, {"weight": float("nan")}),
    ),
    "no weight": Case(
        unharmed,
        ("bad", "needs the parameter 'weight'"),
        with_settings("linear", {"weight": 1}, {}),
    ),
    "weights that sum to zero": Case(
        unharmed,
        ("linear of", "weights [1.0, -1.0] sum to", "make one larger"),
        with_settings("linear", {"weight": 1}, {"weight": -1}),
    ),
    "weights that sum to zero in one tensor": Case(
        unharmed,
        (f"linear of '{NORM}'", "sum to", "make one larger"),
        with_settings(
            "linear", {"weight": 1}, {"weight": [{"filter": "model.norm", "value": -1}, 0.5]}
        ),
    ),
    "weights of a multislerp that sum to zero": Case(
        unharmed,
        ("multislerp of", "sum to", "make one larger"),
        with_settings("multislerp", {"weight": 1}, {"weight": -1}),
    ),
    "number beyond the result's dtype": Case(
        unharmed,
        ("task_arithmetic of", "NaN or Inf in torch.float16", "write float32"),
        with_settings("task_arithmetic", {"weight": 1}, {"weight": 1e9}) | {"out_dtype": "float16"},
    ),
    "model that is not there": Case(
        unharmed, ("nowhere", "no such folder", "hub id"), with_donor("nowhere")
    ),
}


def write_recipe(models: Path, changes: Mapping[str, Any]) -> Path:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "good"}, {"model": "bad"}],
        "parameters": {"weight": 0.5},
        "dtype": "float32",
    } | changes
    file = models / "recipe.yaml"
    kept = {name: value for name, value in recipe.items() if value is not None}
    file.write_text(yaml.safe_dump(kept, sort_keys=False))
    return file


# Tests of damaged models


@pytest.mark.parametrize("case", (DAMAGED | MISWRITTEN).values(), ids=DAMAGED | MISWRITTEN)
def test_bad_input_is_one_message_and_leaves_nothing_behind(models, capsys, case):
    case.damage(models)
    recipe = write_recipe(models, case.recipe)
    out = models / "new" / "out"
    refused(models, capsys, ["build", str(recipe), str(out)], case.message)


@pytest.mark.parametrize("case", DAMAGED.values(), ids=DAMAGED)
def test_study_of_damaged_models_is_refused_with_that_message(models, make_study, capsys, case):
    case.damage(models)
    donors = [str(models / "good"), str(models / "bad")]
    if "models" in case.recipe:
        donors[1] = "+".join(
            str(models / name) for name in case.recipe["models"][1]["model"].split("+")
        )
    study = make_study(models / "study", base_model=str(models / "base"), models=donors)
    command = ["run", str(study), "--out", str(models / "run")]
    refused(models, capsys, command, case.message)


def test_study_with_a_damaged_tokenizer_is_refused(models, make_study, capsys):
    cut("base/tokenizer.json", 100)(models)
    study = make_study(models / "study", base_model=str(models / "base"))
    command = ["run", str(study), "--out", str(models / "run")]
    refused(models, capsys, command, ("base", "tokenizer", "fetch"))


@pytest.mark.parametrize("contents", [b'{"model": {', b'{"model": []}', b"[]"])
def test_check_of_models_with_a_damaged_tokenizer_names_it(models, capsys, contents):
    write("bad/tokenizer.json", contents)(models)
    command = ["check", str(write_recipe(models, {}))]
    refused(models, capsys, command, ("bad/tokenizer.json", "damaged", "fetch"))


def test_folder_that_cannot_be_written_is_named(models, capsys):
    (models / "file").write_text("in the way")
    recipe = write_recipe(models, {})
    for out in ("file", "file/out", "bad"):
        command = ["build", str(recipe), str(models / out)]
        refused(models, capsys, command, (out, "choose another folder"))


def test_the_models_themselves_are_good(models):
    """So that it is the damage that the others are refused for."""
    adapter()(models)
    donors = [{"model": name} for name in ("good", "bad", "sharded", "base+lora")]
    recipe = write_recipe(models, {"models": donors})
    assert main(["build", str(recipe), str(models / "new" / "out"), "--device", "cpu"]) == 0


# Mistakes in studies, recipes, tasks and options


class Mistake(NamedTuple):
    """One mistake.

    Args:
        command: Its words, given in a folder with models, study, recipe, task and a finished run.
        says: Parts of the one line, in this order.
        make: Done to the folder before.
    """

    command: str
    says: tuple[str, ...]
    make: Callable[[Path], object] = lambda _: None


def in_the_way(folder: Path) -> None:
    (folder / "file").write_text("mine")


def without_tokenizer(folder: Path) -> None:
    for file in (folder / "base").glob("tokenizer*"):
        file.unlink()


class Hostile:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.system, ("mkdir made_by_the_pickle",)


def hostile_bin(folder: Path) -> None:
    (folder / "b" / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Hostile()}, folder / "b" / "pytorch_model.bin")


def quantised(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    tensors = load_file(folder / "b" / "model.safetensors")
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.int8)
    tensors[f"{name}.SCB"] = torch.ones(3)
    save_file(tensors, folder / "b" / "model.safetensors")


def adapter_alone(folder: Path) -> None:
    shutil.rmtree(folder / "b")
    write("b/adapter_config.json", '{"peft_type": "LORA"}')(folder)


MISTAKES = {
    # the study
    "key misspelled": Mistake(
        CHECK, ("study.yaml", "'serach'", "did you mean 'search'"), study(serach={})
    ),
    "key of search misspelled": Mistake(
        CHECK, ("study.yaml: search", "'trails'", "did you mean 'trials'"), study(search__trails=9)
    ),
    "number that is a word": Mistake(
        CHECK, ("study.yaml: search.trials", "integer", "'many'"), study(search__trials="many")
    ),
    "method misspelled": Mistake(
        CHECK,
        ("study.yaml: search.methods", "method 'tise'", "did you mean 'ties'"),
        study(search__methods=["tise"]),
    ),
    "sampler misspelled": Mistake(
        CHECK,
        ("study.yaml: search.sampler", "'tpee'", "did you mean 'tpe'"),
        study(search__sampler="tpee"),
    ),
    "sampler class that is not there": Mistake(
        CHECK,
        ("study.yaml: search.sampler", "nowhere:Mine", "install it"),
        study(search__sampler="nowhere:Mine"),
    ),
    "models in one word": Mistake(CHECK, ("study.yaml: models", "list", "'a'"), study(models="a")),
    "no base": Mistake(CHECK, ("study.yaml: base_model", "None"), study(base_model=None)),
    "model named twice": Mistake(
        CHECK, ("study.yaml: models", "/a'", "twice", "once"), study(models=["a", "b", "./a"])
    ),
    "range the wrong way round": Mistake(
        CHECK, ("study.yaml: search.scale", "[1.5, 0]", "[0, 100]"), study(search__scale=[1.5, 0])
    ),
    "negative density": Mistake(
        CHECK,
        ("study.yaml: search.density", "[-0.5, 1]", "[0, 1]"),
        study(search__density=[-0.5, 1]),
    ),
    "dtype as others call it": Mistake(
        CHECK, ("study.yaml: dtype", "'bfloat16'", "'bf16'"), study(dtype="bf16")
    ),
    "method for more models": Mistake(
        CHECK,
        ("search.methods", "model_stock needs 2 models", "got 1"),
        study(models=["a"], search__methods=["model_stock"]),
    ),
    "start that is not there": Mistake(
        CHECK,
        ("study.yaml: search.start", "mine.yaml", "neither a recipe nor a run"),
        study(search__start=["mine.yaml"]),
    ),
    "start outside the ranges": Mistake(
        CHECK,
        ("study.yaml: search.start: recipe 1", "'density': 0.5", "widen"),
        study(search__start=["recipe.yaml"], search__density=[0.6, 1]),
    ),
    "bracket left open": Mistake(
        CHECK, ("study.yaml", "YAML", "line 2"), write("study.yaml", "base_model: base\nmodels: [a")
    ),
    "tabs": Mistake(
        CHECK, ("study.yaml", "YAML", "line 2"), write("study.yaml", "search:\n\ttrials: 3\n")
    ),
    "empty file": Mistake(CHECK, ("study.yaml", "empty"), write("study.yaml", "")),
    "no text": Mistake(CHECK, ("study.yaml", "YAML"), write("study.yaml", bytes(range(256)))),
    "folder instead of a file": Mistake("check tasks", ("tasks", "is a folder", "check the path")),
    "file that is not there": Mistake("check stduy.yaml", ("stduy.yaml", "check the path")),
    # the models
    "model that is not there": Mistake(
        RUN, ("study.yaml: model 'sorr'", "no such folder"), study(models=["a", "sorr"])
    ),
    "model that the hub has not": Mistake(
        RUN, ("study.yaml: model 'org/sorr'", "hub"), study(models=["a", "org/sorr"])
    ),
    "model that is a file": Mistake(
        RUN,
        ("study.yaml", "a/model.safetensors'", "folder"),
        study(models=["a/model.safetensors", "b"]),
    ),
    "folder without a model": Mistake(
        RUN, ("study.yaml", "tasks", "no config.json", "fetch"), study(models=["a", "tasks"])
    ),
    "adapter without its base": Mistake(
        RUN, ("study.yaml", "b'", "adapter", "BASE+"), adapter_alone
    ),
    "pickled weights that would run a command": Mistake(
        RUN, ("study.yaml", "b/pytorch_model.bin", "system'", "nothing of it was run"), hostile_bin
    ),
    "quantised donor": Mistake(
        RUN, ("study.yaml", "b'", "bitsandbytes 8-bit", "full-precision"), quantised
    ),
    "quantised donor in a recipe": Mistake(
        BUILD, ("recipe.yaml", "b'", "bitsandbytes 8-bit", "full-precision"), quantised
    ),
    "config of a quantised model that its tensors are not": Mistake(
        RUN,
        ("study.yaml", "base/config.json", "quantization_config", "remove"),
        config("base", quantization_config={"quant_method": "fp8"}),
    ),
    "no tokenizer": Mistake(RUN, ("study.yaml", "base'", "tokenizer"), without_tokenizer),
    "architecture that nobody knows": Mistake(
        RUN,
        ("study.yaml", "base", "`lamma`"),
        lambda folder: [config(name, model_type="lamma")(folder) for name in ("base", "a", "b")],
    ),
    "other architecture": Mistake(
        RUN, ("study.yaml", "b'", "architectures"), config("b", architectures=["GPT2LMHeadModel"])
    ),
    # the recipe
    "method of a recipe misspelled": Mistake(
        BUILD, ("recipe.yaml", "'tise'", "did you mean 'ties'"), recipe(merge_method="tise")
    ),
    "recipe without its base": Mistake(
        BUILD, ("recipe.yaml", "ties needs a base_model"), recipe(base_model=None)
    ),
    "key of a recipe misspelled": Mistake(
        BUILD, ("recipe.yaml", "'modles'", "did you mean"), recipe(modles=[])
    ),
    "recipe of nothing": Mistake(BUILD, ("recipe.yaml", "models"), recipe(models=[])),
    "weight that is a word": Mistake(
        BUILD,
        ("recipe.yaml", "a'", "'weight'", "'heavy' is not a number"),
        recipe(parameters__weight="heavy"),
    ),
    "parameter misspelled": Mistake(
        BUILD, ("recipe.yaml", "'wieght'", "did you mean 'weight'"), recipe(parameters__wieght=1)
    ),
    "density beyond 1": Mistake(
        BUILD, ("recipe.yaml", "'density'", "2", "[0, 1]"), recipe(parameters__density=2)
    ),
    "layers that a model has not": Mistake(
        BUILD,
        ("recipe.yaml", "layer", "99"),
        lambda folder: write(
            "recipe.yaml",
            "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 99]}]\n",
        )(folder),
    ),
    "model of a recipe that is not there": Mistake(
        BUILD,
        ("recipe.yaml: model 'nowhere'", "no such folder"),
        recipe(models=[{"model": "nowhere"}]),
    ),
    "study instead of a recipe": Mistake("build study.yaml out", ("study.yaml", "merge_method")),
    "recipe instead of a study": Mistake(
        "run recipe.yaml --out run", ("recipe.yaml", "'merge_method'", "build")
    ),
    # the tasks
    "task misspelled": Mistake(
        RUN, ("study.yaml", "'tlel'", "did you mean 'tell'"), study(objective__tasks=["tlel"])
    ),
    "metric misspelled": Mistake(
        RUN,
        ("study.yaml", "'tell'", "'bleu'", "usable: exact_match"),
        study(objective__tasks=[{"task": "tell", "metric": "bleu"}]),
    ),
    "task named twice": Mistake(
        RUN, ("study.yaml", "'tell'", "twice", "one"), study(objective__tasks=["tell", "tell"])
    ),
    "no tasks": Mistake(
        RUN, ("study.yaml: objective.tasks", "a list with an entry"), study(objective__tasks=[])
    ),
    "floor of no task": Mistake(
        RUN,
        ("study.yaml: objective.constraints", "task 'tlel'", "did you mean 'tell'"),
        study(objective__constraints={"tlel": 0.5}),
    ),
    "more items than there are": Mistake(
        CHECK,
        ("study.yaml: objective.items", "9008 items", "20 different", "fewer"),
        study(objective__items__test=9000),
    ),
    "folder of tasks that is not there": Mistake(
        RUN, ("study.yaml: objective.include_path", "tsaks"), study(objective__include_path="tsaks")
    ),
    "data that is not there": Mistake(
        RUN, ("tell.yaml", "data", "tell.jsonl", "check"), remove("tasks/tell.jsonl")
    ),
    "data with a broken line": Mistake(
        RUN,
        ("tasks/tell.jsonl:3", "not JSON"),
        write("tasks/tell.jsonl", '{"question": "a"}\n{"question": "b"}\n{"question": \n'),
    ),
    "task file that is no YAML": Mistake(
        RUN, ("'tell'", "tasks/tell.yaml"), write("tasks/tell.yaml", "task: tell\nx: [")
    ),
    "field that the data has not": Mistake(
        RUN, ("tell.yaml", "qeustion", "correct"), task(doc_to_text="{{qeustion}}")
    ),
    "answers by chance": Mistake(
        RUN,
        ("study.yaml", "task 'tell'", "do_sample: false"),
        task(generation_kwargs__do_sample=True),
    ),
    "text that is not there": Mistake(
        RUN,
        ("study.yaml: objective.tasks[0]", "notes/*.txt"),
        study(objective__tasks=[{"text": "notes/*.txt"}]),
    ),
    "class that is not there": Mistake(
        RUN,
        ("study.yaml", "objective 'nowhere:Mine'", "install it"),
        study(objective__tasks=[{"objective": "nowhere:Mine"}]),
    ),
    "questions with a broken line": Mistake(
        f"{INIT} own.jsonl", ("own.jsonl:2", "not JSON"), write("own.jsonl", '{"question": 1}\n{\n')
    ),
    "questions that are not there": Mistake(f"{INIT} own.jsonl", ("--tasks", "own.jsonl")),
    # options
    "no trials": Mistake(f"{RUN} --trials 0", ("--trials", "'0'", "above 0")),
    "seed that is a word": Mistake(f"{RUN} --seed x", ("--seed", "'x'", "whole number")),
    "memory without a size": Mistake(f"{RUN} --memory lots", ("--memory", "'lots'", "24GB")),
    "time without a unit": Mistake(f"{RUN} --timeout 8", ("--timeout", "'8'", "8h")),
    "half a GPU too much": Mistake(f"{RUN} --gpus-per-worker 1.5", ("--gpus-per-worker", "'1.5'")),
    "device that is not there": Mistake(
        "run study.yaml --out run --device cuda:7", ("--device", "'cuda:7'", "cpu")
    ),
    "device that nobody knows": Mistake(
        "run study.yaml --out run --device gpu", ("--device", "'gpu'", "cpu")
    ),
    "option misspelled": Mistake(f"{RUN} --trails 3", ("--trails", "--help")),
    "command misspelled": Mistake("rnu study.yaml", ("'rnu'", "run")),
    "run without a folder": Mistake("run study.yaml", ("--out", "--help")),
    "split misspelled": Mistake("score a study.yaml --split tset", ("--split", "'tset'", "test")),
    "database that is no URL": Mistake(
        f"{RUN} --storage mine", ("--storage", "postgresql+psycopg://")
    ),
    "database in a folder that is not there": Mistake(
        f"{RUN} --storage sqlite:////nowhere/x.db", ("--storage", "/nowhere", "no such folder")
    ),
    # places and runs
    "folder of something else": Mistake(
        "run study.yaml --out tasks --device cpu", ("tasks", "other files", "choose")
    ),
    "run beneath a file": Mistake(
        "run study.yaml --out file/run --device cpu", ("file/run", "choose another"), in_the_way
    ),
    "merge beneath a file": Mistake(
        "build recipe.yaml file/out", ("file/out", "choose another"), in_the_way
    ),
    "study that would be written over": Mistake(
        f"{INIT} tell --out study.yaml", ("study.yaml exists", "choose another")
    ),
    "run of another study": Mistake(
        "run study.yaml --out done --device cpu",
        ("done", "search.scale was", "--force-new"),
        study(search__scale=[0, 1]),
    ),
    "trial that is not there": Mistake(
        "export done out --trial 99 --device cpu", ("done", "no finished trial 99")
    ),
    "export beneath a file": Mistake(
        "export done file/out --device cpu", ("file/out", "choose another"), in_the_way
    ),
    "export of no run": Mistake("export tasks out", ("tasks", "no run here")),
    "report of no run": Mistake("report tasks", ("tasks", "no run here")),
    "report beneath a file": Mistake(
        "report done --out file/page.html", ("file", "exists", "choose another"), in_the_way
    ),
    "upload of no run": Mistake("push tasks org/name", ("tasks", "no result yet")),
    "upload to no repository": Mistake("push done my/own/name", ("my/own/name", "org/name")),
}
assert len(MISTAKES) >= 40


@pytest.fixture(scope="module")
def done(zoo, tmp_path_factory):
    """A finished run of the study."""
    folder = furnish(tmp_path_factory.mktemp("done"), zoo)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(RUN.split()) == 0
    return folder / "run"


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_named_in_one_line_and_nothing_is_written(
    mistake, zoo, request, tmp_path, monkeypatch, capsys
):
    furnish(tmp_path, zoo)
    if " done" in mistake.command:
        shutil.copytree(request.getfixturevalue("done"), tmp_path / "done")
    mistake.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    capsys.readouterr()
    code = main(mistake.command.split())
    said = capsys.readouterr()
    assert shortcoming(mistake.says, code, said.err) is None
    assert "cost:" not in said.out  # which is said when the base is loaded
    assert tree(tmp_path) == before


def test_study_whose_models_score_0_runs_with_a_note(zoo, tmp_path, monkeypatch, capsys):
    rows = [{"question": f"{letter}?", "answer": letter} for letter in "ABCDEFGHIJKL"]  # unknown
    furnish(tmp_path, zoo)
    write("tasks/tell.jsonl", "".join(json.dumps(row) + "\n" for row in rows))(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(RUN.split()) == 0
    assert "neither the base nor a donor has one of the first 4 search items" in (
        " ".join(capsys.readouterr().out.split())
    )


def as_processes() -> dict[str, Any]:
    """Meet each mistake with a process of its own."""
    command = [
        sys.executable,
        "-c",
        "import sys; from search.cli import main; sys.exit(main())",
    ]
    seconds, failed = {}, {}
    with tempfile.TemporaryDirectory() as name:
        zoo = Path(name) / "zoo"
        base = make_llama(zoo / "base", seed=0)
        for seed, donor in enumerate("ab", start=1):
            make_llama(zoo / donor, seed=seed, base=base)
        model = furnish(Path(name) / "done", zoo)
        subprocess.run([*command, *RUN.split()], cwd=model, check=True, capture_output=True)
        for called, mistake in MISTAKES.items():
            folder = furnish(Path(name) / "now", zoo)
            shutil.copytree(model / "run", folder / "done")
            mistake.make(folder)
            before, start = tree(folder), time.perf_counter()
            words = [*command, *mistake.command.split()]
            met = subprocess.run(words, cwd=folder, capture_output=True, text=True)
            seconds[called] = round(time.perf_counter() - start, 1)
            wrong = shortcoming(mistake.says, met.returncode, met.stderr)
            if wrong or tree(folder) != before:
                failed[called] = wrong or "something was written"
            shutil.rmtree(folder)
    slowest = max(seconds, key=lambda called: seconds[called])
    return {
        "mistakes": len(seconds),
        "failed": failed,
        "slowest": slowest,
        "seconds": seconds[slowest],
        "median": sorted(seconds.values())[len(seconds) // 2],
        "above_5": {called: taken for called, taken in seconds.items() if taken > 5},
    }


if __name__ == "__main__":
    print(json.dumps(as_processes()))
