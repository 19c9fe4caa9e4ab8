"""Studies without models: the real run on simulated workers, which know every recipe's scores.

A landscape (``tests/bench/landscape.py``) says which items a recipe's model answers correctly.
``simulated_context`` makes a study of it, ``simulated_run`` a run of that study.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from merge_engine.building.checksums import write_checksums
from merge_engine.building.export import RECIPE
from objectives.base import Item, ItemResult, ItemSnapshot, Response
from objectives.items import SPLITS, Splits
from search.preparing.context import StudyContext
from search.running.events import Event
from search.running.run import Run
from search.running.workers import EvalJob, EvalReply, ExportCheck, Workers
from search.storing.folder import CARD
from search.study.reading import parse_study

if TYPE_CHECKING:
    from landscape import Items, Landscape
    from merge_engine.recipe.recipe import Recipe
    from search.running.events import Listener
    from search.storing.store import Store

COUNTS = {"search": 240, "select": 200, "test": 360}


class SimulatedObjective:
    """Items whose scores are known for every recipe, in the order search, select, test.

    Args:
        drawn: A landscape's items, by split.
        weights: Of the tasks.
        prompt: Text of an item, by its number.
    """

    def __init__(
        self,
        drawn: Mapping[str, Items],
        weights: Mapping[str, float],
        prompt: Callable[[int], str] = "question {}".format,
    ) -> None:
        self.tasks, self.prompt = dict(weights), prompt
        self.items: list[Item] = []
        self.splits: dict[str, tuple[int, ...]] = {}
        self._drawn: list[tuple[Items, int]] = []  # of each item: its split, and its index there
        self._values: dict[tuple[str, int], Sequence[bool]] = {}
        for split in SPLITS:
            first, tasks = len(self.items), drawn[split].tasks
            self.splits[split] = tuple(range(first, first + len(tasks)))
            self.items += [Item(task, f"{first + n:x}", n) for n, task in enumerate(tasks)]
            self._drawn += [(drawn[split], n) for n in range(len(tasks))]

    def snapshots(self, items: Sequence[int]) -> list[ItemSnapshot]:
        return [ItemSnapshot(self.prompt(number), "right") for number in items]

    def results(self, recipe: Recipe, items: Sequence[int]) -> list[ItemResult]:
        """Score a recipe on the numbered items."""
        return [ItemResult(self._value(recipe, number)) for number in items]

    def responses(
        self, recipe: Recipe, items: Sequence[int], template: str | None
    ) -> list[Response]:
        """Return a text per item: its target where the recipe is right."""
        return [
            Response("right" if self._value(recipe, number) else "wrong", "right")
            for number in items
        ]

    def _value(self, recipe: Recipe, number: int) -> float:
        of_split, index = self._drawn[number]
        key = (recipe.key, id(of_split))
        if key not in self._values:
            self._values[key] = of_split.answers(recipe)
        return float(self._values[key][index])


@dataclass
class SimulatedWorkers(Workers):
    """Workers whose jobs take simulated time: building and an item take a recipe's own seconds.

    Attributes:
        objective: The items, and each recipe's scores.
        size: Number of workers.
        seed: Of the seconds.
        failure: Returns the exception that ends a job instead of its reply, or None.
        clock: The coordinator's own seconds, which count too; by default it takes none.
        now: Simulated seconds so far.
        busy: Seconds that workers were busy, summed.
        spent: Seconds of each recipe's jobs, by its key.
        jobs: All jobs submitted.
        most: Jobs at once, at most.
    """

    objective: SimulatedObjective
    size: int = 1
    seed: int = 0
    failure: Callable[[EvalJob], Exception | None] = lambda job: None
    clock: Callable[[], float] = lambda: 0.0
    now: float = 0.0
    busy: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    jobs: list[EvalJob] = field(default_factory=list)
    most: int = 0

    def __post_init__(self) -> None:
        self._under_way: list[tuple[float, int, EvalJob]] = []  # heap by the end of each job
        self._built: dict[int, str] = {}  # key of the recipe that each worker has built
        self._since = self.clock()

    @property
    @override
    def count(self) -> int:
        return self.size

    @override
    def submit(self, worker: int, job: EvalJob) -> None:
        self._count_coordinator()
        key = job.recipe.key
        of_recipe = np.random.default_rng([self.seed, int(key[:12], 16)])
        build, item = of_recipe.lognormal(0.0, 0.7), 0.1 * of_recipe.lognormal(0.0, 0.7)
        seconds = item * len(job.items) + (build if self._built.get(worker) != key else 0)
        self._built[worker] = key
        self.busy += seconds
        self.spent[key] = self.spent.get(key, 0.0) + seconds
        assert worker not in {busy for _, busy, _ in self._under_way}
        heapq.heappush(self._under_way, (self.now + seconds, worker, job))
        self.jobs.append(job)
        self.most = max(self.most, len(self._under_way))

    @override
    def next(self) -> tuple[int, EvalReply | Exception]:
        self._count_coordinator()
        end, worker, job = heapq.heappop(self._under_way)
        self.now = max(self.now, end)
        outcome = self.failure(job) or self.evaluate(worker, job)
        self._since = self.clock()  # looking scores up is the workers' work
        return worker, outcome

    def evaluate(self, worker: int, job: EvalJob) -> EvalReply | Exception:
        """Do a job."""
        return EvalReply(self.objective.results(job.recipe, job.items), 0.0, 0.0)

    def _count_coordinator(self) -> None:
        now = self.clock()
        self.now += now - self._since
        self._since = now

    @override
    def call(self, method: str, *args: Any) -> Any:
        calls = {"export": self._export, "respond": self.objective.responses}
        return calls[method](*args)

    def _export(
        self,
        recipe: Recipe,
        evaluated: Sequence[tuple[EvalJob, Sequence[ItemResult]]],
        out: Path,
        card: str,
    ) -> ExportCheck:
        pairs = [
            (new, old)
            for job, stored in evaluated
            for new, old in zip(self.objective.results(recipe, job.items), stored, strict=True)
        ]
        out.mkdir()
        (out / RECIPE).write_text(recipe.to_yaml())
        write_checksums(out)
        (out / CARD).write_text(card)
        return ExportCheck(len(pairs), sum(new != old for new, old in pairs), "here")

    @override
    def close(self) -> None:
        pass


def simulated_context(
    landscape: Landscape,
    seed: int | tuple[int, ...] = 0,
    counts: Mapping[str, int] = COUNTS,
    *,
    search: Mapping[str, Any] | None = None,
    objective: Mapping[str, Any] | None = None,
    prompt: Callable[[int], str] = "question {}".format,
) -> StudyContext:
    """Make a study of a landscape.

    Args:
        landscape: Its space is searched; its items are drawn for each split.
        seed: Of the items.
        counts: Items of each split.
        search: Settings of the search besides its methods.
        objective: Settings of the objective besides its tasks and items.
        prompt: Text of an item, by its number.
    """
    generator, space = np.random.default_rng(seed), landscape.space
    drawn = {split: landscape.draw(counts.get(split, 0), generator) for split in SPLITS}
    study = {
        "base_model": space.base,
        "models": list(space.donors),
        "search": {"methods": list(space.methods), **(search or {})},
        "objective": {
            "tasks": [{"task": task, "weight": w} for task, w in landscape.weights.items()],
            "items": dict(counts),
            **(objective or {}),
        },
    }
    spec = parse_study(study, Path("/nowhere"), "simulated")
    items = SimulatedObjective(drawn, landscape.weights, prompt)
    return StudyContext(spec, items, Splits(**items.splits), space, {})


def ignore(event: Event) -> None:
    """Listen to nothing."""


def simulated_run(
    folder: Path,
    context: StudyContext,
    workers: Workers | None = None,
    listener: Listener = ignore,
    store: Store | None = None,
) -> Run:
    """Begin or resume a run in a folder, with one simulated worker unless others are given."""
    folder.mkdir(exist_ok=True)
    run = Run(folder, context, workers or SimulatedWorkers(context.objective), listener, store)
    run.bind_to_store()
    return run
