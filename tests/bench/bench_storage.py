"""What a long run costs its coordinator: seconds, one JSON line a sampler.

    python tests/bench/bench_storage.py [--trials 10000] [--items 1000] [--samplers gp,tpe]

A database is written as if all these trials had answered all items, and a run opened on it: made
(with its race as it was), asked for two more trials, told one of them, concluded with a worker
that answers at once, concluded again from what is stored, and its page drawn.
"""

import argparse
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, distribution_to_json
from rich.console import Console

from landscape import planted
from objectives.base import Item, ItemResult, ItemSnapshot
from objectives.items import SPLITS, Splits
from search.preparing.context import StudyContext
from search.proposing.gp import fitted
from search.proposing.recipes import to_recipe
from search.proposing.space import Space
from search.proposing.starts import warm_starts
from search.running.conclusion import conclude
from search.running.events import SearchStarted
from search.running.run import Run
from search.running.workers import EvalJob, EvalReply
from search.showing.report import make_report
from search.showing.terminal import Terminal
from search.storing.folder import DATABASE
from search.storing.store import Store
from search.study.reading import parse_study

BLOCK = 20


class Questions:
    """Items that nobody is really asked."""

    def __init__(self, tasks: list[str], weights: dict[str, float]) -> None:
        self.items = [Item(task, f"{place:x}", place) for place, task in enumerate(tasks)]
        self.tasks = weights

    def snapshots(self, items: Any) -> list[ItemSnapshot]:
        return [ItemSnapshot(str(number), "") for number in items]


class Prompt:
    """A worker that answers at once, and by chance."""

    count = 1

    def __init__(self) -> None:
        self.jobs: list[EvalJob] = []
        self.luck = np.random.default_rng(0)

    def submit(self, place: int, job: EvalJob) -> None:
        self.jobs.append(job)

    def next(self) -> tuple[int, EvalReply]:
        drawn = self.luck.integers(2, size=len(self.jobs[-1].items)).tolist()
        self.jobs.pop()
        return 0, EvalReply([ItemResult(float(value)) for value in drawn], 0.0, 0.0)


def make_context(sampler: str, items: int) -> StudyContext:
    landscape, generator = planted(0), np.random.default_rng(0)
    space, sizes = landscape.space, {"search": items, "select": 200, "test": 400}
    tasks = [task for split in SPLITS for task in landscape.draw(sizes[split], generator).tasks]
    ends = np.cumsum([0, *(sizes[split] for split in SPLITS)]).tolist()
    splits = {
        split: tuple(range(*part)) for split, part in zip(SPLITS, pairwise(ends), strict=True)
    }
    study = {
        "base_model": space.base,
        "models": list(space.donors),
        "search": {"methods": list(space.methods), "trials": 10**6, "sampler": sampler},
        "objective": {"tasks": [{"task": task} for task in landscape.weights], "block": BLOCK},
    }
    spec = parse_study(study, Path(), "simulated")
    return StudyContext(
        spec, Questions(tasks, dict(landscape.weights)), Splits(**splits), space, {}
    )


def write(file: Path, bench: StudyContext, trials: int) -> None:
    """The tables as that many trials would have left them, each of which answered everything."""
    generator, size = np.random.default_rng(1), len(bench.splits.search)
    weights, tasks = bench.weights, np.array(bench.tasks_of("search"))
    share = np.array([weights[task] / (tasks == task).sum() for task in tasks])
    rows: dict[str, list[tuple[Any, ...]]] = {}

    def add(table: str, *row: Any) -> None:
        rows.setdefault(table, []).append(row)

    warm = len(warm_starts(bench.space))
    for number in range(trials):
        values = (generator.random(size) < generator.uniform(0.2, 0.6)).astype(float)
        point, recipe, of = drawn(bench.space, generator), f"recipe {number}", number + 1
        noted = {"recipe": recipe, "variance": 0.24 / size, "items": size, "told": number}
        noted["tasks"] = {task: [0.5, 0.001] for task in weights}
        if number < warm:
            noted["start"] = warm_starts(bench.space)[number][0]
            point = warm_starts(bench.space)[number][1]
        add("trials", of, number, 1, "COMPLETE", *2 * ["2026-01-01 00:00:00.000000"])
        add("trial_values", None, of, 0, float(values @ share / sum(weights.values())), "FINITE")
        for name, distribution in bench.space.distributions.items():
            value = distribution.to_internal_repr(point[name])
            add("trial_params", None, of, name, value, distribution_to_json(distribution))
        for key, attribute in noted.items():
            add("trial_user_attributes", None, of, key, json.dumps(attribute))
        add("trial_system_attributes", None, of, "gain", "1.0")
        key = to_recipe(bench.space, point).key
        for block in range(0, size, BLOCK):
            asked = json.dumps(values[block : block + BLOCK].tolist())
            none = json.dumps([None] * BLOCK)
            counts = json.dumps([0] * BLOCK)
            at = block // BLOCK
            add("mergesearch_answers", 1, key, "search", at, BLOCK, asked, none, none, counts, 0.1)
    with sqlite3.connect(file) as database:
        for table, of_table in rows.items():
            marks = ",".join("?" * len(of_table[0]))
            database.executemany(f"insert or ignore into {table} values ({marks})", of_table)


def drawn(space: Space, generator: np.random.Generator) -> dict[str, Any]:
    return {
        name: of.choices[generator.integers(len(of.choices))]
        if isinstance(of, CategoricalDistribution)
        else generator.uniform(of.low, of.high)
        for name, of in space.distributions.items()
    }


@contextmanager
def clocked(found: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    found[name] = round(time.perf_counter() - start, 2)


def measure(folder: Path, sampler: str, options: argparse.Namespace) -> dict[str, float]:
    found: dict[str, float] = {}
    bench = make_context(sampler, options.items)
    Store(folder / DATABASE)
    write(folder / DATABASE, bench, options.trials)
    with clocked(found, "open"):
        run = Run(folder, bench, Prompt(), Terminal(Console(quiet=True)))
        run.bind_to_store()
    with clocked(found, "rebuild"):
        run._enqueue_warm_starts()
        run._try_baselines()
        race = run._race()
        run.listener(SearchStarted(run.spec.search.trials, run.log.finished(), 0, 0))
    with clocked(found, "ask"):
        run._goes_on(np.inf)
        turn = run._begin()
    with clocked(found, "ask_again"):
        run._goes_on(np.inf)
        run._begin()
    run.scorer.begin(turn.recipe, "search", 0)
    run.scorer.finish()
    with clocked(found, "tell"):
        turn.sheet = run.sheet(turn.recipe, "search", 1)
        run._tell(turn, race)
    for name in ("conclude", "conclude_again"):
        fitted.cache_clear()
        with clocked(found, name):
            result, _ = conclude(run)
    (folder / "result.json").write_text(result.model_dump_json())
    fitted.cache_clear()
    with clocked(found, "report"):
        make_report(folder, run.store)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--samplers", default="gp,tpe")
    options = parser.parse_args()
    for sampler in options.samplers.split(","):
        with TemporaryDirectory() as folder:
            print(json.dumps({"sampler": sampler, **measure(Path(folder), sampler, options)}))


if __name__ == "__main__":
    main()
