"""The commands. What is heavy to import is imported by the command that needs it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from search.arguments import make_parser

if TYPE_CHECKING:
    from rich.console import Console

    from merge_engine.recipe import Recipe
    from search.bench import Bench
    from search.runner import Run
    from search.spec import StudySpec
    from search.workers import Workers

DEMO = Path(__file__).parent.parent / "studies" / "demo"
STOPPED, BAD_INPUT, INTERRUPTED = 1, 2, 130
DRAW_EVERY, DRAW_SHARE = 30.0, 0.05  # seconds, and of the time of a run, to draw its page
AGAIN = "the same command goes on from here"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done (also when the verdict is "not better"), 1 stopped by the machine (a full disk, a
        database that is gone), 2 bad input, 130 interrupted.
    """
    options = make_parser().parse_args(argv)
    _quiet_libraries()
    from merge_engine import cache
    from merge_engine.recipe import RecipeError
    from objectives.base import ObjectiveError, printable
    from search.spec import StudyError
    from search.storage import Stopped

    try:
        cache.own_limit()  # a wrong one is said now, and not by the first of many candidates
        COMMANDS[options.command](options)
    except (RecipeError, ObjectiveError, StudyError) as error:
        # it may quote a file's or a model's own words
        print(f"mergesearch: {printable(str(error))}", file=sys.stderr)
        return BAD_INPUT
    except Stopped as stopped:
        print(f"mergesearch: {stopped}; when that is mended, {AGAIN}", file=sys.stderr)
        return STOPPED
    except OSError as error:
        from merge_engine.checkpoint import FULL

        if error.errno not in FULL:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"mergesearch: {where}{error.strerror}; when there is room, {AGAIN}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print(f"\nmergesearch: stopped; {AGAIN}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _quiet_libraries() -> None:
    """Before torch and its kin are imported: no spinning threads, no bars but ours."""
    quiet = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")


def _console() -> Console:
    from rich.console import Console

    return Console(soft_wrap=not sys.stdout.isatty())


def _device(options: Any) -> str:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _demo(options: Any) -> None:
    source = importlib.util.spec_from_file_location("zoo", DEMO / "zoo.py")
    if source is None or source.loader is None or not (DEMO / "zoo.py").is_file():
        from search.spec import StudyError

        raise StudyError(f"{DEMO} is missing: the demo runs from a clone of the repository")
    zoo = importlib.util.module_from_spec(source)
    sys.modules["zoo"] = zoo
    source.loader.exec_module(zoo)
    zoo.train_family(DEMO)
    options.study = DEMO / "study.yaml"
    _run(options)


def _run(options: Any) -> None:
    from search.spec import load_study

    spec = load_study(options.study)
    changes = {"trials": options.trials, "seed": options.seed}
    wanted = {name: value for name, value in changes.items() if value is not None}
    search = spec.search.model_copy(update=wanted)
    spec = spec.model_copy(update={"search": search})
    _session(spec, options.out, options, partial(_finish, timeout=options.timeout or math.inf))


def _session(
    spec: StudySpec,
    folder: Path,
    options: Any,
    work: Callable[[Run, Console], None],
) -> None:
    """Do ``work`` with a run, holding its folder."""
    from search.runner import Run, locked, set_aside
    from search.storage import Storage, Store
    from search.terminal import Progress, print_notes

    console = _console()
    new = getattr(options, "force_new", False)
    Storage.of(folder, options.storage, new=new).check()
    # It checks everything, and nothing is written before.
    bench, workers = _crew(spec, options, lambda line: console.print(line, highlight=False))
    try:
        if not folder.exists():  # no folder is made for donors that no recipe could be built of
            workers.look_through()
        with locked(folder):
            if new:
                set_aside(folder)
            storage = Storage.of(folder, options.storage)
            store = Store(storage, lambda text: print_notes(console, [text]))
            storage.remember(folder)
            store.persist(
                lambda: _attempt(Run(folder, bench, workers, Progress(console), store), work)
            )
    finally:
        workers.close()


def _attempt(run: Run, work: Callable[[Run, Console], None]) -> None:
    from search.storage import DATABASE_ERRORS

    try:
        run.adopt()
        with _stopping(run):
            work(run, run.progress.console)
    except DATABASE_ERRORS:
        run.scorer.abandon()
        raise
    finally:
        run.progress.stop()


def _crew(spec: StudySpec, options: Any, say: Callable[[str], None]) -> tuple[Bench, Workers]:
    """The coordinator's bench, and who works for it: this process, or as many as were asked for."""
    from search.bench import Machine, make_bench, open_family, outline
    from search.cost import estimate
    from search.workers import Here

    machine = Machine(_device(options), options.memory, not options.no_compile)
    if options.workers is None:
        bench = make_bench(spec, machine, say)
        say(str(estimate(bench, bench.builder.family, machine)))
        return bench, Here(bench)
    from search.cluster import RayWorkers, import_ray

    import_ray()  # before anything is prepared
    family = open_family(spec)
    outlined = outline(spec, family)
    say(str(estimate(outlined, family, machine, options.workers)))
    gpus, address = options.gpus_per_worker, options.ray_address
    return outlined, RayWorkers(
        spec, machine, count=options.workers, gpus=gpus, address=address, say=say
    )


@contextmanager
def _stopping(run: Run) -> Iterator[None]:
    """Have Ctrl-C end the work with the blocks that are asked now, and a second one at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        if not run.scorer.working:
            signal.default_int_handler(number, frame)
        run.scorer.stopping = True
        os.write(2, b"\nmergesearch: stopping after this block; Ctrl-C again stops now\n")

    if threading.current_thread() is not threading.main_thread():  # it gets no signals
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _finish(run: Run, console: Console, timeout: float) -> None:
    """Search, choose, export, report: each step finds what an earlier session has done."""
    from search.card import model_card
    from search.conclusion import conclude
    from search.terminal import print_result

    run.progress.after_trial = _now_and_then(partial(_draw, run))
    run.search(timeout)
    result, recipe = conclude(run)
    _replace_text(run.folder / "recipe.yaml", recipe.to_yaml())
    checkpoint = run.folder / "checkpoint"
    if not _holds(checkpoint, recipe):
        shutil.rmtree(checkpoint, ignore_errors=True)
        _save(run, recipe, checkpoint, console)
    _write_card(checkpoint, model_card(run.folder.name, run.spec, recipe, result))
    _replace_text(run.folder / "result.json", result.model_dump_json(indent=2) + "\n")
    _draw(run)
    print_result(console, result, run.folder)


def _now_and_then(work: Callable[[], None]) -> Callable[[], None]:
    """The same work, left out if it was done a short time ago."""
    due = time.monotonic() + DRAW_EVERY

    def do() -> None:
        nonlocal due
        if (start := time.monotonic()) >= due:
            work()
            end = time.monotonic()
            due = end + max(DRAW_EVERY, (end - start) / DRAW_SHARE)

    return do


def _draw(run: Run) -> None:
    """Write the run's page. That it cannot be drawn is no reason to stop a run."""
    from search.report import make_report

    try:
        page = make_report(run.folder, run.store, run.study)
        _replace_text(run.folder / "report.html", page)
    except Exception as error:  # whatever it is
        run.progress.note(f"there is no report.html: {error}")


def _holds(checkpoint: Path, recipe: Recipe) -> bool:
    from merge_engine.recipe import load_recipe

    file = checkpoint / "mergekit_config.yml"
    return file.is_file() and load_recipe(file)[0].key == recipe.key


def _save(run: Run, recipe: Recipe, out: Path, console: Console) -> None:
    from search.runner import export

    console.print(f"saving {out}")
    compared = export(run, recipe, out)
    console.print(f"rebuilt: all {compared} answers are those in the database", highlight=False)


def _write_card(checkpoint: Path, text: str) -> None:
    from search.card import CARD

    if checkpoint.is_dir():  # not where a worker on another machine has written it
        _replace_text(checkpoint / CARD, text)


def _replace_text(file: Path, text: str) -> None:
    """Write a file so that it is the old one or the new one, never half of it."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def _build(options: Any) -> None:
    import torch

    from merge_engine.builder import built_tensors
    from merge_engine.checkpoint import Model, write_checkpoint
    from merge_engine.plan import plan_merge
    from merge_engine.recipe import load_recipe
    from search.terminal import print_notes

    recipe, notes = load_recipe(options.recipe)
    console = _console()
    print_notes(console, notes)
    plan = plan_merge(recipe)
    tensors = built_tensors(plan, torch.device(_device(options)))
    write_checkpoint(tensors, options.out, shapes=plan.shapes(), model=Model.of(plan))
    console.print(f"{options.out}: {len(plan.names)} tensors of {recipe.merge_method}")


def _score(options: Any) -> None:
    from search.bench import load_live, make_objective, make_splits
    from search.conclusion import score_of
    from search.selection import Sheet
    from search.spec import load_study
    from search.terminal import print_score

    spec = load_study(options.study)
    model, base = load_live(spec, options.model, _device(options))
    objective = make_objective(spec, model, base)
    numbers = getattr(make_splits(spec, objective), options.split)
    items = [objective.items[number] for number in numbers]
    shown = objective.shown(numbers)
    answers = objective.score(model, numbers)
    score = score_of(Sheet.of(items, answers, objective.tasks), spec.search.seed)
    if options.json:
        rows = [
            {
                "task": item.task,
                "item": item.key,
                "answer": answer.value,
                "margin": answer.margin,
                "fault": answer.fault,
                "tokens": answer.tokens,
                "encoding": each.encoding,
            }
            for item, each, answer in zip(items, shown, answers, strict=True)
        ]
        print(json.dumps(score.model_dump() | {"split": options.split, "items": rows}))
    else:
        print_score(_console(), options.model, options.split, score, len(items))


def _init(options: Any) -> None:
    from merge_engine.donors import is_here
    from search.init import all_or_nothing, write_study
    from search.plan import check_study
    from search.terminal import print_notes

    base = _given([options.base] if options.base else None, "--base", "base model")[0]
    models = _given(options.models, "--models", "models to merge")
    tasks = _given(options.tasks, "--tasks", "tasks or .jsonl files")
    console = _console()
    with all_or_nothing() as write:
        notes = write_study(options.out, base, models, tasks, options.trials, write)
        away = [model for model in (base, *models) if not is_here(model)]
        plan, more = ([], []) if away else check_study(options.out, _device(options))
    if away:
        more = [f"not on this machine: {', '.join(away)}; check fetches them and prints the plan"]
    print_notes(console, [*notes, *more])
    following = f"check {options.out}" if away else f"run {options.out} --out runs/mine"
    for line in (f"wrote {options.out}", *plan, f"next: mergesearch {following}"):
        console.print(line, highlight=False, markup=False)


def _given(words: list[str] | None, option: str, what: str) -> list[str]:
    """An option's words; where it is missing they are asked for, if somebody is there."""
    from search.spec import StudyError

    if not words and sys.stdin.isatty():
        words = shlex.split(input(f"{what}: "))
    if not words:
        raise StudyError(f"init: {option} is missing; give {what}")
    return words


def _check(options: Any) -> None:
    from merge_engine.recipe import load_yaml
    from search.plan import check_recipe, check_study
    from search.terminal import print_notes

    check = check_recipe if "merge_method" in load_yaml(options.file) else check_study
    plan, notes = check(options.file, _device(options))
    console = _console()
    print_notes(console, notes)
    for line in plan:
        console.print(line, highlight=False, markup=False)


def _export(options: Any) -> None:
    from merge_engine.recipe import Recipe, RecipeError
    from search.card import model_card
    from search.conclusion import other_trial
    from search.result import read_result
    from search.runner import stored_spec
    from search.spec import StudyError

    if options.out.exists():
        raise RecipeError(f"{options.out} exists; choose another folder or remove it")

    def save(run: Run, console: Console) -> None:
        result, other = read_result(run.folder), None
        if options.trial is not None:
            recipe = run.recipe_of(options.trial)
            other = other_trial(run, options.trial, recipe, result)
        elif result is None:
            raise StudyError(f"{run.folder} has no winner yet; name a --trial")
        else:
            recipe = Recipe.model_validate(result.winner.recipe)
        _save(run, recipe, options.out, console)
        _write_card(options.out, model_card(options.out.name, run.spec, recipe, result, other))

    _session(stored_spec(options.run, options.storage), options.run, options, save)


def _push(options: Any) -> None:
    from merge_engine.recipe import Recipe
    from search.card import CARD, push
    from search.result import read_result
    from search.spec import StudyError
    from search.terminal import print_notes

    run, result = options.run, read_result(options.run)
    if result is None:
        raise StudyError(f"{run} has no result yet; push it when the run has finished")
    recipe, checkpoint = Recipe.model_validate(result.winner.recipe), run / "checkpoint"
    if not _holds(checkpoint, recipe) or not (checkpoint / CARD).is_file():
        raise StudyError(f"{checkpoint} is not what result.json speaks of; finish the run again")
    console = _console()
    if folders := [model for model in recipe.models_read if Path(model).is_absolute()]:
        print_notes(console, [f"the recipe names folders of this machine: {', '.join(folders)}"])
    url = push(checkpoint, run / "recipe.yaml", options.repo, private=options.private)
    console.print(url, highlight=False, markup=False)


def _report(options: Any) -> None:
    from search.report import make_report
    from search.runner import stored_spec
    from search.storage import Storage, Store

    stored_spec(options.run, options.storage)
    store = Store(Storage.of(options.run, options.storage))
    page = make_report(options.run, store, store.study())
    file = options.out or options.run / "report.html"
    _replace_text(file, page)
    _console().print(str(file), highlight=False, markup=False)


COMMANDS: Mapping[str, Callable[[Any], None]] = {
    "demo": _demo,
    "run": _run,
    "build": _build,
    "score": _score,
    "init": _init,
    "check": _check,
    "export": _export,
    "report": _report,
    "push": _push,
}

if __name__ == "__main__":
    sys.exit(main())
