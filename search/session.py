"""A session of a run: check everything, then lock the run folder and work on the run.

optuna, SQLAlchemy and scipy take a second to import, so functions import them where needed: errors
in the study are reported before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from merge_engine.errors import MergeError
from merge_engine.models.memory_plan import MemoryPlan
from objectives.base import ObjectiveError
from search.options import SessionOptions
from search.preparing.context import StudyContext, load, load_outline, plan_study
from search.preparing.cost import describe_cost
from search.preparing.models import Hardware
from search.process import collector_paused
from search.running.events import Listener, Note, PlanReady
from search.running.ray_workers import Cluster, RayWorkers, import_ray
from search.running.workers import LocalWorker, Workers
from search.storing.folder import check_folder, check_run_folder, has_run, locked, set_aside
from search.study.spec import StudyError, StudySpec

if TYPE_CHECKING:
    from search.running.run import Run


@contextmanager
def prefix_errors(file: Path) -> Iterator[None]:
    """Prefix errors raised inside with the name of the study or recipe file."""
    try:
        yield
    except (MergeError, ObjectiveError, StudyError) as error:
        if str(file) in str(error):
            raise
        raise type(error)(f"{file}: {error}") from error


def choose_device(device: str | None = None, *, elsewhere: bool = False) -> str:
    """Return the named device, else the first GPU if there is one, else the CPU.

    With ``elsewhere`` it is a device of other machines and is not checked here.

    Raises:
        StudyError: This machine does not have it.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not elsewhere:
        try:
            made = torch.empty(0, device="cuda" if device == "auto" else device)
            if made.is_meta:  # a device without numbers
                raise RuntimeError("no such device")
        except (AssertionError, RuntimeError) as error:
            reason = str(error).split(". ")[0].splitlines()[0]
            if reason.startswith("Expected one of"):  # all the kinds that torch has a word for
                reason = "no such device"
            raise StudyError(f"--device {device!r}: {reason}; use cpu, cuda or cuda:1") from None
    return device


@dataclass(frozen=True)
class Session:
    """One process's work on a run."""

    spec: StudySpec  # the study
    folder: Path  # the run folder
    options: SessionOptions  # database, hardware and workers
    listener: Listener  # receives every event
    source: Path  # file or folder that errors about the study name
    searches: bool = False  # whether it searches, and so announces notes and cost

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
            from search.pipeline import work_on

            if not folder.exists():  # no folder is made for donors with NaN or Inf
                workers.call("check_finite")
            with locked(folder):
                if new:
                    set_aside(folder)
                work_on(folder, url, context, workers, self.listener, work)
        finally:
            workers.close()

    def _check_storage(self) -> None:
        """Refuse a database that cannot be opened, or that has another study for this folder."""
        from search.storing.address import Storage
        from search.storing.resume import check_run

        new = self.options.force_new
        storage = Storage.of(self.folder, self.options.storage, new=new)
        storage.check(self.folder)
        if not new:
            check_run(self.folder, self.spec, storage)

    def _prepare(self) -> tuple[StudyContext, Workers]:
        """Return the coordinator's context, and its workers: this process, or Ray's."""
        options = self.options

        def say(line: str | MemoryPlan) -> None:
            self.listener(PlanReady(line))

        device = choose_device(options.device, elsewhere=options.workers is not None)
        hardware = Hardware(device, options.memory, options.compiled, offload=options.offload)
        if options.offload and options.workers is not None:
            raise StudyError("--offload is for a live model in this process; leave out --workers")
        if options.workers is not None:
            import_ray()  # where it is missing, that is said before anything is prepared
        with prefix_errors(self.source), collector_paused():
            plan = plan_study(self.spec, compiled=options.compiled)
            notes = plan.notes() if self.searches else []
            if options.workers is None:
                context = load(plan, hardware, say)
            else:
                outline = load_outline(plan)
        if self.searches:
            for note in notes:
                self.listener(Note(note))
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
