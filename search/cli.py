"""The commands. What is heavy to import is imported by the command that needs it."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.arguments import UsageError, make_parser
from search.process import quiet

if TYPE_CHECKING:
    from search.running.events import Output
    from search.running.run import Run

DEMO = Path(__file__).parent.parent / "studies" / "demo"
STOPPED, BAD_INPUT, INTERRUPTED = 1, 2, 130
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
        from merge_engine.models.statistics_cache import user_limit

        user_limit()  # a wrong one is said now, and not by the first of many candidates
        # What tasks print on their own account is no event.
        with redirect_stdout(sys.stderr) if options.json else nullcontext():
            COMMANDS[options.command](options, output)


def _output(options: Any) -> Output:
    if options.json:
        from search.running.events import JsonLines

        return JsonLines(sys.stdout)
    from rich.console import Console

    from search.showing.terminal import Terminal

    piped = not sys.stdout.isatty()  # then no line is broken, and nothing moves
    return Terminal(Console(soft_wrap=piped, force_interactive=False if piped else None))


def _known(error: Exception) -> tuple[str, int] | None:
    """What to say of an error that is no fault of this program, and the exit code."""
    from merge_engine.building.export import FULL
    from merge_engine.errors import MergeError
    from objectives.base import ObjectiveError, printable
    from search.study.spec import StudyError

    if isinstance(error, MergeError | ObjectiveError | StudyError):
        return printable(str(error)), BAD_INPUT  # it may quote a file's or a model's own words
    from search.storing.store import Interrupted

    if isinstance(error, Interrupted):
        return f"{error}; when that is mended, {AGAIN}", STOPPED
    if isinstance(error, OSError) and error.errno in FULL:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; when there is room, {AGAIN}", STOPPED
    return None


def _demo(options: Any, output: Output) -> None:
    source = importlib.util.spec_from_file_location("zoo", DEMO / "zoo.py")
    if source is None or source.loader is None or not (DEMO / "zoo.py").is_file():
        from search.study.spec import StudyError

        raise StudyError(f"{DEMO} is missing: the demo runs from a clone of the repository")
    zoo = importlib.util.module_from_spec(source)
    sys.modules["zoo"] = zoo
    source.loader.exec_module(zoo)
    zoo.train_family(DEMO, say=output.stage)
    options.study = DEMO / "study.yaml"
    _run(options, output)


def _run(options: Any, output: Output) -> None:
    from search.session import finish, work_on
    from search.study.reading import load_study

    spec = load_study(options.study)
    changes = {"trials": options.trials, "seed": options.seed}
    wanted = {name: value for name, value in changes.items() if value is not None}
    search = spec.search.model_copy(update=wanted)
    spec = spec.model_copy(update={"search": search})
    work = partial(finish, timeout=options.timeout or math.inf)
    work_on(spec, options.out, options, output, work)


def _build(options: Any, output: Output) -> None:
    import torch

    from merge_engine.building.builder import built_tensors
    from merge_engine.building.export import write_checkpoint
    from merge_engine.building.plan import plan_merge
    from merge_engine.numerics.kernel_runner import configure_compiler
    from merge_engine.recipe.recipe_file import load_recipe
    from search.session import about, device_of

    recipe, notes = load_recipe(options.recipe)
    for note in notes:
        output.note(note)
    with about(options.recipe):
        plan = plan_merge(recipe)
    if any(part.model_set.runner.compiled for part in plan.parts):
        configure_compiler()
    tensors = built_tensors(plan, torch.device(device_of(options)))
    write_checkpoint(tensors, options.out, shapes=plan.shapes(), files=plan.files)
    text = f"{options.out}: {len(plan.names)} tensors of {recipe.merge_method}"
    output.done(text, checkpoint=str(options.out), tensors=len(plan.names))


def _score(options: Any, output: Output) -> None:
    from search.preparing.models import load_scored, load_study_tokenizer
    from search.preparing.tasks import bind_tasks, plan_tasks
    from search.racing.item_scores import ItemScores
    from search.running.conclusion import score_of
    from search.session import about, device_of
    from search.study.reading import load_study

    spec = load_study(options.study)
    with about(options.study):
        tasks = plan_tasks(spec)
    model, base = load_scored(spec, options.model, device_of(options))
    with about(options.study):
        tokenizer = load_study_tokenizer(spec, base)
        objective, splits = bind_tasks(spec, tasks, model, tokenizer)
    numbers = getattr(splits, options.split)
    items = [objective.items[number] for number in numbers]
    shown = objective.snapshots(numbers)
    answers = objective.score(model, numbers)
    score = score_of(ItemScores.of(items, answers, objective.tasks), spec.search.seed)
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
    from merge_engine.models.checkpoint import is_local
    from search.preparing.check import check_study
    from search.session import device_of
    from search.study.template import all_or_nothing, write_study

    base = _given([options.base] if options.base else None, "--base", "base model")[0]
    models = _given(options.models, "--models", "models to merge")
    tasks = _given(options.tasks, "--tasks", "tasks or .jsonl files")
    with all_or_nothing() as write:
        notes = write_study(options.out, base, models, tasks, options.trials, write)
        away = [model for model in (base, *models) if not is_local(model)]
        plan, more = ([], []) if away else check_study(options.out, device_of(options))
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
    from search.study.spec import StudyError

    if not words and sys.stdin.isatty():
        words = shlex.split(input(f"{what}: "))
    if not words:
        raise StudyError(f"init: {option} is missing; give {what}")
    return words


def _check(options: Any, output: Output) -> None:
    from merge_engine.schema import load_yaml
    from search.preparing.check import check_recipe, check_study
    from search.session import about, device_of

    is_recipe, device = "merge_method" in load_yaml(options.file), device_of(options)
    with about(options.file):
        plan, notes = check_recipe(options.file) if is_recipe else check_study(options.file, device)
    for note in notes:
        output.note(note)
    for line in plan:
        output.plan(line)
    output.done("", file=str(options.file))


def _export(options: Any, output: Output) -> None:
    from merge_engine.errors import MergeError
    from merge_engine.recipe.recipe import Recipe
    from search.running.conclusion import other_trial
    from search.session import save_checkpoint, work_on
    from search.showing.card import model_card
    from search.storing.folder import check_folder
    from search.storing.result import read_result
    from search.storing.resume import find_trial, stored_spec
    from search.storing.store import Storage, Store
    from search.storing.trials import TrialLog
    from search.study.spec import StudyError

    if options.out.exists():
        raise MergeError(f"{options.out} exists; choose another folder or remove it")
    check_folder(options.out)
    spec, result = stored_spec(options.run, options.storage), read_result(options.run)
    won = Recipe.model_validate(result.winner.recipe) if result and options.trial is None else None
    if options.trial is not None:
        store = Store(Storage.of(options.run, options.storage))
        find_trial(options.run, TrialLog(store.study()), options.trial)
    elif won is None:
        raise StudyError(f"{options.run} has no winner yet; name a --trial")

    def save(run: Run) -> None:
        recipe = won or run.find_recipe(options.trial)
        other = None if won else other_trial(run, options.trial, recipe, result)
        card = model_card(options.out.name, run.spec, recipe, result, other)
        save_checkpoint(run, recipe, options.out, card)
        output.done("", checkpoint=str(options.out))

    work_on(spec, options.run, options, output, save)


def _sample(options: Any, output: Output) -> None:
    from objectives.entries import PromptEntry
    from search.running.sampling import of_items, of_prompts
    from search.session import keep, work_on
    from search.storing.result import read_result
    from search.storing.resume import stored_spec
    from search.study.spec import StudyError

    spec, result = stored_spec(options.run, options.storage), read_result(options.run)
    if result is None:
        raise StudyError(f"{options.run} has no winner yet; ask again when the run has finished")

    def ask(run: Run) -> None:
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
        keep(run, result, samples)
        output.samples(samples)

    work_on(spec, options.run, options, output, ask)


def _push(options: Any, output: Output) -> None:
    from merge_engine.recipe.recipe import Recipe
    from search.session import holds
    from search.showing.card import push
    from search.storing.folder import CARD
    from search.storing.result import read_result
    from search.study.spec import StudyError

    run, result = options.run, read_result(options.run)
    if result is None:
        raise StudyError(f"{run} has no result yet; push it when the run has finished")
    recipe, checkpoint = Recipe.model_validate(result.winner.recipe), run / "checkpoint"
    if not holds(checkpoint, recipe) or not (checkpoint / CARD).is_file():
        raise StudyError(f"{checkpoint} is not what result.json speaks of; finish the run again")
    if folders := [model for model in recipe.models_read if Path(model).is_absolute()]:
        output.note(f"the recipe names folders of this machine: {', '.join(folders)}")
    url = push(checkpoint, run / "recipe.yaml", options.repo, private=options.private)
    output.done(url, url=url)


def _report(options: Any, output: Output) -> None:
    from search.showing.report import make_report
    from search.storing.folder import check_folder, is_held, replace_text
    from search.storing.resume import stored_spec
    from search.storing.store import Storage, Store
    from search.study.spec import StudyError

    stored_spec(options.run, options.storage)
    file = options.out or options.run / "report.html"
    if file.is_dir():
        raise StudyError(f"{file} is a folder; name the file to write in it")
    check_folder(file.parent)
    store = Store(Storage.of(options.run, options.storage))
    page = make_report(options.run, store, held=is_held(options.run))
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
