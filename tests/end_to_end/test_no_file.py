"""Whatever has a file's name and is no file is named by what it is, and never opened."""

import contextlib
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from mistakes import BUILD, CHECK, INIT, Change, furnish, recipe, shortcoming, study, write
from search.cli import main
from tiny_models import pickled_twin

WEIGHTS = "model.safetensors"
ADAPTED = recipe(models=[{"model": "a"}, {"model": "base+lora"}])


def bind(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)  # a longer path is refused


KINDS: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a named pipe": os.mkfifo,
    "a socket": bind,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link that leads to no file": lambda path: path.symlink_to(path.name),
}


class Place(NamedTuple):
    """A file that a command reads; ``make`` furnishes the folder so that it does."""

    file: str
    command: str
    make: Change = lambda _: None


def unweighted(folder: Path) -> None:
    (folder / "b" / WEIGHTS).unlink()


def pickled(folder: Path) -> None:
    pickled_twin(folder / "b", folder / "c")
    shutil.rmtree(folder / "b")
    (folder / "c").rename(folder / "b")


def lora(folder: Path) -> None:
    write("lora/adapter_config.json", '{"peft_type": "LORA"}')(folder)
    ADAPTED(folder)


PLACES = (
    Place("base/config.json", BUILD),
    Place("base/generation_config.json", BUILD),
    Place(f"b/{WEIGHTS}", BUILD),
    Place(f"b/{WEIGHTS}", "score b study.yaml --device cpu"),
    Place(f"b/{WEIGHTS}.index.json", BUILD, unweighted),
    Place("b/pytorch_model.bin", BUILD, pickled),
    Place("b/tokenizer.json", BUILD),
    Place("base/tokenizer_config.json", BUILD),
    Place("base/special_tokens_map.json", CHECK),
    Place("base/added_tokens.json", CHECK),
    Place("base/chat_template.jinja", CHECK),
    Place("lora/adapter_config.json", BUILD, lora),
    Place("lora/adapter_model.safetensors", BUILD, lora),
    Place("recipe.yaml", BUILD),
    Place("study.yaml", CHECK),
    Place("own.jsonl", f"{INIT} own.jsonl"),
    Place("tasks/tell.jsonl", CHECK),
    Place("notes.txt", CHECK, study(objective__tasks=[{"text": "notes.txt"}])),
)
TRIED = [
    (place, kind)
    for place in PLACES
    for kind in KINDS
    if kind in ("a folder", "a named pipe") or place.file == f"b/{WEIGHTS}"
]


@pytest.mark.parametrize(
    ("place", "kind"), TRIED, ids=[f"{place.file} {kind}" for place, kind in TRIED]
)
def test_what_is_no_file_is_named(place, kind, zoo, tmp_path, monkeypatch, capfd):
    furnish(tmp_path, zoo)
    place.make(tmp_path)
    (tmp_path / place.file).unlink(missing_ok=True)
    KINDS[kind](tmp_path / place.file)
    monkeypatch.chdir(tmp_path)
    code = main(place.command.split())
    said = (place.file.rsplit("/", 1)[-1], f"is {kind}, not a file; ")
    assert shortcoming(said, code, capfd.readouterr().err) is None
    assert not (tmp_path / "out").exists()
