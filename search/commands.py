"""The commands, one function each, by their names on the command line.

transformers and lm-eval are imported later, by the modules that use them: they take seconds, and
what is wrong with the input is said before.
"""

from __future__ import annotations

import importlib.util
import math
import shlex
import sys
from functools import partial
from pathlib import Path

import torch

from merge_engine.building.builder import built_tensors
from merge_engine.building.export import write_checkpoint
from merge_engine.building.plan import plan_merge
from merge_engine.errors import MergeError
from merge_engine.models.checkpoint import is_local
from merge_engine.numerics.kernel_runner import configure_compiler
from merge_engine.recipe.recipe import Recipe
from merge_engine.recipe.recipe_file import load_recipe
from merge_engine.schema import load_yaml
from objectives.entries import PromptEntry
from search.arguments import DEMO
from search.options import (
    BuildOptions,
    CheckOptions,
    ExportOptions,
    InitOptions,
    PushOptions,
    ReportOptions,
    RunOptions,
    SampleOptions,
    ScoreOptions,
)
from search.preparing.check import check_recipe, check_study
from search.preparing.models import load_scored, load_study_tokenizer
from search.preparing.tasks import bind_tasks, plan_tasks
from search.racing.item_scores import ItemScores
from search.running.conclusion import other_trial, score_of
from search.running.events import (
    CommandDone,
    Listener,
    Note,
    PlanReady,
    SamplesReady,
    ScoreReady,
    Stage,
)
from search.running.run import Run
from search.running.sampling import of_items, of_prompts
from search.session import (
    Session,
    choose_device,
    errors_name,
    finish,
    is_export_of,
    save_checkpoint,
)
from search.showing.card import model_card
from search.showing.hub import push as push_to_hub
from search.showing.report import make_report
from search.storing.address import Storage
from search.storing.folder import CARD, check_folder, is_held, replace_text
from search.storing.result import read_result
from search.storing.resume import find_trial, stored_spec
from search.storing.samples import store_samples
from search.storing.store import Store
from search.storing.trials import TrialLog
from search.study.reading import load_study
from search.study.spec import StudyError
from search.study.template import all_or_nothing, write_study


def demo(options: RunOptions, listener: Listener) -> None:
    """Train the demo's models, if that has not been done, and run its study."""
    source = importlib.util.spec_from_file_location("zoo", DEMO / "zoo.py")
    if source is None or source.loader is None or not (DEMO / "zoo.py").is_file():
        raise StudyError(f"{DEMO} is missing: the demo runs from a clone of the repository")
    zoo = importlib.util.module_from_spec(source)
    sys.modules["zoo"] = zoo
    source.loader.exec_module(zoo)
    zoo.train_family(DEMO, report=lambda text: listener(Stage(text)))
    run(options, listener)


def run(options: RunOptions, listener: Listener) -> None:
    """Run a study, or resume it, to its end."""
    spec = load_study(options.study)
    changes = {"trials": options.trials, "seed": options.seed}
    wanted = {name: value for name, value in changes.items() if value is not None}
    search = spec.search.model_copy(update=wanted)
    spec = spec.model_copy(update={"search": search})
    session = Session(spec, options.out, options, listener, source=options.study, searches=True)
    session.hold(partial(finish, timeout=options.timeout or math.inf))


def build(options: BuildOptions, listener: Listener) -> None:
    """Merge a recipe into a checkpoint."""
    recipe, notes = load_recipe(options.recipe)
    for note in notes:
        listener(Note(note))
    with errors_name(options.recipe):
        plan = plan_merge(recipe)
    if any(part.model_set.runner.compiled for part in plan.parts):
        configure_compiler()
    tensors = built_tensors(plan, torch.device(choose_device(options.device)))
    write_checkpoint(tensors, options.out, shapes=plan.shapes(), files=plan.files)
    text = f"{options.out}: {len(plan.names)} tensors of {recipe.merge_method}"
    listener(CommandDone(text, {"checkpoint": str(options.out), "tensors": len(plan.names)}))


def score(options: ScoreOptions, listener: Listener) -> None:
    """Score a model on a split of a study's items, as the study scores its candidates."""
    spec = load_study(options.study)
    with errors_name(options.study):
        tasks = plan_tasks(spec)
    model, base = load_scored(spec, options.model, choose_device(options.device))
    with errors_name(options.study):
        tokenizer = load_study_tokenizer(spec, base)
        objective, splits = bind_tasks(spec, tasks, model, tokenizer)
    numbers = getattr(splits, options.split)
    items = [objective.items[number] for number in numbers]
    snapshots = objective.snapshots(numbers)
    answers = objective.score(model, numbers)
    found = score_of(ItemScores.of(items, answers, objective.tasks), spec.search.seed)
    rows = [
        {
            "task": item.task,
            "item": item.key,
            "answer": answer.value,
            "margin": answer.margin,
            "fault": answer.fault,
            "tokens": answer.tokens,
            "encoding": snapshot.encoding,
        }
        for item, snapshot, answer in zip(items, snapshots, answers, strict=True)
    ]
    listener(ScoreReady(options.model, options.split, found, rows))


def init(options: InitOptions, listener: Listener) -> None:
    """Write a study to begin with, and check it where its models are on this machine."""
    base = _given([options.base] if options.base else None, "--base", "base model")[0]
    models = _given(options.models, "--models", "models to merge")
    tasks = _given(options.tasks, "--tasks", "tasks or .jsonl files")
    with all_or_nothing() as write:
        notes = write_study(options.out, base, models, tasks, options.trials, write)
        away = [model for model in (base, *models) if not is_local(model)]
        plan, more = ([], []) if away else check_study(options.out, choose_device(options.device))
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
    """Return an option's words; where it is missing, ask for them if a person can answer."""
    if not words and sys.stdin.isatty():
        words = shlex.split(input(f"{what}: "))
    if not words:
        raise StudyError(f"init: {option} is missing; give {what}")
    return words


def check(options: CheckOptions, listener: Listener) -> None:
    """Validate a study or a recipe, and print what using it would take."""
    file, device = options.file, choose_device(options.device)
    is_recipe = "merge_method" in load_yaml(file)
    with errors_name(file):
        plan, notes = check_recipe(file) if is_recipe else check_study(file, device)
    for note in notes:
        listener(Note(note))
    for line in plan:
        listener(PlanReady(line))
    listener(CommandDone("", {"file": str(file)}))


def export(options: ExportOptions, listener: Listener) -> None:
    """Save the checkpoint of a run's winner, or of another of its trials."""
    if options.out.exists():
        raise MergeError(f"{options.out} exists; choose another folder or remove it")
    check_folder(options.out)
    spec, result = stored_spec(options.run, options.storage), read_result(options.run)
    won = result.winner.recipe if result else None
    if options.trial is not None:  # one that is missing is said before anything is loaded
        store = Store(Storage.of(options.run, options.storage))
        find_trial(options.run, TrialLog(store.study()), options.trial)
    elif won is None:
        raise StudyError(f"{options.run} has no winner yet; name a --trial")

    def save(run: Run) -> None:
        other = None
        if options.trial is None:
            recipe = Recipe.model_validate(won)
        else:
            recipe = run.find_recipe(options.trial)
            other = other_trial(run, options.trial, recipe, result)
        card = model_card(options.out.name, run.spec, recipe, result, other)
        save_checkpoint(run, recipe, options.out, card)
        listener(CommandDone("", {"checkpoint": str(options.out)}))

    Session(spec, options.run, options, listener, source=options.run).hold(save)


def sample(options: SampleOptions, listener: Listener) -> None:
    """Show what base, donors and winner write to prompts, or to test items gained and lost."""
    spec, result = stored_spec(options.run, options.storage), read_result(options.run)
    if result is None:
        raise StudyError(f"{options.run} has no winner yet; ask again when the run has finished")

    def respond(run: Run) -> None:
        if options.prompt:
            prompts = PromptEntry(prompts=tuple(options.prompt), max_tokens=options.max_tokens)
            samples = of_prompts(run, result, prompts)
        else:
            samples = of_items(run, result, options.items)
        if not samples:
            raise StudyError(
                "the winner and the best donor answer all test items alike, or in no words; "
                "give a --prompt"
            )
        store_samples(run.folder, result, samples)
        listener(SamplesReady(samples))

    Session(spec, options.run, options, listener, source=options.run).hold(respond)


def push(options: PushOptions, listener: Listener) -> None:
    """Upload the checkpoint of a run's winner to the Hub."""
    run, result = options.run, read_result(options.run)
    if result is None:
        raise StudyError(f"{run} has no result yet; push it when the run has finished")
    recipe, checkpoint = Recipe.model_validate(result.winner.recipe), run / "checkpoint"
    if not is_export_of(checkpoint, recipe) or not (checkpoint / CARD).is_file():
        raise StudyError(f"{checkpoint} is not what result.json speaks of; finish the run again")
    if folders := [model for model in recipe.models_read if Path(model).is_absolute()]:
        listener(Note(f"the recipe names folders of this machine: {', '.join(folders)}"))
    url = push_to_hub(checkpoint, run / "recipe.yaml", options.repo, private=options.private)
    listener(CommandDone(url, {"url": url}))


def report(options: ReportOptions, listener: Listener) -> None:
    """Write a run's page, finished or not."""
    stored_spec(options.run, options.storage)
    file = options.out or options.run / "report.html"
    if file.is_dir():
        raise StudyError(f"{file} is a folder; name the file to write in it")
    check_folder(file.parent)
    store = Store(Storage.of(options.run, options.storage))
    page = make_report(options.run, store, held=is_held(options.run))
    replace_text(file, page)
    listener(CommandDone(str(file), {"report": str(file)}))
