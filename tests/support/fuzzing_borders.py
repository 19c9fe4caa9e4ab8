"""The borders where untrusted files and arguments come in, each with a generator of random inputs.

A generator changes the example in the working directory and returns a command line, and whether the
command must be refused.
"""

import contextlib
import json
import shutil
import sqlite3
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import yaml

from fuzzing_changes import STRANGE, add_unknown, change_bytes, change_text, change_tree, misspelt
from fuzzing_recipes import RECIPES, STUDIES
from fuzzing_words import NAMES, PARTS, SYNTAX, VALUES, WORDS
from mistakes import BUILD, CHECK, INIT, RUN

Made = tuple[list[str], bool]
SCORE = "score a study.yaml --device cpu"
SAMPLE = "sample run --prompt x --max-tokens 2 --device cpu"
EXPORT = "export run out --device cpu"
WHOLE = (CHECK, BUILD, SCORE, RUN, SAMPLE, EXPORT, "report run", f"{INIT} own.jsonl")


class Border(NamedTuple):
    """One kind of input; a refusal of it must contain one of ``names``."""

    make: Callable[[Random], Made]
    names: tuple[str, ...]


def _change_json(file: Path, draw: Random) -> None:
    if draw.random() < 0.2:
        file.write_bytes(change_bytes(file.read_bytes(), draw))
    else:
        changed = change_tree(json.loads(file.read_text(encoding="utf-8")), draw)
        file.write_text(json.dumps(changed), encoding="utf-8")


def _write_yaml(file: Path, tree: Any) -> None:
    file.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _changed_yaml(file: str, examples: Sequence[Any], draw: Random) -> bool:
    """Write a changed example; return whether it has an unknown key."""
    example, kind = draw.choice(examples), draw.random()
    if kind < 0.1:
        _write_yaml(Path(file), add_unknown(example, draw))
    elif kind < 0.3:
        text = yaml.safe_dump(example, sort_keys=False)
        Path(file).write_bytes(change_text(text, SYNTAX, draw))
    else:
        _write_yaml(Path(file), change_tree(example, draw))
    return kind < 0.1


def study(draw: Random) -> Made:
    bad = _changed_yaml("study.yaml", STUDIES, draw)
    return draw.choice((CHECK, CHECK, CHECK, SCORE)).split(), bad


def recipe(draw: Random) -> Made:
    bad = _changed_yaml("recipe.yaml", RECIPES, draw)
    return draw.choice((BUILD, BUILD, "check recipe.yaml")).split(), bad


def config(draw: Random) -> Made:
    model = draw.choice(("base", "base", "a"))
    _change_json(Path(model, draw.choice(("config.json",) * 5 + ("generation_config.json",))), draw)
    return draw.choice(
        (BUILD, CHECK, SCORE, f"score {model} study.yaml --device cpu")
    ).split(), False


def tokenizer(draw: Random) -> Made:
    name = draw.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json"))
    _change_json(Path(draw.choice(("base", "a")), name), draw)
    if draw.random() < 0.5:
        _write_yaml(Path("recipe.yaml"), RECIPES[1])  # a union of vocabularies
    return draw.choice((BUILD, CHECK, SCORE)).split(), False


def template(draw: Random) -> Made:
    file = Path("base", "chat_template.jinja")
    if draw.random() < 0.5:
        text = "".join(draw.choices(PARTS, k=draw.randrange(1, 8)))
        file.write_text(text, encoding="utf-8")
    else:
        file.write_bytes(change_text(file.read_text(encoding="utf-8"), PARTS, draw))
    _write_yaml(Path("study.yaml"), STUDIES[1])  # with chat templates
    return draw.choice((CHECK, SCORE)).split(), False


def _change_header(file: Path, draw: Random) -> None:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = raw[8 : 8 + length], raw[8 + length :]
    if draw.random() < 0.3:
        cut = change_bytes(raw[: 8 + length], draw)
        file.write_bytes(cut + (data if draw.random() < 0.8 else data[: draw.randrange(len(data))]))
        return
    text = json.dumps(change_tree(json.loads(header), draw)).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def weights(draw: Random) -> Made:
    _change_header(Path("b", "model.safetensors"), draw)
    return draw.choice((BUILD, BUILD, CHECK, "score b study.yaml --device cpu")).split(), False


def index(draw: Random) -> Made:
    _change_json(Path("shards", "model.safetensors.index.json"), draw)
    _write_yaml(Path("recipe.yaml"), RECIPES[0] | {"models": [{"model": "shards"}]})
    return draw.choice((BUILD, "score shards study.yaml --device cpu")).split(), False


def pickle(draw: Random) -> Made:
    file = Path("pickled", "pytorch_model.bin")
    file.write_bytes(change_bytes(file.read_bytes(), draw))
    _write_yaml(Path("recipe.yaml"), RECIPES[0] | {"models": [{"model": "pickled"}]})
    return draw.choice((BUILD, "score pickled study.yaml --device cpu")).split(), False


def adapter(draw: Random) -> Made:
    if draw.random() < 0.7:
        _change_json(Path("lora", "adapter_config.json"), draw)
    else:
        _change_header(Path("lora", "adapter_model.safetensors"), draw)
    _write_yaml(Path("recipe.yaml"), RECIPES[0] | {"models": [{"model": "base+lora"}]})
    return BUILD.split(), False


def task(draw: Random) -> Made:
    name = draw.choice(("tell", "pick"))
    file = Path("tasks", f"{name}.yaml")
    _changed_yaml(str(file), [yaml.safe_load(file.read_text(encoding="utf-8"))], draw)
    _write_yaml(Path("study.yaml"), STUDIES[2])  # with both tasks
    return draw.choice((CHECK, SCORE)).split(), False


def rows(draw: Random) -> Made:
    file = Path(draw.choice(("tasks/tell.jsonl", "tasks/pick.jsonl", "own.jsonl")))
    lines = file.read_text(encoding="utf-8").splitlines()
    if draw.random() < 0.3:
        file.write_bytes(change_text("\n".join(lines), SYNTAX, draw))
    else:
        at = draw.randrange(len(lines))
        lines[at] = json.dumps(change_tree(json.loads(lines[at]), draw))
        file.write_text("\n".join(lines), encoding="utf-8")
    _write_yaml(Path("study.yaml"), STUDIES[2])
    return (f"{INIT} own.jsonl" if file.name == "own.jsonl" else CHECK).split(), False


def text(draw: Random) -> Made:
    file = Path("notes.txt")
    file.write_bytes(change_text(file.read_text(encoding="utf-8"), SYNTAX, draw))
    _write_yaml(Path("study.yaml"), STUDIES[3])  # of text
    return draw.choice((CHECK, SCORE)).split(), False


def prompts(draw: Random) -> Made:
    words = ["sample", "run", "--device", "cpu", "--max-tokens", "2"]
    for _ in range(draw.randrange(1, 4)):
        words += [
            "--prompt",
            str(draw.choice((*SYNTAX, *PARTS, *NAMES, *map(str, STRANGE))))[:9000],
        ]
    return words, False


def card(draw: Random) -> Made:
    file = Path(draw.choice(("a", "base")), "README.md")
    _, front, body = file.read_text(encoding="utf-8").split("---\n")
    if draw.random() < 0.3:
        file.write_bytes(change_text(f"---\n{front}---\n{body}", SYNTAX, draw))
    else:
        changed = yaml.safe_dump(change_tree(yaml.safe_load(front), draw), allow_unicode=True)
        file.write_text(f"---\n{changed}---\n{body}", encoding="utf-8")
    return EXPORT.split(), False


def _change_database(file: Path, draw: Random) -> None:
    """Change one value in a random table."""
    with sqlite3.connect(file) as database:
        tables = [
            name
            for (name,) in database.execute("select name from sqlite_master where type = 'table'")
            if database.execute(f"select count(*) from {name}").fetchone()[0]
        ]
        table = draw.choice(tables)
        if draw.random() < 0.1:
            database.execute(draw.choice((f"drop table {table}", f"delete from {table}")))
            return
        column = draw.choice([row[1] for row in database.execute(f"pragma table_info({table})")])
        ids = database.execute(f"select rowid, {column} from {table}").fetchall()
        row, old = draw.choice(ids)
        changes: tuple[Any, ...] = (None, 0, -1, 10**6, "x", "", "null", "[]", "{}", b"\xff", 1e308)
        if isinstance(old, str):
            changes += (misspelt(old, draw), old[: len(old) // 2], old * 2)
            with contextlib.suppress(ValueError):
                changes += tuple(json.dumps(change_tree(json.loads(old), draw)) for _ in range(9))
        try:
            database.execute(
                f"update {table} set {column} = ? where rowid = ?", (draw.choice(changes), row)
            )
        except sqlite3.Error:  # the table itself refuses it
            database.execute(f"delete from {table} where rowid = ?", (row,))
    database.close()


def stored(draw: Random) -> Made:
    run = Path("run")
    match draw.randrange(6):
        case 0 | 1:
            _change_database(run / "study.db", draw)
        case 2:
            (run / "study.db").write_bytes(change_bytes((run / "study.db").read_bytes(), draw))
        case 3:
            for file in draw.sample(sorted(run.iterdir()), 1):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        case _:
            _change_json(run / draw.choice(("result.json", "paths.json", "samples.json")), draw)
    commands = ("report run", "report run", SAMPLE, EXPORT, f"{EXPORT} --trial 1", RUN)
    return draw.choice(commands).split(), False


def arguments(draw: Random) -> Made:
    words = draw.choice(WHOLE).split()
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(1, len(words) + 1)
        match draw.randrange(4):
            case 0 if at < len(words):
                del words[at]
            case 1 if at < len(words):
                words[at] = draw.choice((misspelt(words[at], draw), *WORDS))
            case _:
                words[at:at] = draw.choices(WORDS, k=draw.randrange(1, 3))
    if draw.random() < 0.1:
        words[0] = draw.choice((misspelt(words[0], draw), "", "--help", "--version", "-x"))
    return words, False


def names(draw: Random) -> Made:
    name = draw.choice(NAMES)
    if draw.random() < 0.3:
        name = misspelt(name, draw)
    match draw.randrange(5):
        case 0:
            return ["score", "--device", "cpu", "--", name, "study.yaml"], False
        case 1:
            return ["init", f"--base={name}", "--models", "a", "--tasks", "tell"], False
        case 2:
            _write_yaml(Path("study.yaml"), STUDIES[0] | {"models": ["a", name]})
            return CHECK.split(), False
        case 3:
            _write_yaml(Path("study.yaml"), STUDIES[0] | {"base_model": name})
            return CHECK.split(), False
        case _:
            models = [{"model": name}, {"model": "a"}]
            _write_yaml(Path("recipe.yaml"), RECIPES[0] | {"models": models})
            return BUILD.split(), False


def own_class(draw: Random) -> Made:
    file = Path("own_class.py")
    lines = file.read_text(encoding="utf-8").splitlines()
    places = [n for n, line in enumerate(lines) if "return " in line or " = " in line]
    for at in draw.sample(places, draw.choice((1, 1, 2))):
        head, mark, _ = lines[at].partition("return " if "return " in lines[at] else "= ")
        lines[at] = f"{head}{mark}{draw.choice(VALUES)}"
    file.write_text("\n".join(lines), encoding="utf-8")
    _write_yaml(Path("study.yaml"), STUDIES[4])  # of the class
    return draw.choice(
        (SCORE, SCORE, SCORE, "run study.yaml --out new --device cpu")
    ).split(), False


BORDERS: Mapping[str, Border] = {
    "study": Border(study, ("study.yaml", "no adapter")),
    "recipe": Border(recipe, ("recipe.yaml",)),
    "config": Border(config, ("base", "a/", "config.json", "a'")),
    "tokenizer": Border(tokenizer, ("base", "a/", "'a'", "tokenizer")),
    "template": Border(template, ("base", "template")),
    "weights": Border(weights, ("b/", "b'", "model.safetensors")),
    "index": Border(index, ("shards",)),
    "pickle": Border(pickle, ("pickled",)),
    "adapter": Border(adapter, ("lora",)),
    "task": Border(task, ("tell", "pick")),
    "rows": Border(rows, ("tell", "pick", "own")),
    "text": Border(text, ("notes",)),
    "prompts": Border(prompts, ("prompt", "run")),
    "card": Border(card, ("README.md",)),
    "stored": Border(stored, ("run",)),
    "arguments": Border(arguments, ("",)),
    "names": Border(names, ("",)),
    "own_class": Border(own_class, ("own_class",)),
}
