"""Mistakes as people make them: exit code 2, one line that says where and what to do, nothing done.

Damaged models are in ``test_bad_input``. ``python tests/test_wrong_inputs.py`` runs each mistake as
a process of its own and prints the slowest.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from search.cli import main
from search.study.template import task_yaml
from tiny_llama import make_llama

RUN = "run study.yaml --out run --device cpu"
CHECK, BUILD = "check study.yaml --device cpu", "build recipe.yaml out --device cpu"
INIT = "init --base base --models a b --out new.yaml --device cpu --tasks"
STUDY: Mapping[str, Any] = {
    "base_model": "base",
    "models": ["a", "b"],
    "search": {"methods": ["task_arithmetic", "ties"], "trials": 2},
    "objective": {
        "include_path": "tasks",
        "tasks": [{"task": "tell"}],
        "items": {"search": 4, "select": 4, "test": 4},
        "block": 4,
    },
}
RECIPE: Mapping[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "a"}, {"model": "b"}],
    "parameters": {"weight": 0.5, "density": 0.5},
    "dtype": "float32",
}


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


def furnish(folder: Path, zoo: Path) -> Path:
    """A folder in which ``RUN`` and ``BUILD`` work."""
    for name in ("base", "a", "b"):
        shutil.copytree(zoo / name, folder / name)
    tasks = folder / "tasks"
    tasks.mkdir()
    rows = [{"question": f"{letter}?", "answer": letter} for letter in "abcdefghijklmnopqrst"]
    (tasks / "tell.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "tell.yaml").write_text(task_yaml("tell", tasks / "tell.jsonl", tasks))
    (folder / "study.yaml").write_text(yaml.safe_dump(dict(STUDY)))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(dict(RECIPE)))
    return folder


# What is done to the folder


def study(**changes: Any) -> Callable[[Path], None]:
    """Other values in the study, by the names of their keys with ``__`` between them."""
    return lambda folder: _rewrite(folder / "study.yaml", changes)


def recipe(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: _rewrite(folder / "recipe.yaml", changes)


def task(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: _rewrite(folder / "tasks" / "tell.yaml", changes)


def _rewrite(file: Path, changes: Mapping[str, Any]) -> None:
    mapping = yaml.safe_load(file.read_text())
    for path, value in changes.items():
        part = mapping
        *parents, last = path.split("__")
        for parent in parents:
            part = part[parent]
        part[last] = value
    file.write_text(yaml.safe_dump(mapping))


def write(name: str, contents: str | bytes) -> Callable[[Path], None]:
    data = contents.encode() if isinstance(contents, str) else contents

    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)

    return make


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def config(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: _rewrite_json(folder / name / "config.json", changes)


def _rewrite_json(file: Path, changes: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def in_the_way(folder: Path) -> None:
    (folder / "file").write_text("mine")


def without_tokenizer(folder: Path) -> None:
    for file in (folder / "base").glob("tokenizer*"):
        file.unlink()


def only_bin(folder: Path) -> None:
    (folder / "b" / "model.safetensors").rename(folder / "b" / "pytorch_model.bin")


def adapter(folder: Path) -> None:
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
        ("study.yaml: search.start", "mine.yaml", "no recipe"),
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
    "folder instead of a file": Mistake("check tasks", ("tasks", "directory", "check the path")),
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
    "adapter without its base": Mistake(RUN, ("study.yaml", "b'", "adapter", "BASE+"), adapter),
    "weights of the old kind": Mistake(RUN, ("study.yaml", "b'", ".bin", "convert it"), only_bin),
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
        RUN, ("study.yaml: objective.tasks", "at least 1"), study(objective__tasks=[])
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


def tree(folder: Path) -> dict[Path, bytes | None]:
    """Every file and folder, and what is in them."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def shortcoming(mistake: Mistake, code: int, said: str) -> str | None:
    """What is wrong with how a mistake was met."""
    place = 0
    for part in mistake.says:
        place = said.find(part, place)
        if place < 0:
            return f"{part!r} is not said in {said!r}"
    if code != 2:
        return f"exit code {code}: {said}"
    if not said.startswith("mergesearch: ") or said.count("\n") != 1:
        return f"not one line: {said}"
    return None


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
    assert shortcoming(mistake, code, said.err) is None
    assert "cost:" not in said.out  # which is said when the base is loaded
    assert tree(tmp_path) == before


def test_study_whose_models_have_nothing_right_is_run_and_it_is_said(
    zoo, tmp_path, monkeypatch, capsys
):
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
        "import sys; from search.cli import program; sys.exit(program())",
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
            wrong = shortcoming(mistake, met.returncode, met.stderr)
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
