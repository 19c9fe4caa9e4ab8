"""A session of a run: all that is checked before it, the work, and what is written at its end.

What takes long to import is imported when all has been checked that can be checked without it.
"""

from __future__ import annotations

import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import torch

from merge_engine.errors import MergeError
from merge_engine.recipe.recipe import Recipe
from merge_engine.recipe.recipe_file import load_recipe
from objectives.base import ObjectiveError
from search.preparing.context import StudyContext, load, load_outline, plan_study
from search.preparing.cost import describe_cost
from search.preparing.models import Hardware
from search.storing.folder import (
    CARD,
    check_folder,
    check_run_folder,
    has_run,
    locked,
    replace_text,
    set_aside,
)
from search.study.spec import StudyError, StudySpec

if TYPE_CHECKING:
    from merge_engine.models.memory_plan import MemoryPlan
    from search.running.events import Output
    from search.running.run import Run
    from search.running.sampling import Sample
    from search.running.workers import Workers
    from search.storing.result import Result

DRAW_EVERY: Final = 30.0  # seconds, to draw a run's page
BELIEVE_EVERY: Final = 1.0  # and to say what is believed
DRAW_SHARE: Final = 0.05  # of its time, for each of them


@contextmanager
def about(file: Path) -> Iterator[None]:
    """Begin what is wrong with what a study or a recipe says with its name, wherever it shows."""
    try:
        yield
    except (MergeError, ObjectiveError, StudyError) as error:
        if str(file) in str(error):
            raise
        raise type(error)(f"{file}: {error}") from error


def device_of(options: Any) -> str:
    """The device that is named, else the first GPU if there is one.

    Raises:
        StudyError: It is not there.
    """
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


def work_on(
    spec: StudySpec,
    folder: Path,
    options: Any,
    output: Output,
    work: Callable[[Run], None],
) -> None:
    """Do ``work`` with a run, holding its folder.

    Raises:
        StudyError, RecipeError, ObjectiveError: Before anything is written, if it cannot be done.
    """
    new = getattr(options, "force_new", False)
    if new:
        check_folder(folder)
    else:
        check_run_folder(folder)
    if options.storage or has_run(folder):
        _check_storage(spec, folder, options.storage, new=new)
    # It checks everything, and nothing is written before.
    bench, workers = _crew(spec, getattr(options, "study", folder), options, output.plan)
    from search.running.run import Run
    from search.storing.store import Storage, Store

    try:
        if not folder.exists():  # no folder is made for donors that no recipe could be built of
            workers.look_through()
        with locked(folder):
            if new:
                set_aside(folder)
            storage = Storage.of(folder, options.storage)
            store = Store(storage, output.note)
            storage.remember(folder)
            shown = (_throttled(_believe, BELIEVE_EVERY), _throttled(_draw, DRAW_EVERY))
            store.persist(lambda: _attempt(Run(folder, bench, workers, output, store, shown), work))
    finally:
        workers.close()


def _check_storage(spec: StudySpec, folder: Path, url: str | None, *, new: bool) -> None:
    """Refuse a database that does not let us in, or that has another study for this folder."""
    from search.storing.resume import check_run
    from search.storing.store import Storage

    storage = Storage.of(folder, url, new=new)
    storage.check()
    if not new:
        check_run(folder, spec, storage)


def _attempt(run: Run, work: Callable[[Run], None]) -> None:
    from search.storing.store import DATABASE_ERRORS

    try:
        run.bind_to_store()
        with _stopping(run):
            work(run)
    except DATABASE_ERRORS:
        run.evaluator.abandon()
        raise
    finally:
        run.output.stop()


def _crew(
    spec: StudySpec, file: Path, options: Any, say: Callable[[str | MemoryPlan], None]
) -> tuple[StudyContext, Workers]:
    """The coordinator's bench, and who works for it: this process, or as many as were asked for.

    What is wrong with the study is said with ``file``.
    """
    machine = Hardware(device_of(options), options.memory, not options.no_compile)
    searching = "trials" in vars(options)
    if options.workers is None:
        with about(file):
            plan = plan_study(spec, compiled=machine.compiled)
            bench = load(plan, machine, say)
        from search.running.workers import LocalWorker

        if searching:
            say(describe_cost(plan))
        return bench, LocalWorker(bench)
    from search.running.ray_workers import Cluster, RayWorkers, import_ray

    import_ray()  # before anything is prepared
    with about(file):
        plan = plan_study(spec)
        outlined = load_outline(plan)
    if searching:
        say(describe_cost(plan))
    count, gpus = options.workers, options.gpus_per_worker
    cluster = Cluster(options.ray_address, options.verbose)
    return outlined, RayWorkers(spec, machine, count=count, gpus=gpus, cluster=cluster, say=say)


@contextmanager
def _stopping(run: Run) -> Iterator[None]:
    """Have Ctrl-C end the work with the blocks that are asked now, and a second one at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        if not run.request_stop():
            signal.default_int_handler(number, frame)
        run.output.stopping()

    if threading.current_thread() is not threading.main_thread():  # it gets no signals
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def finish(run: Run, timeout: float) -> None:
    """Search, choose, export, report: each step finds what an earlier session has done."""
    from search.running.conclusion import conclude
    from search.showing.card import model_card

    run.search(timeout)
    result, recipe = conclude(run)
    replace_text(run.folder / "recipe.yaml", recipe.to_yaml())
    checkpoint = run.folder / "checkpoint"
    card = model_card(run.folder.name, run.spec, recipe, result)
    if holds(checkpoint, recipe):
        replace_text(checkpoint / CARD, card)
    else:
        shutil.rmtree(checkpoint, ignore_errors=True)
        save_checkpoint(run, recipe, checkpoint, card)
    replace_text(run.folder / "result.json", result.model_dump_json(indent=2) + "\n")
    _sample_items(run, result)
    _draw(run)
    run.output.result(result, run.folder)


def _throttled(work: Callable[[Run], None], every: float) -> Callable[[Run], None]:
    """Return the same work, left out where it was done a short time ago."""
    due = time.monotonic() + every

    def do(run: Run) -> None:
        nonlocal due
        if (start := time.monotonic()) >= due:
            work(run)
            end = time.monotonic()
            due = end + max(every, (end - start) / DRAW_SHARE)

    return do


def _believe(run: Run) -> None:
    """Say which trial is believed to be best so far. Being for show, it stops no run."""
    with suppress(Exception):
        candidates, posterior = run.posterior()
        best = posterior.ranked([one.trial.violation for one in candidates])[0]
        run.output.believes(candidates[best].trial, float(posterior.means[best]))


def _sample_items(run: Run, result: Result) -> None:
    """Keep the words of a few items that were gained and lost, if there are none so far."""
    from search.running.sampling import ITEMS, of_items, read_samples
    from search.running.workers import FAILURES

    if read_samples(run.folder, result):
        return
    run.output.stage("asking for the words of some items gained and lost")
    try:
        keep(run, result, of_items(run, result, ITEMS))
    except FAILURES as error:
        run.output.note(f"what they write is not shown: {error}")


def keep(run: Run, result: Result, samples: Sequence[Sample]) -> None:
    """Keep prompts, or items, in place of those before."""
    from search.running.sampling import FILE, Samples, read_samples

    kinds = {sample.task is None for sample in samples}
    others = [one for one in read_samples(run.folder, result) if (one.task is None) not in kinds]
    kept = Samples(trial=result.winner.trial, samples=[*others, *samples])
    replace_text(run.folder / FILE, kept.model_dump_json(indent=2) + "\n")


def _draw(run: Run) -> None:
    """Write the run's page. That it cannot be drawn is no reason to stop a run."""
    from search.showing.report import make_report

    try:
        page = make_report(run.folder, run.store)
        replace_text(run.folder / "report.html", page)
    except Exception as error:  # whatever it is
        run.output.note(f"there is no report.html: {error}")


def holds(checkpoint: Path, recipe: Recipe) -> bool:
    """Whether a folder has what the recipe makes."""
    file = checkpoint / "mergekit_config.yml"
    return file.is_file() and load_recipe(file)[0].key == recipe.key


def save_checkpoint(run: Run, recipe: Recipe, out: Path, card: str) -> None:
    """Export a recipe, and say how its rebuilt answers compare with those in the database."""
    run.output.stage(f"saving {out}")
    compared, differing, machine = run.evaluator.export(recipe, out, card)
    if not out.is_dir():
        run.output.note(f"{out} lies on the machine {machine}, whose worker has written it")
    text = f"rebuilt: all {compared} answers are those in the database"
    if differing:
        text = (
            f"rebuilt: {compared - differing} of {compared} answers are those in the database, the "
            "others differ as rounding does (another machine, or smaller batches)"
        )
    run.output.stage(text)
