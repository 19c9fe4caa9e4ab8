"""Hostile files, names and numbers: refused in one sentence that names the file, or harmless."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistakes import (
    BUILD,
    CHECK,
    INIT,
    RUN,
    Change,
    config,
    furnish,
    recipe,
    shortcoming,
    study,
    task,
    tree,
    write,
)
from search.cli import main

DEEP = "[" * 100_000
WEIGHTS = "model.safetensors"


class Case(NamedTuple):
    """One input.

    Args:
        command: Its words, given in a folder with models, study, recipe and task.
        says: Parts of the one line, in this order; None: the input does no harm.
        make: Done to the folder before.
    """

    command: str
    says: tuple[str, ...] | None
    make: Change


def header(edit: Callable[[dict[str, Any]], object], data: bytes = b"") -> Change:
    """Change the header of donor b's weights, and add bytes to its data."""

    def change(folder):
        path = folder / "b" / WEIGHTS
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        contents = json.loads(raw[8 : 8 + length])
        edit(contents)
        text = json.dumps(contents).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :] + data)

    return change


def also(name: str, shape: list[int], dtype: str = "F32") -> Change:
    """Donor b has a tensor without data."""

    def edit(contents):
        end = max(each["data_offsets"][1] for each in contents.values() if "data_offsets" in each)
        contents[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end]}

    return header(edit)


def many_empty(folder: Path) -> None:
    def edit(contents):
        end = max(each["data_offsets"][1] for each in contents.values() if "data_offsets" in each)
        for number in range(20_000):
            contents[f"t{number}"] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}

    header(edit)(folder)


def unharmed(_folder: Path) -> None:
    pass


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def everywhere(**changes: Any) -> Change:
    """All three models' configs."""
    return both(*(config(name, **changes) for name in ("base", "a", "b")))


def lora(edit: Callable[[dict[str, Any]], object] = dict, rank: int = 2, where: str = "lora"):
    """An adapter of one weight; ``b`` of study and recipe becomes base + adapter."""

    def change(folder):
        (folder / where).mkdir(exist_ok=True)
        settings = {"peft_type": "LORA", "lora_alpha": 4, "r": rank, "target_modules": ["q_proj"]}
        edit(settings)
        (folder / where / "adapter_config.json").write_text(json.dumps(settings))
        key = "base_model.model.model.layers.0.self_attn.q_proj"
        pair = {
            f"{key}.lora_A.weight": torch.zeros(rank, 32),
            f"{key}.lora_B.weight": torch.zeros(32, rank),
        }
        save_file(pair, folder / where / "adapter_model.safetensors")
        if where == "lora":
            recipe(models=[{"model": "a"}, {"model": "base+lora"}])(folder)
            study(models=["a", "base+lora"])(folder)

    return change


def settings(**changes: Any) -> Change:
    return lora(lambda config: config.update(changes))


def lora_config(text: str) -> Change:
    return both(lora(), write("lora/adapter_config.json", text))


def bin_adapter(folder: Path) -> None:
    write("base/adapter_config.json", '{"base_model_name_or_path": "a", "peft_type": "LORA"}')(
        folder
    )
    torch.save({"x": torch.zeros(1)}, folder / "base" / "adapter_model.bin")


def tokenizer(edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder):
        file = folder / "base" / "tokenizer.json"
        contents = json.loads(file.read_text())
        edit(contents)
        file.write_text(json.dumps(contents))

    return change


def vocabulary(edit: Callable[[dict[str, int]], object]) -> Change:
    return tokenizer(lambda contents: edit(contents["model"]["vocab"]))


def twice(file: str, key: str, value: str) -> Change:
    """A JSON object has one of its keys again."""

    def change(folder):
        text = (folder / file).read_text().rstrip().removesuffix("}")
        (folder / file).write_text(f'{text}, "{key}": {value}}}')

    return change


def in_shards(folder: Path) -> None:
    index(folder, f"1-{WEIGHTS}")
    shutil.copy(folder / "a" / WEIGHTS, folder / "b" / f"1-{WEIGHTS}")


def without_tensors(folder: Path) -> None:
    save_file({}, folder / "lora" / "adapter_model.safetensors")


def splitting(contents: dict[str, Any]) -> None:
    """Split words by an expression that takes for ever on long ones."""
    pattern = {"Regex": "(a|a)*$"}
    kind = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    contents["pre_tokenizer"] = kind


def doubling(contents: dict[str, Any]) -> None:
    twice = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    contents["normalizer"] = {"type": "Sequence", "normalizers": [twice] * 60}


def template(text: str) -> Change:
    return both(write("base/chat_template.jinja", text), study(objective__apply_chat_template=True))


def tokenizer_config(**changes: Any) -> Change:
    def change(folder):
        file = folder / "base" / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def folder_called(name: str) -> Change:
    return lambda folder: (folder / name).mkdir()


def link(name: str, target: str) -> Change:
    return lambda folder: (folder / name).symlink_to(target)


def pipe(name: str) -> Change:
    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def stored_as(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Donor b stores one weight otherwise."""

    def edit(folder):
        tensors = load_file(folder / "b" / WEIGHTS)
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = change(tensors[name])
        save_file(tensors, folder / "b" / WEIGHTS, metadata={"format": "pt"})

    return edit


def adapter_of(dtype: torch.dtype) -> Change:
    def change(folder):
        file = folder / "lora" / "adapter_model.safetensors"
        save_file({name: part.to(dtype) for name, part in load_file(file).items()}, file)

    return both(lora(), change)


def shared_shards(folder: Path) -> None:
    """Donor b becomes two shards of the same tensors."""
    index(folder, f"1-{WEIGHTS}")
    shutil.copy(folder / "a" / WEIGHTS, folder / "b" / f"1-{WEIGHTS}")
    shutil.copy(folder / "a" / WEIGHTS, folder / "b" / f"2-{WEIGHTS}")
    file = folder / "b" / f"{WEIGHTS}.index.json"
    names = json.loads(file.read_text())["weight_map"]
    names[next(iter(names))] = f"2-{WEIGHTS}"
    file.write_text(json.dumps({"weight_map": names}))


def index(folder: Path, file: str) -> None:
    """Donor b becomes a model of shards, all of which are one file that its index names."""
    names = [*load_file(folder / "b" / WEIGHTS)]
    (folder / "b" / WEIGHTS).unlink()
    text = json.dumps({"weight_map": dict.fromkeys(names, file)})
    (folder / "b" / f"{WEIGHTS}.index.json").write_text(text)


def group_of_itself(folder: Path) -> None:
    write("tasks/round.yaml", "group: round\ntask: [round]\n")(folder)
    study(objective__tasks=["round"])(folder)


def laughs(*after: str) -> str:
    lines = ["x0: &x0 [a, a, a, a, a, a, a, a, a]"]
    lines += [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join([*lines, *after])


def recipe_text(text: str) -> Change:
    return write("recipe.yaml", f"merge_method: linear\n{text}\n")


def study_text(line: str) -> Change:
    def change(folder):
        file = folder / "study.yaml"
        file.write_text(f"{file.read_text()}{line}\n")

    return change


QUESTIONS = "".join(json.dumps({"question": f"{n}?", "answer": "1"}) + "\n" for n in range(20))


def questions(text: str) -> Change:
    return write("own.jsonl", QUESTIONS + text + "\n")


def task_text(lines: str, **trusted: bool) -> Change:
    """Add lines to the task; a study may trust its code."""

    def change(folder):
        file = folder / "tasks" / "tell.yaml"
        file.write_text(f"{file.read_text()}{lines}\n")
        study(**{f"objective__{name}": value for name, value in trusted.items()})(folder)

    return change


def group(members: str) -> Change:
    return both(
        write("tasks/group.yaml", f"group: mine\ntask: {members}\n"),
        study(objective__tasks=["mine"]),
    )


def with_code(code: str, key: str = "doc_to_text") -> Change:
    return both(
        task(**{key: "PLACE"}),
        lambda f: write(
            "tasks/tell.yaml",
            (f / "tasks/tell.yaml").read_text().replace("PLACE", "!function own.text"),
        )(f),
        write("tasks/own.py", code),
        study(objective__trust_task_code=True),
    )


OWN = f"{INIT} own.jsonl"
LONG, DEEP_PATH = "a" * 5000, "x/" * 3000
CHECK_LONG = f"check {LONG} --device cpu"
CASES = {
    # headers of safetensors
    "shape [0, 2^63]": Case(BUILD, ("b", "'extra'"), also("extra", [0, 2**63])),
    "shape [0, 2^62]": Case(BUILD, ("b", "'extra'"), also("extra", [0, 2**62, 2**62])),
    "layer of 5000 digits": Case(BUILD, ("b",), also(f"model.layers.{'1' * 5000}.x", [0])),
    "empty name": Case(BUILD, ("b",), also("", [0])),
    "20,000 empty tensors": Case(BUILD, ("b",), many_empty),
    "integers in place of weights": Case(
        BUILD, ("b", "I32", "up_proj"), stored_as(lambda old: old.view(torch.int32))
    ),
    "booleans in place of weights": Case(
        BUILD, ("b", "BOOL", "up_proj"), stored_as(lambda old: old > 0)
    ),
    "no numbers, scored": Case(
        "score b study.yaml --device cpu",
        ("'b'", "up_proj", "NaN"),
        stored_as(lambda old: old * float("nan")),
    ),
    "tensor in two shards": Case(BUILD, (f"b/2-{WEIGHTS}", f"1-{WEIGHTS} has"), shared_shards),
    # indexes
    "index of ../x": Case(BUILD, ("b", "index", "../a"), lambda f: index(f, f"../a/{WEIGHTS}")),
    "index of /x": Case(BUILD, ("b", "index"), lambda f: index(f, str(f / "a" / WEIGHTS))),
    "index of a config": Case(BUILD, ("index", "'config.json'"), lambda f: index(f, "config.json")),
    "index of no name": Case(BUILD, ("index", "''"), lambda f: index(f, "")),
    "index of a long name": Case(BUILD, ("index",), lambda f: index(f, "a" * 5000)),
    "deep index": Case(
        BUILD,
        ("b", "index"),
        both(
            lambda f: (f / "b" / WEIGHTS).unlink(),
            write(f"b/{WEIGHTS}.index.json", '{"weight_map": ' + DEEP),
        ),
    ),
    "index of a device, scored": Case(
        "score b study.yaml --device cpu",
        ("b", "index", "outside"),
        lambda f: index(f, "/dev/zero"),
    ),
    "header that is cut, scored": Case(
        "score b study.yaml --device cpu",
        ("b/model.safetensors",),
        write(f"b/{WEIGHTS}", b"x" * 99),
    ),
    # configs
    "deep config": Case(BUILD, ("a/config.json",), write("a/config.json", '{"a": ' + DEEP)),
    "deep and closed config": Case(
        BUILD,
        ("base/config.json",),
        write("base/config.json", '{"a": ' + "[" * 3000 + "1" + "]" * 3000 + "}"),
    ),
    "huge number in a config": Case(
        BUILD, ("base/config.json",), write("base/config.json", '{"a": %s}' % ("1" * 5000))
    ),
    "kernel of somebody else": Case(CHECK, None, everywhere(attn_implementation="evil/kernel")),
    "kernel of somebody else, underscored": Case(
        CHECK, None, everywhere(_attn_implementation="evil/kernel")
    ),
    "flash attention that is not there": Case(
        CHECK, None, everywhere(_attn_implementation="flash_attention_2")
    ),
    "kernel to be compiled": Case(
        "score a study.yaml --device cpu", None, everywhere(_attn_implementation="flex_attention")
    ),
    "tied by a word": Case(RUN, ("base",), everywhere(tie_word_embeddings="yes")),
    "a billion layers": Case(RUN, ("base",), everywhere(num_hidden_layers=10**9)),
    "10 million labels": Case(
        RUN, ("base/config.json", "num_labels"), everywhere(num_labels=10**7)
    ),
    "no width": Case(RUN, ("base",), everywhere(hidden_size=0)),
    "no heads": Case(RUN, ("base",), everywhere(num_attention_heads=0)),
    "end of text that is a word": Case(RUN, ("base",), everywhere(eos_token_id="x")),
    "activation that is none": Case(RUN, ("base",), everywhere(hidden_act="__import__")),
    "cache by a word": Case(RUN, ("base",), everywhere(use_cache="x")),
    "rope of tomorrow": Case(
        RUN, ("base",), everywhere(rope_scaling={"rope_type": "newrope", "factor": 2.0})
    ),
    "activation of tomorrow": Case(RUN, ("base",), everywhere(hidden_act="swiglu9")),
    "text config that is a list": Case(
        BUILD, ("base/config.json", "text_config"), config("base", text_config=[1])
    ),
    "generation config that is a list": Case(
        RUN, ("base", "generation_config"), write("base/generation_config.json", "[1]")
    ),
    "key twice in a config": Case(
        BUILD,
        ("b/config.json", "'rms_norm_eps' comes twice"),
        twice("b/config.json", "rms_norm_eps", "9"),
    ),
    "key twice in an index": Case(
        BUILD,
        ("index.json", "'weight_map' comes twice"),
        both(in_shards, twice(f"b/{WEIGHTS}.index.json", "weight_map", "{}")),
    ),
    "key twice in a generation config": Case(
        CHECK,
        ("base/generation_config.json", "'eos_token_id' comes twice"),
        write("base/generation_config.json", '{"eos_token_id": 1, "eos_token_id": 2}'),
    ),
    "NaN in a config": Case(
        CHECK,
        ("base/config.json", "NaN"),
        lambda f: write(
            "base/config.json", (f / "base/config.json").read_text().replace("1e-06", "NaN")
        )(f),
    ),
    "architectures that are a text": Case(
        BUILD, ("b/config.json", "architectures", "list"), config("b", architectures="Llama")
    ),
    "rows that the config does not have, in a study": Case(
        CHECK, ("study.yaml", "base's config.json"), everywhere(vocab_size=10**12)
    ),
    "context of -1 tokens": Case(
        CHECK,
        ("'tell'", "config.json", "-1 tokens", "correct that"),
        everywhere(max_position_embeddings=-1),
    ),
    # adapters
    "key twice in an adapter config": Case(
        BUILD,
        ("adapter_config.json", "'lora_alpha' comes twice"),
        both(lora(), twice("lora/adapter_config.json", "lora_alpha", "64")),
    ),
    "rank that the tensors do not have": Case(
        BUILD, ("adapter_model.safetensors", "lora_A", "rank 2", "says 16"), settings(r=16)
    ),
    "rank by a pattern that the tensors do not have": Case(
        BUILD, ("lora_A", "rank 2", "says 4"), settings(rank_pattern={"q_proj": 4})
    ),
    "row before the first": Case(
        BUILD,
        ("adapter_config.json", "trainable_token_indices", "-1 is no row's number"),
        settings(trainable_token_indices={"embed_tokens": [-1]}),
    ),
    "adapter without tensors": Case(
        BUILD, ("adapter_model.safetensors", "no tensors"), both(lora(), without_tensors)
    ),
    "pickled adapter beside the base": Case(RUN, ("base",), bin_adapter),
    "adapter beside the base": Case(
        RUN,
        ("base", "adapter"),
        lora(lambda c: c.update(base_model_name_or_path="a"), where="base"),
    ),
    "adapter of a hub id beside the base": Case(
        RUN,
        ("base", "adapter"),
        lora(lambda c: c.update(base_model_name_or_path="org/name"), where="base"),
    ),
    "adapter config that is a number": Case(BUILD, ("adapter_config.json",), lora_config("7")),
    "deep adapter config": Case(BUILD, ("adapter_config.json",), lora_config('{"a": ' + DEEP)),
    "alpha that is a word": Case(
        BUILD, ("adapter_config.json", "lora_alpha"), settings(lora_alpha="x")
    ),
    "alpha that is a list": Case(
        BUILD, ("adapter_config.json", "lora_alpha"), settings(lora_alpha=[4])
    ),
    "alpha that is null": Case(
        BUILD, ("adapter_config.json", "lora_alpha", "None"), settings(lora_alpha=None)
    ),
    "alpha that is true": Case(
        BUILD, ("adapter_config.json", "lora_alpha", "True"), settings(lora_alpha=True)
    ),
    "alpha that is a number in quotes": Case(
        BUILD, ("adapter_config.json", "lora_alpha", "'4'"), settings(lora_alpha="4")
    ),
    "rslora that is a word": Case(
        BUILD, ("adapter_config.json", "use_rslora", "'false'"), settings(use_rslora="false")
    ),
    "settings of an adapter that are null": Case(
        BUILD,
        None,
        settings(use_rslora=None, use_dora=None, fan_in_fan_out=None, alpha_pattern=None),
    ),
    "alpha pattern that is a list": Case(
        BUILD, ("adapter_config.json", "alpha_pattern"), settings(alpha_pattern=["x"])
    ),
    "alpha pattern that is no expression": Case(
        BUILD, ("adapter_config.json", "alpha_pattern"), settings(alpha_pattern={"(a": 1})
    ),
    "alpha pattern that takes for ever": Case(
        BUILD,
        ("adapter_config.json", "alpha_pattern"),
        settings(alpha_pattern={r"(?:.*){0,30}(.*.*.*.*.*.*.*.*)+[0-9]!?\b\B": 1}),
    ),
    "alpha pattern of words": Case(
        BUILD, ("adapter_config.json", "alpha_pattern"), settings(alpha_pattern={"q_proj": "x"})
    ),
    "alpha that is infinite": Case(
        BUILD, ("adapter_config.json", "lora_alpha"), settings(lora_alpha=float("inf"))
    ),
    "alpha beyond float32": Case(
        BUILD, ("adapter_config.json", "alpha_pattern"), settings(alpha_pattern={"q_proj": 1e308})
    ),
    "model in place of an adapter": Case(
        BUILD, ("b", "no adapter"), recipe(models=[{"model": "a"}, {"model": "base+b"}])
    ),
    "adapter of integers": Case(
        BUILD, ("adapter_model.safetensors", "lora_A", "I32"), adapter_of(torch.int32)
    ),
    "adapter of float8": Case(
        BUILD, ("adapter_model.safetensors", "lora_A", "F8_E4M3"), adapter_of(torch.float8_e4m3fn)
    ),
    "adapter of rank 0": Case(BUILD, ("adapter_model.safetensors", "rank"), lora(rank=0)),
    # what a base has beside its weights
    "folder called tokenizer": Case(BUILD, None, folder_called("base/tokenizer")),
    "dangling link": Case(BUILD, None, link("base/tokenizer.old", "nowhere")),
    # names
    "home of nobody": Case("check ~nosuchuser/x --device cpu", ("~nosuchuser",), unharmed),
    "home of nobody as a model": Case(
        "score ~nosuchuser study.yaml --device cpu", ("~nosuchuser",), unharmed
    ),
    "home of nobody in a study": Case(
        CHECK, ("~nosuchuser",), study(models=["a", "~nosuchuser/x"])
    ),
    "home of nobody in a recipe": Case(
        BUILD, ("~nosuchuser",), recipe(models=[{"model": "~nosuchuser/x"}])
    ),
    "home of nobody in init": Case(
        "init --base ~nosuchuser/x --models a b --tasks tell --out new.yaml",
        ("~nosuchuser",),
        unharmed,
    ),
    "home of nobody for questions": Case(
        f"{INIT} ~nosuchuser/x.jsonl", ("--tasks", "~nosuchuser"), unharmed
    ),
    "device without numbers": Case(
        "run study.yaml --out run --device meta", ("--device", "'meta'", "no such device"), unharmed
    ),
    "build where one is": Case("build recipe.yaml . --device cpu", (".", "exists"), unharmed),
    "seed of 400 digits as an option": Case(f"{RUN} --seed {'9' * 400}", ("--seed",), unharmed),
    "empty name in a recipe": Case(
        BUILD, ("recipe.yaml: models.0.model", "''"), recipe(models=[{"model": ""}])
    ),
    "empty name of a vocabulary": Case(
        BUILD, ("recipe.yaml: tokenizer_source", "''"), recipe(tokenizer_source="model:")
    ),
    "empty name in a study": Case(CHECK, ("study.yaml", "''"), study(models=["a", ""])),
    "long name": Case(CHECK_LONG, ("aaa", "File name too long"), unharmed),
    "long path": Case(f"check {DEEP_PATH}y --device cpu", ("x/x", "File name too long"), unharmed),
    "long name in init": Case(
        f"init --base {LONG} --models a b --tasks tell --out new.yaml", ("aaa",), unharmed
    ),
    "long model in a study": Case(CHECK, ("aaa",), study(models=["a", LONG])),
    "long path in a recipe": Case(BUILD, ("x/x",), recipe(models=[{"model": DEEP_PATH}])),
    "name with a zero byte": Case(CHECK, ("study.yaml",), study(models=["a", "b\0c"])),
    "file for the base, scored": Case(
        "score a study.yaml --device cpu",
        ("study.yaml", "a/config.json' is a file"),
        study(base_model="a/config.json"),
    ),
    "folder in another Unicode form": Case(
        BUILD,
        None,
        both(
            lambda f: (f / "b").rename(f / "mode\u0301l"),
            recipe(models=[{"model": "a"}, {"model": "mod\u00e9l"}]),
        ),
    ),
    "task in another Unicode form": Case(
        CHECK,
        ("another Unicode form", "copy it"),
        both(task(task="te\u0301ll"), study(objective__tasks=["t\u00e9ll"])),
    ),
    "model of no UTF-8": Case(
        "score m\udcff study.yaml --device cpu",
        ("UTF-8", "rename"),
        lambda folder: (folder / "b").rename(folder / "m\udcff"),
    ),
    "run of no UTF-8": Case(
        "run study.yaml --out r\udcff --device cpu", ("UTF-8", "choose another"), unharmed
    ),
    "prompt of no UTF-8": Case("sample run --prompt \udcff", ("--prompt", "UTF-8"), unharmed),
    "long --out": Case(f"build recipe.yaml {LONG}", ("aaa", "too long"), unharmed),
    "long run": Case(f"run study.yaml --out {LONG} --device cpu", ("aaa", "too long"), unharmed),
    "long model to score": Case(f"score {LONG} study.yaml --device cpu", ("aaa",), unharmed),
    "pipe for a recipe": Case(BUILD, ("recipe.yaml", "named pipe"), pipe("recipe.yaml")),
    "pipe for a task": Case(CHECK, ("tasks/tell.yaml", "named pipe"), pipe("tasks/tell.yaml")),
    "pipe for weights": Case(BUILD, (f"b/{WEIGHTS}", "named pipe"), pipe(f"b/{WEIGHTS}")),
    "device for a study": Case("check /dev/zero --device cpu", ("/dev/zero",), unharmed),
    # tokenizers
    "template without end": Case(
        RUN,
        ("base", "template"),
        template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
    ),
    "template of 20 MB": Case(RUN, ("base", "template"), template("x" * 20_000_000)),
    "template that makes much": Case(RUN, ("base", "template"), template("{{ 'x' * 10**11 }}")),
    "template that calls itself": Case(
        RUN, ("base", "template"), template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")
    ),
    "template that divides by zero": Case(RUN, ("base", "template"), template("{{ 1 // 0 }}")),
    "template that makes a long text": Case(
        CHECK, ("base", "template", "2,000,000 characters"), template("{{ 'x' * 2000000 }}")
    ),
    "template that makes no text": Case(
        CHECK, ("base", "template", "no text"), template("{{ '' }}")
    ),
    "template in UTF-16": Case(
        CHECK,
        ("base/chat_template.jinja", "UTF-8"),
        both(template(""), write("base/chat_template.jinja", "x".encode("utf-16"))),
    ),
    "template with an open bracket": Case(RUN, ("base", "template"), template("{{ 1")),
    "token 2^32 - 1": Case(RUN, ("base",), vocabulary(lambda v: v.update(a=2**32 - 1))),
    "token beyond the rows": Case(
        CHECK,
        ("study.yaml", "'tell'", "has the token 'a'", "48 rows"),
        both(vocabulary(lambda v: v.update(a=10**6))),
    ),
    "token number that is a text": Case(
        CHECK, ("base", "cannot read its tokenizer", '"5"'), vocabulary(lambda v: v.update(a="5"))
    ),
    "no tokens": Case(RUN, ("base",), vocabulary(dict.clear)),
    "normalizer that doubles": Case(RUN, ("base", "tokenizer"), tokenizer(doubling)),
    "words that an expression never ends on": Case(
        CHECK, ("base", "tokenizer", "when it encodes"), tokenizer(splitting)
    ),
    "key twice in a tokenizer's config": Case(
        CHECK,
        ("base/tokenizer_config.json", "'eos_token' comes twice"),
        twice("base/tokenizer_config.json", "eos_token", '"a"'),
    ),
    "length that is a word": Case(RUN, ("base",), tokenizer_config(model_max_length="long")),
    # questions of one's own
    "lone surrogate": Case(
        OWN, ("own.jsonl",), questions(r'{"question": "\ud800", "answer": "1"}')
    ),
    "deep row": Case(OWN, ("own.jsonl:21",), questions(DEEP)),
    "deep field": Case(
        OWN, ("own.jsonl:21",), questions('{"question": "x", "answer": "1", "z": ' + DEEP)
    ),
    "key that comes twice": Case(
        OWN, ("own.jsonl:21",), questions('{"question": "x", "question": "y", "answer": "1"}')
    ),
    "huge number in a row": Case(
        OWN, ("own.jsonl:21",), questions('{"question": "x", "answer": %s}' % ("1" * 5000))
    ),
    "byte order mark": Case(
        OWN, None, lambda f: write("own.jsonl", b"\xef\xbb\xbf" + QUESTIONS.encode())(f)
    ),
    "pattern for a name": Case(
        f"{INIT} ö[x]{{y}}.jsonl", None, lambda f: write("ö[x]{y}.jsonl", QUESTIONS)(f)
    ),
    "line separator in a text": Case(
        OWN, None, questions('{"question": "a\u2028b\x85c", "answer": "1"}')
    ),
    # tasks
    "group of itself": Case(CHECK, ("study.yaml", "round"), group_of_itself),
    "data that are no rows": Case(
        CHECK, ("tell.yaml",), task(dataset_kwargs__data_files__test="/etc/passwd")
    ),
    "text of everything": Case(
        CHECK, ("study.yaml", "/**/*"), study(objective__tasks=[{"text": "/**/*"}])
    ),
    "empty prompt": Case(
        CHECK, ("study.yaml", "tell", "makes no token", "''"), task(doc_to_text="", num_fewshot=0)
    ),
    "task template without end": Case(
        CHECK,
        ("tell",),
        task(
            doc_to_text="{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
            "{% endfor %}"
        ),
    ),
    "task file that includes itself": Case(
        CHECK, ("tell",), lambda f: write("tasks/tell.yaml", "include: tell.yaml\ntask: tell\n")(f)
    ),
    "task whose name is a number": Case(
        CHECK, ("tasks/tell.yaml", "task is 5", "quotes"), task(task=5)
    ),
    "shots that are a word": Case(
        CHECK, ("tell.yaml", "num_fewshot is 'x'", "whole number"), task(num_fewshot="x")
    ),
    "prompt that is a list": Case(
        CHECK, ("tell.yaml", "doc_to_text is ['a']", "text"), task(doc_to_text=["a"])
    ),
    "settings that are a word": Case(
        CHECK, ("tell.yaml", "generation_kwargs is 'x'"), task(generation_kwargs="x")
    ),
    "metrics that are a mapping": Case(
        CHECK, ("tell.yaml", "metric_list is {'a': 1}", "list"), task(metric_list={"a": 1})
    ),
    "task in two files": Case(
        CHECK,
        ("'tell' is in", "again.yaml", "tell.yaml", "rename"),
        lambda f: shutil.copy(f / "tasks" / "tell.yaml", f / "tasks" / "again.yaml"),
    ),
    "text of other bytes": Case(
        CHECK,
        ("a/model.safetensors", "not UTF-8"),
        study(objective__tasks=[{"text": f"a/{WEIGHTS}"}]),
    ),
    "text of nothing": Case(
        CHECK,
        ("empty.txt", "no text"),
        both(write("empty.txt", " \n"), study(objective__tasks=[{"text": "empty.txt"}])),
    ),
    "answers of no tokens": Case(
        CHECK, ("'tell'", "max_gen_toks is 0", "1 or more"), task(generation_kwargs__max_gen_toks=0)
    ),
    "data that are a folder of everything": Case(
        CHECK, ("tell.yaml", "/etc", "check dataset_path"), task(dataset_path="/etc")
    ),
    "filters that are none": Case(CHECK, ("study.yaml", "'tell'"), task(filter_list=[])),
    "length that is no number": Case(
        CHECK, ("study.yaml", "'tell'"), task(generation_kwargs={"max_gen_toks": "x"})
    ),
    "one question in all": Case(
        OWN,
        ("own", "1 different questions", "3 or more"),
        write("own.jsonl", '{"question": "a", "answer": "b"}\n' * 20),
    ),
    "description of 20 million letters": Case(
        CHECK, ("study.yaml", "'tell'", "the template"), task(description="{{ 'x' * 20000000 }}")
    ),
    "billion laughs in a task": Case(CHECK, ("tell.yaml", "aliases"), task_text(laughs())),
    "anchor in itself, in a task": Case(CHECK, ("tell.yaml", "alias"), task_text("x: &a [*a]")),
    "key twice in a task": Case(
        CHECK, ("tell.yaml", "'doc_to_text'", "twice"), task_text("doc_to_text: x")
    ),
    "include of a pipe": Case(
        CHECK,
        ("tasks/more", "named pipe"),
        both(task_text("include: more"), lambda f: os.mkfifo(f / "tasks" / "more")),
    ),
    "include of a device": Case(CHECK, ("/dev/zero", "device"), task_text("include: /dev/zero")),
    "include of brackets, trusted": Case(
        CHECK,
        ("tasks/more", "levels deep"),
        both(task_text("include: more", trust_task_code=True), write("tasks/more", f"x: {DEEP}")),
    ),
    "include of nothing": Case(CHECK, ("tell.yaml", "nowhere"), task_text("include: nowhere")),
    "task file called .yml": Case(
        CHECK,
        ("'tell'", "tell.yml", "call it .yaml"),
        lambda f: (f / "tasks/tell.yaml").rename(f / "tasks/tell.yml"),
    ),
    "group with a number in it": Case(CHECK, ("group.yaml", "task is 5"), group("[5]")),
    "group with a task that lacks all": Case(
        CHECK, ("'mine'",), group("[{task: own, doc_to_text: x}]")
    ),
    "filter of a broken expression": Case(
        CHECK,
        ("'tell'", "filter 'x'", "unterminated"),
        task(filter_list=[{"name": "x", "filter": [{"function": "regex", "regex_pattern": "(a"}]}]),
    ),
    "filter with a setting that is none": Case(
        CHECK,
        ("'tell'", "filter 'x'", "nosuch"),
        task(filter_list=[{"name": "x", "filter": [{"function": "regex", "nosuch": 1}]}]),
    ),
    "data of nowhere": Case(
        CHECK, ("tell.yaml", "dataset_path is missing", "json"), task(dataset_path=None)
    ),
    "data file that is a number": Case(
        CHECK, ("tell.yaml", "data_files is 5", "mapping"), task(dataset_kwargs__data_files=5)
    ),
    "prefix that is a number": Case(CHECK, ("tell.yaml", "gen_prefix is 5"), task(gen_prefix=5)),
    "metric that is a number": Case(
        CHECK, ("tell.yaml", "metric_list[].metric is 5"), task(metric_list=[{"metric": 5}])
    ),
    "metric without a name": Case(
        CHECK, ("tell.yaml", "metric_list[].metric is None"), task(metric_list=[{"x": 5}])
    ),
    "metric that is no mapping": Case(
        CHECK, ("tell.yaml", "metric_list[] is 'acc'"), task(metric_list=["acc"])
    ),
    "filter that is no mapping": Case(
        CHECK, ("tell.yaml", "filter_list[] is 'x'"), task(filter_list=["x"])
    ),
    "filter without steps": Case(
        CHECK, ("tell.yaml", "filter_list[].filter is None"), task(filter_list=[{"name": "x"}])
    ),
    "filter without a function": Case(
        CHECK,
        ("tell.yaml", "filter[].function is None"),
        task(filter_list=[{"name": "x", "filter": [{"regex_pattern": "a"}]}]),
    ),
    "generation setting that there is not": Case(
        CHECK, ("'tell'", "'untli'", "correct"), task(generation_kwargs__untli=["x"])
    ),
    "end that is no text": Case(
        CHECK, ("'tell'", "until", "{'a': 1}"), task(generation_kwargs__until=[{"a": 1}])
    ),
    "task's code that exits": Case(
        CHECK, ("tell.yaml", "SystemExit"), with_code("import sys\nsys.exit(0)\n")
    ),
    **{
        f"task's {key} that never ends": Case(
            CHECK,
            ("tell.yaml", key, "longer than 1 s"),
            with_code("def text(_):\n    while True: pass\n", key),
        )
        for key in ("doc_to_text", "doc_to_target", "process_docs")
    },
    "task's code that is a pipe": Case(
        CHECK, ("own.py", "named pipe"), both(with_code(""), pipe("tasks/own.py"))
    ),
    "data by a pattern of nothing": Case(
        CHECK,
        ("tell.yaml", "no file fits"),
        task(dataset_kwargs__data_files__test="no*.jsonl"),
    ),
    "deep task file": Case(
        CHECK, ("tasks/tell.yaml",), write("tasks/tell.yaml", f"task: tell\nx: {DEEP}")
    ),
    "deep and closed task file": Case(
        CHECK, ("tell",), write("tasks/tell.yaml", "task: tell\nx: " + "[" * 900 + "]" * 900)
    ),
    # YAML
    "billion laughs": Case(
        BUILD,
        ("recipe.yaml",),
        write("recipe.yaml", laughs("merge_method: linear", "models: *x11")),
    ),
    "anchor in itself": Case(BUILD, ("recipe.yaml",), recipe_text("models: &a [*a]")),
    "anchor in itself, in a study": Case(
        CHECK, ("study.yaml",), study_text("tokenizer: &a {tokens: *a}")
    ),
    "100,000 brackets": Case(BUILD, ("recipe.yaml",), recipe_text(f"models: {DEEP}")),
    "500 brackets": Case(BUILD, ("recipe.yaml",), recipe_text(f"models: {'[' * 500}{']' * 500}")),
    "integer of 5000 digits": Case(BUILD, ("recipe.yaml",), recipe_text(f"models: {'1' * 5000}")),
    "!!int zz": Case(BUILD, ("recipe.yaml",), recipe_text("models: !!int zz")),
    "!!float zz": Case(BUILD, ("recipe.yaml",), recipe_text("models: !!float zz")),
    "!!timestamp zz": Case(BUILD, ("recipe.yaml",), recipe_text("models: !!timestamp zz")),
    "500 brackets in a study": Case(
        CHECK, ("study.yaml",), study_text(f"dtype: {'[' * 500}{']' * 500}")
    ),
    "set of models": Case(
        CHECK,
        ("study.yaml", "line 2", "!!set"),
        lambda f: write(
            "study.yaml",
            (f / "study.yaml").read_text().replace("models:\n- a\n- b", "models: !!set {a, b}"),
        )(f),
    ),
    "30th of February": Case(CHECK, ("study.yaml",), study_text("dtype: 2024-02-30")),
    "!!int zz in a study": Case(CHECK, ("study.yaml",), study_text("dtype: !!int zz")),
    "!!bool zz in a study": Case(CHECK, ("study.yaml",), study_text("dtype: !!bool zz")),
    "!!timestamp zz in a study": Case(CHECK, ("study.yaml",), study_text("dtype: !!timestamp zz")),
    "key twice": Case(CHECK, ("study.yaml", "'base_model'", "twice"), study_text("base_model: a")),
    "method that is a list": Case(
        BUILD, ("recipe.yaml", "merge_method", "[]"), recipe(merge_method=[])
    ),
    "token of no text": Case(
        BUILD,
        ("recipe.yaml", "tokenizer.tokens", "''"),
        recipe(tokenizer={"tokens": {"": {"source": {"kind": "zero"}}}}),
    ),
    "tokens that are a word": Case(
        BUILD,
        ("recipe.yaml: tokenizer", "'tokens'", "mapping"),
        recipe(tokenizer={"source": "union", "tokens": "a"}),
    ),
    "modules that are a word": Case(
        BUILD,
        ("recipe.yaml", "'modules'", "mapping"),
        write("recipe.yaml", "merge_method: linear\nmodules: a\n"),
    ),
    "parameters that are a word": Case(
        BUILD, ("recipe.yaml", "'parameters'", "mapping"), recipe(parameters="a", weight=1)
    ),
    "sampler of no module": Case(
        CHECK, ("study.yaml", "search.sampler", ":"), study(search__sampler=":")
    ),
    "list as a key": Case(CHECK, ("study.yaml",), study_text("? [a]\n: 1")),
    "number as a key": Case(CHECK, ("study.yaml", "1"), study_text("1: 1")),
    # numbers
    "weights whose sum overflows": Case(
        BUILD, ("recipe.yaml", "'weight'", "not a finite number"), recipe(parameters__weight=1e308)
    ),
    "weight of 30 digits": Case(
        BUILD, ("recipe.yaml", "weight"), recipe(parameters__weight=10**400)
    ),
    "10^42 trials": Case(CHECK, ("study.yaml: search.trials",), study(search__trials=10**42)),
    "a billion layer groups": Case(
        CHECK, ("study.yaml: search.layer_groups",), study(search__layer_groups=10**9)
    ),
    "weights that add up to infinity": Case(
        CHECK,
        ("study.yaml: objective.tasks", "weight"),
        study(
            objective__tasks=[
                {"task": "tell", "weight": 1e308},
                {"text": "study.yaml", "weight": 1e308},
            ]
        ),
    ),
    "folder that is a number": Case(
        CHECK, ("study.yaml: objective.include_path", "5"), study(objective__include_path=[5])
    ),
    "start that is a number": Case(
        CHECK, ("study.yaml: search.start", "5"), study(search__start=[5])
    ),
    "part that every name has": Case(
        CHECK, ("study.yaml: search.split", "''"), study(search__split=[""])
    ),
    "floor that is no number": Case(
        CHECK,
        ("study.yaml: objective.constraints",),
        study(objective__constraints={"tell": float("nan")}),
    ),
    "floor that is infinite": Case(
        CHECK,
        ("study.yaml: objective.constraints",),
        study(objective__constraints={"tell": float("inf")}),
    ),
    "range that is no number": Case(
        CHECK, ("study.yaml: search.scale",), study(search__scale=[0, float("nan")])
    ),
    "10^30 items": Case(
        CHECK, ("study.yaml: objective.items",), study(objective__items__test=10**30)
    ),
    "seed of 400 digits": Case(CHECK, ("study.yaml: search.seed",), study(search__seed=10**400)),
    "batches of 10^30": Case(
        CHECK, ("study.yaml: objective.batch_size",), study(objective__batch_size=10**30)
    ),
    "mean tokens that are no number": Case(
        CHECK,
        ("study.yaml: objective.max_mean_tokens",),
        study(objective__max_mean_tokens=float("nan")),
    ),
    "trials of 5000 digits as an option": Case(
        f"{RUN} --trials {'1' * 5000}", ("--trials",), unharmed
    ),
    "layers of 30 digits": Case(
        BUILD,
        ("recipe.yaml", "layer"),
        write(
            "recipe.yaml",
            "merge_method: passthrough\nslices:\n"
            f"- sources: [{{model: a, layer_range: [0, {10**30}]}}]\n",
        ),
    ),
    "padding to 10^30": Case(
        BUILD,
        ("recipe.yaml", "pad_to_multiple_of"),
        recipe(tokenizer={"source": "base", "pad_to_multiple_of": 10**30}),
    ),
}


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: data for path, (_, data) in tree(folder).items()}


@pytest.fixture
def short_limits(monkeypatch):
    for module in ("encoding", "prompts", "task_factory"):
        monkeypatch.setattr(f"objectives.harness.{module}.TEMPLATE_SECONDS", 1.0)
    for name in ("DATASET_SECONDS", "ROW_SECONDS"):
        monkeypatch.setattr(f"objectives.harness.task_factory.{name}", 1.0)


@pytest.mark.usefixtures("short_limits")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_hostile_input_is_one_sentence_or_does_no_harm(case, zoo, tmp_path, monkeypatch, capfd):
    furnish(tmp_path, zoo)
    case.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    code = main(case.command.split())
    said = capfd.readouterr()
    if case.says is None:
        assert (code, said.err) == (0, "")
    else:
        assert shortcoming(case.says, code, said.err) is None
        assert contents(tmp_path) == before
