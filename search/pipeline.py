"""Run a study in a locked run folder: open the database, search, conclude, export, report."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Final

from merge_engine.building.checksums import CHECKSUMS, is_whole, listed_files
from merge_engine.building.export import RECIPE
from merge_engine.recipe.recipe import Recipe
from merge_engine.replacing import replace_text
from search.preparing.context import StudyContext
from search.preparing.cost import block_advice
from search.running.conclusion import conclude
from search.running.events import (
    IncumbentChanged,
    Listener,
    Note,
    RunFinished,
    SessionEnded,
    Stage,
    StopRequested,
)
from search.running.run import Run
from search.running.sampling import ITEMS, of_items
from search.running.search_loop import search
from search.running.workers import FAILURES, Workers
from search.showing.card import model_card
from search.showing.report import make_report
from search.showing.score_table import OtherTrial
from search.storing.address import DATABASE_ERRORS, Storage
from search.storing.folder import CARD, JOURNALS
from search.storing.result import Result, Score, write_result
from search.storing.resume import find_trial
from search.storing.samples import read_samples, store_samples
from search.storing.store import Store
from search.study.public_names import public_names, public_recipe

REPORT_EVERY: Final = 30.0  # seconds between two versions of report.html
BEST_EVERY: Final = 1.0  # seconds between two announcements of the best trial
SHOWING_SHARE: Final = 0.05  # of a run's time, for each of them


def work_on(
    folder: Path,
    url: str | None,
    context: StudyContext,
    workers: Workers,
    listener: Listener,
    work: Callable[[Run], None],
) -> None:
    """Open the database of a run and do ``work``; repeat it after a lost connection."""
    storage = Storage.of(folder, url)
    store = Store(storage, lambda text: listener(Note(text)))
    storage.remember(folder)
    opened = time.perf_counter()  # reconnecting does not restart the session's clock
    store.persist(lambda: _attempt(Run(folder, context, workers, listener, store, opened), work))


def _attempt(run: Run, work: Callable[[Run], None]) -> None:
    try:
        run.bind_to_store()
        with _interruptible(run):
            work(run)
    except DATABASE_ERRORS:
        run.evaluator.abandon()
        raise
    finally:
        run.listener(SessionEnded())


@contextmanager
def _interruptible(run: Run) -> Iterator[None]:
    """Have Ctrl-C or SIGTERM end the work after the blocks under way, a second one at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        restore()
        if not run.request_stop():
            signal.default_int_handler(number, frame)
        run.listener(StopRequested())

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is not threading.main_thread():  # it gets no signals
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        restore()


def finish(run: Run, timeout: float) -> None:
    """Search, select, test, export and report; each part resumes what an earlier session did."""
    shows = _throttled(_announce_best, BEST_EVERY), _throttled(draw_report, REPORT_EVERY)
    search(run, timeout, shows)
    result, recipe = conclude(run)
    for advice in block_advice(run.spec.objective.block, *run.store.evaluations()):
        run.listener(Note(advice))
    replace_text(run.folder / "recipe.yaml", recipe.to_yaml())
    names = public_names(run.spec)
    write_result(run.folder, result, names)
    checkpoint = run.folder / "checkpoint"
    card = card_of(run, checkpoint, recipe, result)
    if not is_export_of(checkpoint, public_recipe(recipe, names)):
        _make_room(run, checkpoint)
        save_checkpoint(run, recipe, checkpoint, card)
    elif card:
        replace_text(checkpoint / CARD, card)
    _sample_test_items(run, result)
    shutil.rmtree(run.folder / JOURNALS, ignore_errors=True)
    draw_report(run)
    run.listener(RunFinished(result, run.folder))


def _throttled(work: Callable[[Run], None], every: float) -> Callable[[Run], None]:
    """Return ``work`` that does nothing if it last ended less than ``every`` seconds ago.

    The pause is longer where it would take more than ``SHOWING_SHARE`` of the time.
    """
    due = time.monotonic() + every

    def do(run: Run) -> None:
        nonlocal due
        if (start := time.monotonic()) >= due:
            work(run)
            end = time.monotonic()
            due = end + max(every, (end - start) / SHOWING_SHARE)

    return do


def _announce_best(run: Run) -> None:
    """Announce the trial with the best posterior mean; a failure here does not stop the run."""
    with suppress(Exception):
        (best, *_), posterior = run.ranked_candidates()
        run.listener(IncumbentChanged(best.trial, float(posterior.means[0])))


def _sample_test_items(run: Run, result: Result) -> None:
    """Store the responses to a few test items gained and lost, if there are none so far."""
    if read_samples(run.folder, result):
        return
    run.listener(Stage("generating the responses to some items gained and lost"))
    try:
        store_samples(run.folder, result, of_items(run, result, ITEMS))
    except FAILURES as error:
        run.listener(Note(f"responses are not shown: {error}"))


def draw_report(run: Run) -> None:
    """Write report.html; a failure here does not stop the run."""
    try:
        page = make_report(run.folder, run.store)
        replace_text(run.folder / "report.html", page)
    except Exception as error:  # whatever it is
        run.listener(Note(f"report.html was not written: {error}"))


def card_of(
    run: Run, out: Path, recipe: Recipe, result: Result | None, other: OtherTrial | None = None
) -> str:
    """Write the card of a checkpoint; "" if that fails, which does not stop the run."""
    name = run.folder.name if out.parent == run.folder else out.name
    try:
        return model_card(name, run.spec, recipe, result, other)
    except Exception as error:  # whatever it is
        run.listener(Note(f"{out}: no model card was written: {type(error).__name__}: {error}"))
        return ""


def other_trial(run: Run, number: int, recipe: Recipe, result: Result | None) -> OtherTrial | None:
    """Describe a finished trial's recipe; None if it is the winner's."""
    if result and Recipe.model_validate(result.winner.recipe).key == recipe.key:
        return None
    trial = find_trial(run.folder, run.log, number)
    tested = not run.evaluator.missing_blocks(recipe, "test")
    return OtherTrial(
        number,
        trial.estimate and trial.estimate.value,
        trial.items,
        Score.of(run.scores.stored(recipe, "test"), run.spec.search.seed) if tested else None,
    )


def is_export_of(checkpoint: Path, recipe: Recipe) -> bool:
    """Return whether a folder holds the complete checkpoint of this public recipe."""
    file = checkpoint / RECIPE
    if checkpoint.is_symlink() or RECIPE not in listed_files(checkpoint):
        return False
    return is_whole(checkpoint) and file.read_text(encoding="utf-8") == recipe.to_yaml()


def _make_room(run: Run, checkpoint: Path) -> None:
    """Remove an earlier winner's checkpoint, but no other files in its folder."""
    if not os.path.lexists(checkpoint):
        return
    if checkpoint.is_dir() and not checkpoint.is_symlink():
        for path in (checkpoint / n for n in (*listed_files(checkpoint), CARD, CHECKSUMS)):
            if not path.is_dir():
                path.unlink(missing_ok=True)
        for folder in (*(path for path in checkpoint.iterdir() if path.is_dir()), checkpoint):
            with suppress(OSError):  # it has other files
                folder.rmdir()
    if os.path.lexists(checkpoint):
        aside = next(
            path
            for number in count(1)
            if not os.path.lexists(path := checkpoint.with_name(f"checkpoint-old-{number}"))
        )
        checkpoint.rename(aside)
        run.listener(Note(f"{checkpoint} had files of others: they are now in {aside}"))


def save_checkpoint(run: Run, recipe: Recipe, out: Path, card: str) -> None:
    """Export a recipe, and say how its results, built again, compare with the stored ones."""
    run.listener(Stage(f"saving {out}"))
    compared, differing, machine = run.evaluator.export(recipe, out, card)
    if not out.is_dir():
        run.listener(Note(f"{out} was written by a worker on the machine {machine}"))
    text = f"rebuilt: all {compared} answers match the database"
    if differing:
        text = (
            f"rebuilt: {compared - differing} of {compared} answers match the database; the "
            "others differ by rounding (another machine, or smaller batches)"
        )
    run.listener(Stage(text))
