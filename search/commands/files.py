"""Commands that start from a study or a recipe.

Only what checks them is imported at the top. optuna, SQLAlchemy and scipy are imported by the
search, transformers and lm-eval by the functions that use them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from merge_engine.building.build_stages import build_stage, is_built, planned
from merge_engine.building.loading_check import why_incomplete
from merge_engine.errors import MergeError
from merge_engine.models.locating import is_local
from merge_engine.recipe.recipe_file import is_recipe
from merge_engine.recipe.stages import Stage as RecipeStage
from merge_engine.recipe.stages import load_stages
from merge_engine.schema import load_documents
from search.options import (
    DEMO,
    BuildOptions,
    CheckOptions,
    DemoOptions,
    InitOptions,
    RunOptions,
    ScoreOptions,
)
from search.preparing.check import check_recipe, check_study
from search.preparing.models import Hardware, load_scored, open_references
from search.preparing.tasks import bind_tasks, plan_tasks
from search.process import collector_paused
from search.racing.item_scores import ItemScores
from search.running.events import CommandDone, Listener, Note, PlanReady, ScoreReady, Stage
from search.session import Session, choose_device, prefix_errors
from search.storing.result import Score
from search.study.reading import load_study
from search.study.spec import StudyError
from search.study.template import all_or_nothing, write_study

if TYPE_CHECKING:
    from search.running.run import Run


def demo(options: DemoOptions, listener: Listener) -> None:
    """Train the demo's models, unless they exist, and run its study."""
    source = importlib.util.spec_from_file_location("zoo", DEMO / "zoo.py")
    if source is None or source.loader is None or not (DEMO / "zoo.py").is_file():
        raise StudyError(f"{DEMO} is missing: the demo runs from a clone of the repository")
    zoo = importlib.util.module_from_spec(source)
    sys.modules["zoo"] = zoo
    source.loader.exec_module(zoo)
    zoo.train_family(DEMO, report=lambda text: listener(Stage(text)))
    run(options, listener)


def run(options: RunOptions, listener: Listener) -> None:
    """Run or resume a study to its end."""
    spec = load_study(options.study)
    changes = {"trials": options.trials, "seed": options.seed}
    wanted = {name: value for name, value in changes.items() if value is not None}
    spec = spec.model_copy(update={"search": spec.search.model_copy(update=wanted)})
    session = Session(spec, options.out, options, listener, source=options.study, searches=True)

    def search_and_conclude(run: Run) -> None:
        from search.pipeline import finish

        finish(run, options.timeout or math.inf)

    session.hold(search_and_conclude)


def build(options: BuildOptions, listener: Listener) -> None:
    """Merge a recipe into a checkpoint, after the recipes whose results it uses."""
    stages, notes = load_stages(options.recipe)
    for note in notes:
        listener(Note(note))
    if options.out.exists():
        raise MergeError(f"{options.out} exists; choose another folder or remove it")
    *others, result = [stage for stage in stages if stage.needed or options.intermediate_dir]
    if others:
        with planned([*others, result]):
            pass  # errors in any recipe are raised before anything is built
    count = _build_stages(others, result, options, listener)
    if fault := why_incomplete(options.out):
        listener(Note(f"{options.out}: transformers will not load it as it is: {fault}"))
    text = f"{options.out}: {count} tensors of {result.recipe.merge_method}"
    listener(CommandDone(text, {"checkpoint": str(options.out), "tensors": count}))


def _build_stages(
    others: Iterable[RecipeStage], result: RecipeStage, options: BuildOptions, listener: Listener
) -> int:
    """Merge a recipe's stage after the others it reads; return its number of tensors."""
    device = torch.device(choose_device(options.device))
    kept = options.intermediate_dir
    folder = kept or options.out.with_name(f"{options.out.name}.stages")
    made: list[Path] = []

    def say(note: str) -> None:
        listener(Note(note))

    try:
        for stage in others:
            out = folder / stage.name
            if is_built(stage, out):
                say(f"{out} is there already")
            else:
                listener(Stage(f"building {stage.name}"))
                build_stage(stage, folder, out, device, say)
            made.append(out)
        return build_stage(result, folder, options.out, device, say)
    finally:
        _remove_results([] if kept else made)


def _remove_results(folders: Iterable[Path]) -> None:
    """Remove intermediate results, and their parent folder if it is empty then."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()


def score(options: ScoreOptions, listener: Listener) -> None:
    """Score a model on a split of a study's items, as the study scores its candidates."""
    spec = load_study(options.study)
    with prefix_errors(options.study):
        tasks = plan_tasks(spec)
        references = open_references(spec)
    hardware = Hardware(choose_device(options.device), offload=options.offload)
    model, tokenizer = load_scored(spec, options.model, hardware, references)
    with prefix_errors(options.study):
        objective, splits = bind_tasks(spec, tasks, model, tokenizer)
    numbers = getattr(splits, options.split)
    items = [objective.items[number] for number in numbers]
    snapshots = objective.snapshots(numbers)
    with prefix_errors(Path(options.model)):
        results = objective.score(model, numbers)
    found = Score.of(ItemScores.of(items, results, objective.tasks), spec.search.seed)
    rows = [
        {
            "task": item.task,
            "item": item.key,
            "answer": result.value,
            "margin": result.margin,
            "fault": result.fault,
            "tokens": result.tokens,
            "encoding": snapshot.encoding,
        }
        for item, snapshot, result in zip(items, snapshots, results, strict=True)
    ]
    listener(ScoreReady(options.model, options.split, found, rows))


def init(options: InitOptions, listener: Listener) -> None:
    """Write a first study, and check it if all its models are on this machine."""
    base = _given([options.base] if options.base else None, "--base", "base model")[0]
    models = _given(options.models, "--models", "models to merge")
    tasks = _given(options.tasks, "--tasks", "tasks or .jsonl files")
    with all_or_nothing() as write:
        notes = write_study(
            options.out,
            [base, *models],
            tasks,
            write,
            trials=options.trials,
            trust_task_code=options.trust_task_code,
        )
        away = [model for model in (base, *models) if not is_local(model)]
        plan, more = ([], []) if away else check_study(options.out, choose_device())
    if away:
        more = [f"not on this machine: {', '.join(away)}; check fetches them and prints the plan"]
    for note in (*notes, *more):
        listener(Note(note))
    following = f"check {options.out}" if away else f"run {options.out} --out runs/mine"
    listener(Stage(f"wrote {options.out}"))
    for line in plan:
        listener(PlanReady(line))
    listener(CommandDone(f"next: mergesearch {following}", {"study": str(options.out)}))


def _given(words: list[str] | None, option: str, what: str) -> list[str]:
    """Return an option's words; ask for missing ones if stdin is a terminal."""
    if not words and sys.stdin.isatty():
        words = shlex.split(input(f"{what}: "))
    if not words:
        raise StudyError(f"init: {option} is missing; give {what}")
    return words


def check(options: CheckOptions, listener: Listener) -> None:
    """Validate a study or a recipe, and print its plan."""
    file, device = options.file, choose_device(options.device)
    recipes = any(map(is_recipe, load_documents(file)))
    with prefix_errors(file), collector_paused():
        plan, notes = check_recipe(file) if recipes else check_study(file, device)
    for note in notes:
        listener(Note(note))
    for line in plan:
        listener(PlanReady(line))
    listener(CommandDone("", {"file": str(file)}))
