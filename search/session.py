"""A session of a run: its folder held, everything checked, the work done, its results written."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

import torch

from merge_engine.errors import MergeError
from merge_engine.models.memory_plan import MemoryPlan
from merge_engine.recipe.recipe import Recipe
from merge_engine.recipe.recipe_file import load_recipe
from objectives.base import ObjectiveError
from search.options import SessionOptions
from search.preparing.context import StudyContext, load, load_outline, plan_study
from search.preparing.cost import describe_cost
from search.preparing.models import Hardware
from search.running.conclusion import conclude
from search.running.events import (
    IncumbentChanged,
    Listener,
    Note,
    PlanReady,
    RunFinished,
    SessionEnded,
    Stage,
    StopRequested,
)
from search.running.ray_workers import Cluster, RayWorkers, import_ray
from search.running.run import Run
from search.running.sampling import ITEMS, of_items
from search.running.search_loop import search
from search.running.workers import FAILURES, LocalWorker, Workers
from search.showing.card import model_card
from search.showing.report import make_report
from search.storing.address import DATABASE_ERRORS, Storage
from search.storing.folder import (
    CARD,
    check_folder,
    check_run_folder,
    has_run,
    locked,
    replace_text,
    set_aside,
)
from search.storing.result import Result
from search.storing.resume import check_run
from search.storing.samples import read_samples, store_samples
from search.storing.store import Store
from search.study.spec import StudyError, StudySpec

REPORT_EVERY: Final = 30.0  # seconds between two drawings of a run's page
BEST_EVERY: Final = 1.0  # seconds between two announcements of the best trial
SHOWING_SHARE: Final = 0.05  # of a run's time, for each of them


@contextmanager
def errors_name(file: Path) -> Iterator[None]:
    """Prefix errors about a study or a recipe that are raised inside with the file's name."""
    try:
        yield
    except (MergeError, ObjectiveError, StudyError) as error:
        if str(file) in str(error):
            raise
        raise type(error)(f"{file}: {error}") from error


def choose_device(device: str | None, *, elsewhere: bool = False) -> str:
    """Return the device that is named, else the first GPU if there is one, else the CPU.

    Args:
        device: Of torch's names, or "auto" for all GPUs; None: not named.
        elsewhere: It may be on other machines, so that it need not be here.

    Raises:
        StudyError: It is not here.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not elsewhere:
        try:
            torch.empty(0, device="cuda" if device == "auto" else device)
        except (AssertionError, RuntimeError) as error:
            reason = str(error).split(". ")[0].splitlines()[0]
            if reason.startswith("Expected one of"):  # all the kinds that torch has a word for
                reason = "no such device"
            raise StudyError(f"--device {device!r}: {reason}; use cpu, cuda or cuda:1") from None
    return device


@dataclass(frozen=True)
class Session:
    """One process's work on a run.

    Attributes:
        spec: The study.
        folder: The run folder.
        options: Database, hardware and workers.
        listener: Receives every event.
        source: File or folder that errors about the study name.
        searches: Recipes are searched: the cost is announced.
    """

    spec: StudySpec
    folder: Path
    options: SessionOptions
    listener: Listener
    source: Path
    searches: bool = False

    def hold(self, work: Callable[[Run], None]) -> None:
        """Check everything, then do ``work`` with the run while its folder is locked.

        Raises:
            StudyError, MergeError, ObjectiveError: It cannot be done. Nothing has been written if
                that shows before ``work`` begins.
        """
        folder, url, new = self.folder, self.options.storage, self.options.force_new
        if new:
            check_folder(folder)
        else:
            check_run_folder(folder)
        if url or has_run(folder):
            self._check_storage()
        context, workers = self._prepare()
        try:
            if not folder.exists():  # no folder is made for donors with NaN or Inf
                workers.call("check_finite")
            with locked(folder):
                if new:
                    set_aside(folder)
                storage = Storage.of(folder, url)
                store = Store(storage, lambda text: self.listener(Note(text)))
                storage.remember(folder)
                opened = time.perf_counter()  # reconnecting does not begin the session anew
                store.persist(
                    lambda: _attempt(
                        Run(folder, context, workers, self.listener, store, opened), work
                    )
                )
        finally:
            workers.close()

    def _check_storage(self) -> None:
        """Refuse a database that cannot be opened, or that has another study for this folder."""
        new = self.options.force_new
        storage = Storage.of(self.folder, self.options.storage, new=new)
        storage.check()
        if not new:
            check_run(self.folder, self.spec, storage)

    def _prepare(self) -> tuple[StudyContext, Workers]:
        """Return the coordinator's context, and its workers: this process, or Ray's."""
        options = self.options

        def say(line: str | MemoryPlan) -> None:
            self.listener(PlanReady(line))

        device = choose_device(options.device, elsewhere=options.workers is not None)
        hardware = Hardware(device, options.memory, options.compiled)
        if options.workers is not None:
            import_ray()  # where it is missing, that is said before anything is prepared
        with errors_name(self.source):
            plan = plan_study(self.spec, compiled=options.compiled)
            if options.workers is None:
                context = load(plan, hardware, say)
            else:
                outline = load_outline(plan)
        if self.searches:
            say(describe_cost(plan))
        if options.workers is None:
            return context, LocalWorker(context)
        cluster = Cluster(options.ray_address, options.verbose)
        return outline, RayWorkers(
            self.spec,
            hardware,
            count=options.workers,
            gpus=options.gpus_per_worker,
            cluster=cluster,
            say=say,
        )


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
    """Have Ctrl-C end the work after the blocks that are evaluated now, a second one at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        if not run.request_stop():
            signal.default_int_handler(number, frame)
        run.listener(StopRequested())

    if threading.current_thread() is not threading.main_thread():  # it gets no signals
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def finish(run: Run, timeout: float) -> None:
    """Search, select, test, export and report; each step resumes what an earlier session has done.

    Args:
        run: The run.
        timeout: Of the search, in seconds.
    """
    shows = _throttled(_announce_best, BEST_EVERY), _throttled(draw_report, REPORT_EVERY)
    search(run, timeout, shows)
    result, recipe = conclude(run)
    replace_text(run.folder / "recipe.yaml", recipe.to_yaml())
    checkpoint = run.folder / "checkpoint"
    card = model_card(run.folder.name, run.spec, recipe, result)
    if is_export_of(checkpoint, recipe):
        replace_text(checkpoint / CARD, card)
    else:
        shutil.rmtree(checkpoint, ignore_errors=True)
        save_checkpoint(run, recipe, checkpoint, card)
    replace_text(run.folder / "result.json", result.model_dump_json(indent=2) + "\n")
    _sample_test_items(run, result)
    draw_report(run)
    run.listener(RunFinished(result, run.folder))


def _throttled(work: Callable[[Run], None], every: float) -> Callable[[Run], None]:
    """Return ``work``, left out where it ended less than ``every`` seconds ago.

    It is left out for longer where it would take more than ``SHOWING_SHARE`` of the time.
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
    """Announce the trial with the best posterior mean; a failure of this stops no run."""
    with suppress(Exception):
        candidates, posterior = run.posterior()
        best = posterior.ranked([one.trial.violation for one in candidates])[0]
        run.listener(IncumbentChanged(candidates[best].trial, float(posterior.means[best])))


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
    """Write the run's page; a failure of this stops no run."""
    try:
        page = make_report(run.folder, run.store)
        replace_text(run.folder / "report.html", page)
    except Exception as error:  # whatever it is
        run.listener(Note(f"there is no report.html: {error}"))


def is_export_of(checkpoint: Path, recipe: Recipe) -> bool:
    """Return whether a folder holds the checkpoint of this recipe."""
    file = checkpoint / "mergekit_config.yml"
    return file.is_file() and load_recipe(file)[0].key == recipe.key


def save_checkpoint(run: Run, recipe: Recipe, out: Path, card: str) -> None:
    """Export a recipe, and say how its rebuilt answers compare with those in the database."""
    run.listener(Stage(f"saving {out}"))
    compared, differing, machine = run.evaluator.export(recipe, out, card)
    if not out.is_dir():
        run.listener(Note(f"{out} lies on the machine {machine}, whose worker has written it"))
    text = f"rebuilt: all {compared} answers are those in the database"
    if differing:
        text = (
            f"rebuilt: {compared - differing} of {compared} answers are those in the database, the "
            "others differ as rounding does (another machine, or smaller batches)"
        )
    run.listener(Stage(text))
