"""Workers in separate processes, on several devices and machines, through Ray.

Each is a Ray actor with a live model of its own. It finds models, tasks and the run folder where
the coordinator does: in a file system they share, or on the Hub. An actor that dies is replaced.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from typing_extensions import override

from merge_engine.errors import reason
from merge_engine.models.memory_plan import MemoryPlan
from merge_engine.out_of_memory import is_out_of_memory, shortage
from search.preparing.context import load, plan_study
from search.preparing.models import Hardware
from search.process import quiet_libraries
from search.running.workers import FAILURES, Job, Reply, Worker, WorkerDied, Workers
from search.study.spec import StudyError, StudySpec

STORE_BYTES: Final = 1 << 27  # Ray's object store: only recipes and results pass through it
MAX_LOADS: Final = 3  # consecutive deaths of a worker while loading, at most
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cluster:
    """The machines that workers run on."""

    address: str | None = None  # of a Ray cluster to join; None: this machine alone
    verbose: bool = False  # show what Ray and the workers' libraries print


class _Actor:
    """A worker in its own process. Its warnings go to the coordinator with its next reply.

    Output of libraries goes to Ray's log files.
    """

    def __init__(self) -> None:
        self._notes: list[str] = []
        self._heard = ExitStack()  # for the whole process
        self._heard.enter_context(quiet_libraries(self._notes.append, verbose=True))

    def node(self) -> str:
        """Return the id of the machine it is on."""
        return str(import_ray().get_runtime_context().get_node_id())

    def load(self, spec: StudySpec, hardware: Hardware, threads: int) -> list[MemoryPlan | str]:
        """Load the study; return the memory plan and how merges are run."""
        torch.set_num_threads(threads)
        lines: list[MemoryPlan | str] = []
        try:
            plan = plan_study(spec, compiled=hardware.compiled)
            self.worker = Worker(load(plan, hardware, lines.append))
        except FAILURES as error:  # not a candidate's: fatal
            raise StudyError(str(error)) from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise StudyError(
                f"{shortage(error)} when a worker loaded the study; use fewer workers, or another "
                "--device or --memory"
            ) from None
        return lines

    def do(self, job: Job) -> Reply:
        try:
            reply = self.worker.do(job)
        except torch.AcceleratorError:
            os._exit(1)  # the device is unusable in this process: a new one takes over
        notes = [*self._notes]
        self._notes.clear()
        return replace(reply, notes=notes)

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.worker, method)(*args)


class RayWorkers(Workers):
    """Workers of one study on a Ray cluster, or on this machine's devices.

    Args:
        gpus: For each, or a share of one; None: one each if there are any.
        say: Receives the plan of the first one's memory, line by line.

    Raises:
        StudyError: Ray is missing, the cluster lacks what they need, or they cannot load.
    """

    def __init__(
        self,
        spec: StudySpec,
        hardware: Hardware,
        *,
        count: int,
        gpus: float | None = None,
        cluster: Cluster | None = None,
        say: Callable[[str | MemoryPlan], None] = lambda _: None,
    ) -> None:
        self._count = count
        self._ray = import_ray()
        _connect(count, cluster or Cluster())
        resources = self._ray.cluster_resources()
        gpus = gpus if gpus is not None else float(hardware.device != "cpu" and "GPU" in resources)
        self._threads = max(1, int(resources["CPU"] // count))
        cpus = 1 if gpus else self._threads
        for kind, needed in (("GPU", gpus * count), ("CPU", cpus * count)):
            if needed > resources.get(kind, 0):
                raise StudyError(
                    f"--workers {count}: they need {needed:g} {kind}s and there are "
                    f"{resources.get(kind, 0):g}; use fewer workers, or a larger cluster"
                )
        device = "cpu" if not gpus else "cuda" if gpus <= 1 else "auto"
        share = gpus if 0 < gpus < 1 else 1.0
        self._spec, self._hardware = spec, replace(hardware, device=device, share=share)
        self._actor = self._ray.remote(num_cpus=cpus, num_gpus=gpus)(_Actor)
        self._jobs: dict[Any, tuple[int, Job]] = {}  # by Ray's reference to the reply
        self._failed_loads = Counter[int]()
        self._actors = [self._actor.remote() for _ in range(count)]
        nodes = [self._result(node) for node in [actor.node.remote() for actor in self._actors]]
        self._sharers = [nodes.count(node) for node in nodes]
        self._loaded = [self._load(worker) for worker in range(count)]
        plan, *_ = [self._result(loaded) for loaded in self._loaded]
        for line in (f"{count} workers, {gpus:g} GPUs and {self._threads} threads each", *plan):
            say(line)

    @property
    @override
    def count(self) -> int:
        return self._count

    @override
    def submit(self, worker: int, job: Job) -> None:
        # A worker that is being replaced does the job when it has loaded.
        self._jobs[self._actors[worker].do.remote(job)] = worker, job

    @override
    def next(self) -> tuple[int, Reply | Exception]:
        while True:
            (done, *_), _ = self._ray.wait([*self._jobs], num_returns=1)
            worker, job = self._jobs.pop(done)
            try:
                self._result(self._loaded[worker])
                reply = self._result(done)
                for note in reply.notes:
                    _LOG.warning("%s", note)
                return worker, reply
            except FAILURES as error:
                return worker, error
            except WorkerDied as error:
                if self._replace(worker):
                    return worker, error
                self.submit(worker, job)  # it had not begun

    @override
    def call(self, method: str, *args: Any) -> Any:
        # On the first worker; once more if that dies.
        try:
            return self._result(self._actors[0].call.remote(method, *args))
        except WorkerDied:
            self._replace(0)
            return self._result(self._actors[0].call.remote(method, *args))

    @override
    def close(self) -> None:
        self._ray.shutdown()

    def _load(self, worker: int, *, joins: bool = False) -> Any:
        hardware = replace(self._hardware, sharers=self._sharers[worker], joins=joins)
        return self._actors[worker].load.remote(self._spec, hardware, self._threads)

    def _replace(self, worker: int) -> bool:
        """Start a new worker for one that died; return whether that one had loaded."""
        try:
            self._result(self._loaded[worker])
            self._failed_loads[worker] = 0
            had_loaded = True
        except WorkerDied as error:
            self._failed_loads[worker] += 1
            had_loaded = False
            if self._failed_loads[worker] == MAX_LOADS:
                raise StudyError(f"{error}, {MAX_LOADS} times while it loaded") from None
        self._ray.kill(self._actors[worker])  # it may be unreachable, but alive
        self._actors[worker] = self._actor.remote()
        self._loaded[worker] = self._load(worker, joins=had_loaded)
        return had_loaded

    def _result(self, reference: Any) -> Any:
        """Wait for what a worker's call returns."""
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
    """Import the package ray."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
    try:
        import ray
    except ModuleNotFoundError:
        raise StudyError("--workers needs Ray: pip install 'mergesearch[ray]'") from None
    return ray


def _connect(count: int, cluster: Cluster) -> None:
    """Join a cluster, or start one of this machine alone.

    Raises:
        StudyError: There is no cluster at the address, or Ray did not start in time.
    """
    ray = import_ray()
    options: dict[str, Any] = {"address": cluster.address}
    if cluster.address is None:
        cores = len(os.sched_getaffinity(0))
        options = {"address": "local", "include_dashboard": False, "num_cpus": max(cores, count)}
        options["object_store_memory"] = STORE_BYTES
    try:
        level = "WARNING" if cluster.verbose else "CRITICAL"
        ray.init(**options, logging_level=level, log_to_driver=cluster.verbose)
    except Exception as error:  # Ray raises bare ones where starting takes too long
        where = f"--ray-address {cluster.address}" if cluster.address else "Ray could not start"
        raise StudyError(f"{where}: {reason(error)}; try again, or run without --workers") from None
