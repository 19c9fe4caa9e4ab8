"""The commands. What is heavy to import is imported by the command that needs it."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from search.arguments import UsageError, make_parser
from search.quiet import quiet

if TYPE_CHECKING:
    from merge_engine.recipe import Recipe
    from search.bench import Bench
    from search.output import Output
    from search.responses import Sample
    from search.result import Result
    from search.runner import Run
    from search.spec import StudySpec
    from search.workers import Workers

DEMO = Path(__file__).parent.parent / "studies" / "demo"
STOPPED, BAD_INPUT, INTERRUPTED = 1, 2, 130
DRAW_EVERY, BELIEVE_EVERY = 30.0, 1.0  # seconds, to draw a run's page and to say what is believed
DRAW_SHARE = 0.05  # of its time, for each of them
GARBAGE = 100_000  # objects more than before, at which some is looked for; Python's own is 700
AGAIN = "the same command goes on from here"


def program() -> int:
    """``main``, for a process that ends with it.

    What is imported is no garbage, and looking for some in it would take a third of the time that
    the imports take: it is looked for more rarely, and not when the process ends.
    """
    gc.set_threshold(GARBAGE)
    code = main()
    gc.freeze()
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done (also when the verdict is "not better"), 1 stopped by the machine (a full disk, a
        database that is gone), 2 bad input, 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        _do(make_parser().parse_args(argv))
    except UsageError as error:
        message, code = str(error), BAD_INPUT
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the terminal shows the keys
        message, code = f"stopped; {AGAIN}", INTERRUPTED
    except Exception as error:
        if not (known := _known(error)):
            raise
        message, code = known
    else:
        return 0
    print(f"mergesearch: {message}", file=sys.stderr)
    if "--json" in argv:
        print(json.dumps({"event": "error", "message": message, "exit": code}))
    return code


def _do(options: Any) -> None:
    """Run a command, its libraries kept quiet from before they are imported."""
    with quiet(lambda text: output.note(text), verbose=options.verbose):
        output = _output(options)
        from merge_engine import cache

        cache.own_limit()  # a wrong one is said now, and not by the first of many candidates
        # What tasks print on their own account is no event.
        with redirect_stdout(sys.stderr) if options.json else nullcontext():
            COMMANDS[options.command](options, output)


def _output(options: Any) -> Output:
    if options.json:
        from search.output import JsonLines

        return JsonLines(sys.stdout)
    from rich.console import Console

    from search.terminal import Terminal

    piped = not sys.stdout.isatty()  # then no line is broken, and nothing moves
    return Terminal(Console(soft_wrap=piped, force_interactive=False if piped else None))


def _known(error: Exception) -> tuple[str, int] | None:
    """What to say of an error that is no fault of this program, and the exit code."""
    from merge_engine.checkpoint import FULL
    from merge_engine.recipe import RecipeError
    from objectives.base import ObjectiveError, printable
    from search.spec import StudyError

    if isinstance(error, RecipeError | ObjectiveError | StudyError):
        return printable(str(error)), BAD_INPUT  # it may quote a file's or a model's own words
    from search.storage import Stopped

    if isinstance(error, Stopped):
        return f"{error}; when that is mended, {AGAIN}", STOPPED
    if isinstance(error, OSError) and error.errno in FULL:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; when there is room, {AGAIN}", STOPPED
    return None


@contextmanager
def _about(file: Path) -> Iterator[None]:
    """Begin what is wrong with what a study or a recipe says with its name, wherever it shows."""
    from merge_engine.recipe import RecipeError
    from objectives.base import ObjectiveError
    from search.spec import StudyError

    try:
        yield
    except (RecipeError, ObjectiveError, StudyError) as error:
        if str(file) in str(error):
            raise
        raise type(error)(f"{file}: {error}") from error


def _device(options: Any) -> str:
    import torch

    from search.spec import StudyError

    if not options.verbose and "transformers" in sys.modules:  # imported before it was told
        from transformers.utils import logging

        logging.disable_progress_bar()
    device: str = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if getattr(options, "workers", None) is None:  # theirs may be on other machines
        try:
            torch.empty(0, device="cuda" if device == "auto" else device)
        except (AssertionError, RuntimeError) as error:
            reason = str(error).split(". ")[0].splitlines()[0]
            if reason.startswith("Expected one of"):  # all the kinds that torch has a word for
                reason = "no such device"
            raise StudyError(f"--device {device!r}: {reason}; use cpu, cuda or cuda:1") from None
    return device


def _demo(options: Any, output: Output) -> None:
    source = importlib.util.spec_from_file_location("zoo", DEMO / "zoo.py")
    if source is None or source.loader is None or not (DEMO / "zoo.py").is_file():
        from search.spec import StudyError

        raise StudyError(f"{DEMO} is missing: the demo runs from a clone of the repository")
    zoo = importlib.util.module_from_spec(source)
    sys.modules["zoo"] = zoo
    source.loader.exec_module(zoo)
    zoo.train_family(DEMO, say=output.stage)
    options.study = DEMO / "study.yaml"
    _run(options, output)


def _run(options: Any, output: Output) -> None:
    from search.spec import load_study

    spec = load_study(options.study)
    changes = {"trials": options.trials, "seed": options.seed}
    wanted = {name: value for name, value in changes.items() if value is not None}
    search = spec.search.model_copy(update=wanted)
    spec = spec.model_copy(update={"search": search})
    work = partial(_finish, timeout=options.timeout or math.inf)
    _session(spec, options.out, options, output, work)


def _session(
    spec: StudySpec,
    folder: Path,
    options: Any,
    output: Output,
    work: Callable[[Run], None],
) -> None:
    """Do ``work`` with a run, holding its folder."""
    from search.folder import check_folder, check_run_folder, has_run, locked, set_aside

    new = getattr(options, "force_new", False)
    if new:
        check_folder(folder)
    else:
        check_run_folder(folder)
    if options.storage or has_run(folder):
        _check_storage(spec, folder, options.storage, new=new)
    # It checks everything, and nothing is written before.
    bench, workers = _crew(spec, getattr(options, "study", folder), options, output.plan)
    from search.runner import Run
    from search.storage import Storage, Store

    try:
        if not folder.exists():  # no folder is made for donors that no recipe could be built of
            workers.look_through()
        with locked(folder):
            if new:
                set_aside(folder)
            storage = Storage.of(folder, options.storage)
            store = Store(storage, output.note)
            storage.remember(folder)
            store.persist(lambda: _attempt(Run(folder, bench, workers, output, store), work))
    finally:
        workers.close()


def _check_storage(spec: StudySpec, folder: Path, url: str | None, *, new: bool) -> None:
    """Refuse a database that does not let us in, or that has another study for this folder."""
    from search.runner import check_run
    from search.storage import Storage

    storage = Storage.of(folder, url, new=new)
    storage.check()
    if not new:
        check_run(folder, spec, storage)


def _attempt(run: Run, work: Callable[[Run], None]) -> None:
    from search.storage import DATABASE_ERRORS

    try:
        run.adopt()
        with _stopping(run):
            work(run)
    except DATABASE_ERRORS:
        run.scorer.abandon()
        raise
    finally:
        run.output.stop()


def _crew(
    spec: StudySpec, file: Path, options: Any, say: Callable[[str], None]
) -> tuple[Bench, Workers]:
    """The coordinator's bench, and who works for it: this process, or as many as were asked for.

    What is wrong with the study is said with ``file``.
    """
    from search.bench import Machine, make_bench, open_family, outline

    machine = Machine(_device(options), options.memory, not options.no_compile)
    searching = "trials" in vars(options)
    if options.workers is None:
        with _about(file):
            bench = make_bench(spec, machine, say)
        from search.cost import estimate
        from search.workers import Here

        if searching:
            say(str(estimate(bench, bench.builder.family, machine)))
        return bench, Here(bench)
    from search.cluster import Cluster, RayWorkers, import_ray
    from search.cost import estimate

    import_ray()  # before anything is prepared
    with _about(file):
        family = open_family(spec)
        outlined = outline(spec, family)
    if searching and machine.builds_on.type == "cpu":  # else the workers' GPUs are unknown here
        say(str(estimate(outlined, family, machine, options.workers)))
    count, gpus = options.workers, options.gpus_per_worker
    cluster = Cluster(options.ray_address, options.verbose)
    return outlined, RayWorkers(spec, machine, count=count, gpus=gpus, cluster=cluster, say=say)


@contextmanager
def _stopping(run: Run) -> Iterator[None]:
    """Have Ctrl-C end the work with the blocks that are asked now, and a second one at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        if not run.scorer.working:
            signal.default_int_handler(number, frame)
        run.scorer.stopping = True
        run.output.stopping()

    if threading.current_thread() is not threading.main_thread():  # it gets no signals
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _finish(run: Run, timeout: float) -> None:
    """Search, choose, export, report: each step finds what an earlier session has done."""
    from search.card import model_card
    from search.conclusion import conclude
    from search.folder import CARD, replace_text

    draw = _now_and_then(partial(_draw, run), DRAW_EVERY)
    believe = _now_and_then(partial(_believe, run), BELIEVE_EVERY)
    run.after_trial = (believe, draw)
    run.search(timeout)
    result, recipe = conclude(run)
    replace_text(run.folder / "recipe.yaml", recipe.to_yaml())
    checkpoint = run.folder / "checkpoint"
    card = model_card(run.folder.name, run.spec, recipe, result)
    if _holds(checkpoint, recipe):
        replace_text(checkpoint / CARD, card)
    else:
        shutil.rmtree(checkpoint, ignore_errors=True)
        _save(run, recipe, checkpoint, card)
    replace_text(run.folder / "result.json", result.model_dump_json(indent=2) + "\n")
    _sample_items(run, result)
    _draw(run)
    run.output.result(result, run.folder)


def _now_and_then(work: Callable[[], None], every: float) -> Callable[[], None]:
    """The same work, left out if it was done a short time ago."""
    due = time.monotonic() + every

    def do() -> None:
        nonlocal due
        if (start := time.monotonic()) >= due:
            work()
            end = time.monotonic()
            due = end + max(every, (end - start) / DRAW_SHARE)

    return do


def _believe(run: Run) -> None:
    """Say which trial is believed to be best so far. Being for show, it stops no run."""
    with suppress(Exception):
        candidates, belief = run.beliefs()
        best = belief.ranked([candidate.missed for candidate in candidates])[0]
        run.output.believes(candidates[best].trial, float(belief.means[best]))


def _sample_items(run: Run, result: Result) -> None:
    """Keep the words of a few items that were gained and lost, if there are none so far."""
    from search.responses import ITEMS, of_items, read_samples
    from search.workers import FAILURES

    if read_samples(run.folder, result):
        return
    run.output.stage("asking for the words of some items gained and lost")
    try:
        _keep(run, result, of_items(run, result, ITEMS))
    except FAILURES as error:
        run.output.note(f"what they write is not shown: {error}")


def _keep(run: Run, result: Result, samples: Sequence[Sample]) -> None:
    """Keep prompts, or items, in place of those before."""
    from search.folder import replace_text
    from search.responses import FILE, Samples, read_samples

    kinds = {sample.task is None for sample in samples}
    others = [one for one in read_samples(run.folder, result) if (one.task is None) not in kinds]
    kept = Samples(trial=result.winner.trial, samples=[*others, *samples])
    replace_text(run.folder / FILE, kept.model_dump_json(indent=2) + "\n")


def _draw(run: Run) -> None:
    """Write the run's page. That it cannot be drawn is no reason to stop a run."""
    from search.folder import replace_text
    from search.report import make_report

    try:
        page = make_report(run.folder, run.store, run.study)
        replace_text(run.folder / "report.html", page)
    except Exception as error:  # whatever it is
        run.output.note(f"there is no report.html: {error}")


def _holds(checkpoint: Path, recipe: Recipe) -> bool:
    from merge_engine.recipe import load_recipe

    file = checkpoint / "mergekit_config.yml"
    return file.is_file() and load_recipe(file)[0].key == recipe.key


def _save(run: Run, recipe: Recipe, out: Path, card: str) -> None:
    from search.runner import export

    run.output.stage(f"saving {out}")
    compared, differing, _ = export(run, recipe, out, card)
    text = f"rebuilt: all {compared} answers are those in the database"
    if differing:
        text = (
            f"rebuilt: {compared - differing} of {compared} answers are those in the database, the "
            "others differ as rounding does (another machine, or smaller batches)"
        )
    run.output.stage(text)


def _build(options: Any, output: Output) -> None:
    import torch

    from merge_engine.builder import built_tensors
    from merge_engine.checkpoint import Model, write_checkpoint
    from merge_engine.plan import plan_merge
    from merge_engine.recipe import load_recipe

    recipe, notes = load_recipe(options.recipe)
    for note in notes:
        output.note(note)
    with _about(options.recipe):
        plan = plan_merge(recipe)
    tensors = built_tensors(plan, torch.device(_device(options)))
    write_checkpoint(tensors, options.out, shapes=plan.shapes(), model=Model.of(plan))
    text = f"{options.out}: {len(plan.names)} tensors of {recipe.merge_method}"
    output.done(text, checkpoint=str(options.out), tensors=len(plan.names))


def _score(options: Any, output: Output) -> None:
    from search.bench import find_tasks, load_live, make_objective, make_splits
    from search.conclusion import score_of
    from search.selection import Sheet
    from search.spec import load_study

    spec = load_study(options.study)
    with _about(options.study):
        tasks = find_tasks(spec)
    model, base = load_live(spec, options.model, _device(options))
    with _about(options.study):
        objective = make_objective(spec, tasks, model, base)
        splits = make_splits(spec, objective.items, objective.tasks)
    numbers = getattr(splits, options.split)
    items = [objective.items[number] for number in numbers]
    shown = objective.shown(numbers)
    answers = objective.score(model, numbers)
    score = score_of(Sheet.of(items, answers, objective.tasks), spec.search.seed)
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
    output.score(options.model, options.split, score, rows)


def _init(options: Any, output: Output) -> None:
    from merge_engine.donors import is_here
    from search.init import all_or_nothing, write_study
    from search.plan import check_study

    base = _given([options.base] if options.base else None, "--base", "base model")[0]
    models = _given(options.models, "--models", "models to merge")
    tasks = _given(options.tasks, "--tasks", "tasks or .jsonl files")
    with all_or_nothing() as write:
        notes = write_study(options.out, base, models, tasks, options.trials, write)
        away = [model for model in (base, *models) if not is_here(model)]
        plan, more = ([], []) if away else check_study(options.out, _device(options))
    if away:
        more = [f"not on this machine: {', '.join(away)}; check fetches them and prints the plan"]
    for note in (*notes, *more):
        output.note(note)
    following = f"check {options.out}" if away else f"run {options.out} --out runs/mine"
    output.stage(f"wrote {options.out}")
    for line in plan:
        output.plan(line)
    output.done(f"next: mergesearch {following}", study=str(options.out))


def _given(words: list[str] | None, option: str, what: str) -> list[str]:
    """An option's words; where it is missing they are asked for, if somebody is there."""
    from search.spec import StudyError

    if not words and sys.stdin.isatty():
        words = shlex.split(input(f"{what}: "))
    if not words:
        raise StudyError(f"init: {option} is missing; give {what}")
    return words


def _check(options: Any, output: Output) -> None:
    from merge_engine.recipe import load_yaml
    from search.plan import check_recipe, check_study

    check = check_recipe if "merge_method" in load_yaml(options.file) else check_study
    device = _device(options)
    with _about(options.file):
        plan, notes = check(options.file, device)
    for note in notes:
        output.note(note)
    for line in plan:
        output.plan(line)
    output.done("", file=str(options.file))


def _export(options: Any, output: Output) -> None:
    from merge_engine.recipe import Recipe, RecipeError
    from search.card import model_card
    from search.conclusion import other_trial
    from search.folder import check_folder
    from search.result import read_result
    from search.runner import find_trial, stored_spec
    from search.spec import StudyError
    from search.storage import Storage, Store

    if options.out.exists():
        raise RecipeError(f"{options.out} exists; choose another folder or remove it")
    check_folder(options.out)
    spec, result = stored_spec(options.run, options.storage), read_result(options.run)
    won = Recipe.model_validate(result.winner.recipe) if result and options.trial is None else None
    if options.trial is not None:
        study = Store(Storage.of(options.run, options.storage)).study()
        find_trial(options.run, study, options.trial)
    elif won is None:
        raise StudyError(f"{options.run} has no winner yet; name a --trial")

    def save(run: Run) -> None:
        recipe = won or run.recipe_of(options.trial)
        other = None if won else other_trial(run, options.trial, recipe, result)
        card = model_card(options.out.name, run.spec, recipe, result, other)
        _save(run, recipe, options.out, card)
        output.done("", checkpoint=str(options.out))

    _session(spec, options.run, options, output, save)


def _sample(options: Any, output: Output) -> None:
    from objectives.tasks import PromptSpec
    from search.responses import of_items, of_prompts
    from search.result import read_result
    from search.runner import stored_spec
    from search.spec import StudyError

    spec, result = stored_spec(options.run, options.storage), read_result(options.run)
    if result is None:
        raise StudyError(f"{options.run} has no winner yet; ask again when the run has finished")

    def ask(run: Run) -> None:
        if options.prompt:
            prompts = PromptSpec(tuple(options.prompt), options.max_tokens)
            samples = of_prompts(run, result, prompts)
        else:
            samples = of_items(run, result, options.items)
        if not samples:
            raise StudyError(
                "the winner and the best donor answer all test items alike, or in no words; "
                "give a --prompt"
            )
        _keep(run, result, samples)
        output.samples(samples)

    _session(spec, options.run, options, output, ask)


def _push(options: Any, output: Output) -> None:
    from merge_engine.recipe import Recipe
    from search.card import push
    from search.folder import CARD
    from search.result import read_result
    from search.spec import StudyError

    run, result = options.run, read_result(options.run)
    if result is None:
        raise StudyError(f"{run} has no result yet; push it when the run has finished")
    recipe, checkpoint = Recipe.model_validate(result.winner.recipe), run / "checkpoint"
    if not _holds(checkpoint, recipe) or not (checkpoint / CARD).is_file():
        raise StudyError(f"{checkpoint} is not what result.json speaks of; finish the run again")
    if folders := [model for model in recipe.models_read if Path(model).is_absolute()]:
        output.note(f"the recipe names folders of this machine: {', '.join(folders)}")
    url = push(checkpoint, run / "recipe.yaml", options.repo, private=options.private)
    output.done(url, url=url)


def _report(options: Any, output: Output) -> None:
    from search.folder import check_folder, is_held, replace_text
    from search.report import make_report
    from search.runner import stored_spec
    from search.spec import StudyError
    from search.storage import Storage, Store

    stored_spec(options.run, options.storage)
    file = options.out or options.run / "report.html"
    if file.is_dir():
        raise StudyError(f"{file} is a folder; name the file to write in it")
    check_folder(file.parent)
    store = Store(Storage.of(options.run, options.storage))
    page = make_report(options.run, store, store.study(), held=is_held(options.run))
    replace_text(file, page)
    output.done(str(file), report=str(file))


COMMANDS: Mapping[str, Callable[[Any, Output], None]] = {
    "demo": _demo,
    "run": _run,
    "build": _build,
    "score": _score,
    "init": _init,
    "check": _check,
    "export": _export,
    "sample": _sample,
    "report": _report,
    "push": _push,
}

if __name__ == "__main__":
    sys.exit(program())
