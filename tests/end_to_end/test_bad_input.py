"""Bad input as a user meets it: exit code 2, one message that says what to do, nothing written."""

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from search.cli import main

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


# What is done to the models


def cut(file: str, length: int) -> Callable[[Path], None]:
    """Keep the first bytes; with a negative length leave out the last."""

    def change(models):
        path = models / file
        path.write_bytes(path.read_bytes()[:length])

    return change


def write(file: str, contents: bytes) -> Callable[[Path], None]:
    def change(models):
        (models / file).write_bytes(contents)

    return change


def remove(file: str) -> Callable[[Path], None]:
    def change(models):
        (models / file).unlink()

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


# Each row: what is done to the models, what is written into the recipe, what is said.


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
        (f"bad/{WEIGHTS}", "damaged", "fetch"),
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
        (f"bad/{WEIGHTS}", NORM, "quantised", "merge the full-precision model"),
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
        ("lora/adapter_config.json", "LoRA adapter"),
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


def listing(folder: Path) -> list[tuple[str, int]]:
    """Every file and folder below, with the time of its last change."""
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def assert_said(error: str, parts: tuple[str, ...]) -> None:
    """One line, with the parts in their order."""
    assert error.startswith("mergesearch: ")
    assert error.count("\n") == 1
    place = 0
    for part in parts:
        assert part in error[place:], (part, error)
        place = error.index(part, place) + len(part)


def refused(models: Path, capsys: Any, command: list[str]) -> str:
    """What a command says that has to be refused and to leave all as it was."""
    before = listing(models)
    assert main([*command, "--device", "cpu"]) == 2
    assert listing(models) == before
    return capsys.readouterr().err


@pytest.mark.parametrize("case", (DAMAGED | MISWRITTEN).values(), ids=DAMAGED | MISWRITTEN)
def test_bad_input_is_one_message_and_leaves_nothing_behind(models, capsys, case):
    case.damage(models)
    recipe = write_recipe(models, case.recipe)
    out = models / "new" / "out"
    assert_said(refused(models, capsys, ["build", str(recipe), str(out)]), case.message)


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
    assert_said(refused(models, capsys, command), case.message)


def test_study_with_a_damaged_tokenizer_is_refused(models, make_study, capsys):
    cut("base/tokenizer.json", 100)(models)
    study = make_study(models / "study", base_model=str(models / "base"))
    command = ["run", str(study), "--out", str(models / "run")]
    assert_said(refused(models, capsys, command), ("base", "tokenizer", "fetch"))


@pytest.mark.parametrize("contents", [b'{"model": {', b'{"model": []}', b"[]"])
def test_check_of_models_with_a_damaged_tokenizer_names_it(models, capsys, contents):
    write("bad/tokenizer.json", contents)(models)
    error = refused(models, capsys, ["check", str(write_recipe(models, {}))])
    assert_said(error, ("bad/tokenizer.json", "damaged", "fetch"))


def test_place_that_cannot_be_written_is_named(models, capsys):
    (models / "file").write_text("in the way")
    recipe = write_recipe(models, {})
    for out in ("file", "file/out", "bad"):
        error = refused(models, capsys, ["build", str(recipe), str(models / out)])
        assert_said(error, (out, "choose another folder"))


def test_the_models_themselves_are_good(models):
    """So that it is the damage that the others are refused for."""
    adapter()(models)
    donors = [{"model": name} for name in ("good", "bad", "sharded", "base+lora")]
    recipe = write_recipe(models, {"models": donors})
    assert main(["build", str(recipe), str(models / "new" / "out"), "--device", "cpu"]) == 0
