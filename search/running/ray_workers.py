"""Workers that are processes of their own, on several devices and machines, through Ray.

Each is a Ray actor with a live model of its own. It finds models, tasks and the run folder where
the coordinator does: in a file system they share, or in the hub. An actor that dies is replaced.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from merge_engine.models.memory_plan import MemoryPlan
from merge_engine.recipe.recipe import Recipe
from objectives.base import ItemResult, Response
from objectives.entries import PromptEntry
from search.preparing.context import load, plan_study
from search.preparing.models import Hardware
from search.process import quiet_libraries
from search.running.workers import FAILURES, EvalJob, EvalReply, ExportCheck, Worker, WorkerDied
from search.study.spec import StudyError, StudySpec

STORE_BYTES: Final = 1 << 27  # Ray's own memory: it passes recipes and answers alone
LOADS: Final = 3  # in a row that a worker may die of
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cluster:
    """Of which machines.

    Args:
        address: To join it; None: this machine alone.
        verbose: Show what Ray and the workers' libraries print.
    """

    address: str | None = None
    verbose: bool = False


class _Actor:
    """A worker in its own process. Its warnings go to the coordinator with its next reply.

    What libraries print is in Ray's log files.
    """

    def __init__(self) -> None:
        self._notes: list[str] = []
        self._heard = ExitStack()  # for the whole process
        self._heard.enter_context(quiet_libraries(self._notes.append, verbose=True))

    def node(self) -> str:
        """The machine it is on."""
        return str(import_ray().get_runtime_context().get_node_id())

    def load(self, spec: StudySpec, hardware: Hardware, threads: int) -> list[MemoryPlan | str]:
        """Load the study; returns the memory plan and how merges are run."""
        torch.set_num_threads(threads)
        said: list[MemoryPlan | str] = []
        try:
            plan = plan_study(spec, compiled=hardware.compiled)
            self.worker = Worker(load(plan, hardware, said.append))
        except FAILURES as error:  # it is no candidate's
            raise StudyError(str(error)) from error
        return said

    def ask(self, job: EvalJob) -> EvalReply:
        reply = self.worker.ask(job)
        notes = [*self._notes]
        self._notes.clear()
        return replace(reply, notes=notes)

    def save(
        self,
        recipe: Recipe,
        asked: Sequence[tuple[EvalJob, Sequence[ItemResult]]],
        out: Path,
        card: str,
    ) -> ExportCheck:
        return self.worker.save(recipe, asked, out, card)

    def say(self, recipe: Recipe, asked: Sequence[int] | PromptEntry) -> list[Response]:
        return self.worker.say(recipe, asked)

    def look_through(self) -> None:
        self.worker.bench.builder.model_set.check_finite()


class RayWorkers:
    """Workers of one study on a Ray cluster, or on this machine's devices.

    Args:
        spec: The study.
        machine: What each may use.
        count: How many.
        gpus: For each, a share of one also; None: one if there are any.
        cluster: They are on.
        say: Is told what each will take.

    Raises:
        StudyError: Ray is missing, the cluster has not what they need, or they cannot load.
    """

    def __init__(
        self,
        spec: StudySpec,
        machine: Hardware,
        *,
        count: int,
        gpus: float | None = None,
        cluster: Cluster | None = None,
        say: Callable[[str | MemoryPlan], None] = lambda _: None,
    ) -> None:
        self.count = count
        self._ray = import_ray()
        _connect(count, cluster or Cluster())
        resources = self._ray.cluster_resources()
        gpus = gpus if gpus is not None else float(machine.device != "cpu" and "GPU" in resources)
        self._threads = max(1, int(resources["CPU"] // count))
        cpus = 1 if gpus else self._threads
        for kind, needed in (("GPU", gpus * count), ("CPU", cpus * count)):
            if needed > resources.get(kind, 0):
                raise StudyError(
                    f"--workers {count}: they need {needed:g} {kind}s and there are "
                    f"{resources.get(kind, 0):g}; use fewer workers, or a larger cluster"
                )
        device = "cpu" if not gpus else "cuda" if gpus <= 1 else "auto"
        self._spec, self._machine = spec, replace(machine, device=device)
        self._actor = self._ray.remote(num_cpus=cpus, num_gpus=gpus)(_Actor)
        self._at_work: dict[Any, tuple[int, EvalJob]] = {}
        self._failed_loads = Counter[int]()
        self._actors = [self._actor.remote() for _ in range(count)]
        nodes = [self._result(node) for node in [actor.node.remote() for actor in self._actors]]
        self._sharers = [nodes.count(node) for node in nodes]
        self._loaded = [self._load(place) for place in range(count)]
        plan, *_ = [self._result(loaded) for loaded in self._loaded]
        for line in (f"{count} workers, {gpus:g} GPUs and {self._threads} threads each", *plan):
            say(line)

    def submit(self, place: int, job: EvalJob) -> None:
        """Give an idle worker a job; one that is being replaced does it when it has loaded."""
        self._at_work[self._actors[place].ask.remote(job)] = place, job

    def next(self) -> tuple[int, EvalReply | Exception]:
        """Wait for a job to end; see ``Workers``.

        Raises:
            StudyError: A worker cannot be replaced.
        """
        while True:
            (done, *_), _ = self._ray.wait([*self._at_work], num_returns=1)
            place, job = self._at_work.pop(done)
            try:
                self._result(self._loaded[place])
                reply = self._result(done)
                for note in reply.notes:
                    _LOG.warning("%s", note)
                return place, reply
            except FAILURES as error:
                return place, error
            except WorkerDied as error:
                if self._replace(place):
                    return place, error
                self.submit(place, job)  # it had not begun

    def save(
        self,
        recipe: Recipe,
        asked: Sequence[tuple[EvalJob, Sequence[ItemResult]]],
        out: Path,
        card: str,
    ) -> ExportCheck:
        """As ``Worker.save``, by the first."""
        saved: ExportCheck = self._by_first(
            lambda actor: actor.save.remote(recipe, asked, out, card)
        )
        return saved

    def say(self, recipe: Recipe, asked: Sequence[int] | PromptEntry) -> list[Response]:
        """As ``Worker.say``, by the first."""
        said: list[Response] = self._by_first(lambda actor: actor.say.remote(recipe, asked))
        return said

    def look_through(self) -> None:
        """Read all donors."""
        self._by_first(lambda actor: actor.look_through.remote())

    def close(self) -> None:
        """End the workers, and Ray where it was started for them."""
        self._ray.shutdown()

    def _by_first(self, call: Callable[[Any], Any]) -> Any:
        """What a call to the first worker returns; made once more if it dies of it."""
        try:
            return self._result(call(self._actors[0]))
        except WorkerDied:
            self._replace(0)
            return self._result(call(self._actors[0]))

    def _load(self, place: int) -> Any:
        machine = replace(self._machine, sharers=self._sharers[place])
        return self._actors[place].load.remote(self._spec, machine, self._threads)

    def _replace(self, place: int) -> bool:
        """Put a new worker in the place of one that died; whether that one had loaded."""
        try:
            self._result(self._loaded[place])
            self._failed_loads[place] = 0
            had_loaded = True
        except WorkerDied as error:
            self._failed_loads[place] += 1
            had_loaded = False
            if self._failed_loads[place] == LOADS:
                raise StudyError(f"{error}, {LOADS} times while it loaded") from None
        self._ray.kill(self._actors[place])  # out of reach is not always gone
        self._actors[place] = self._actor.remote()
        self._loaded[place] = self._load(place)
        return had_loaded

    def _result(self, reference: Any) -> Any:
        """What a worker's call returned.

        Raises:
            WorkerDied: It ended.
        """
        failed = self._ray.exceptions.RayTaskError
        try:
            return self._ray.get(reference)
        except failed as error:
            if isinstance(error.cause, (*FAILURES, StudyError)):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayError as error:
            raise WorkerDied(f"a worker died: {str(error).splitlines()[0]}") from None


def import_ray() -> Any:
    """The package.

    Raises:
        StudyError: It is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    try:
        import ray
    except ModuleNotFoundError:
        raise StudyError("--workers needs Ray: pip install 'mergesearch[ray]'") from None
    return ray


def _connect(count: int, cluster: Cluster) -> None:
    """Join a cluster, or start one of this machine alone."""
    ray = import_ray()
    options: dict[str, Any] = {"address": cluster.address}
    if cluster.address is None:
        cores = len(os.sched_getaffinity(0))
        options = {"address": "local", "include_dashboard": False, "num_cpus": max(cores, count)}
        options["object_store_memory"] = STORE_BYTES
    try:
        level = "WARNING" if cluster.verbose else "CRITICAL"
        ray.init(**options, logging_level=level, log_to_driver=cluster.verbose)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise StudyError(f"--ray-address {cluster.address}: {error}") from None
