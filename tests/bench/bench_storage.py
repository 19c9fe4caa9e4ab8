"""What a long run costs its coordinator: seconds, one JSON line a sampler.

    PYTHONPATH=tests/support python tests/bench/bench_storage.py [--trials 10000] [--items 1000]
        [--samplers gp,tpe]

A database is written as if all these trials had been evaluated on all search items, and a run is
opened on it: its race is rebuilt, two more trials are proposed and told, it is concluded with
simulated workers, concluded again from what is stored, and its report is drawn.
"""

import argparse
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, distribution_to_json
from typing_extensions import override

from landscape import planted
from search.preparing.context import StudyContext
from search.proposing.gp import fit_kernel
from search.proposing.recipes import to_recipe
from search.proposing.space import Space
from search.proposing.starts import warm_starts
from search.running.conclusion import conclude
from search.running.run import Run
from search.running.search_loop import search
from search.running.workers import EvalJob, EvalReply
from search.showing.report import make_report
from search.storing.folder import DATABASE
from search.storing.result import write_result
from search.storing.store import Store
from simulated import SimulatedWorkers, ignore, simulated_context

BLOCK = 20


@dataclass
class Stopwatch(SimulatedWorkers):
    """A simulated worker that notes when it is given each job and when it has replied."""

    submitted: list[float] = field(default_factory=list)
    replied: list[float] = field(default_factory=list)

    @override
    def submit(self, worker: int, job: EvalJob) -> None:
        self.submitted.append(time.perf_counter())
        super().submit(worker, job)

    @override
    def next(self) -> tuple[int, EvalReply | Exception]:
        outcome = super().next()
        self.replied.append(time.perf_counter())
        return outcome


def make_context(sampler: str, items: int, trials: int) -> StudyContext:
    counts = {"search": items, "select": 200, "test": 400}
    search = {"trials": trials, "sampler": sampler, "stop": False}
    return simulated_context(planted(0), 0, counts, search=search, objective={"block": BLOCK})


def write(file: Path, context: StudyContext, trials: int) -> None:
    """Write the tables as that many trials, each evaluated on all items, would have left them."""
    generator, size = np.random.default_rng(1), len(context.splits.search)
    weights, tasks = context.weights, np.array(context.tasks_of("search"))
    share = np.array([weights[task] / (tasks == task).sum() for task in tasks])
    rows: dict[str, list[tuple[Any, ...]]] = {}

    def add(table: str, *row: Any) -> None:
        rows.setdefault(table, []).append(row)

    warm = len(warm_starts(context.space))
    for number in range(trials):
        values = (generator.random(size) < generator.uniform(0.2, 0.6)).astype(float)
        point, recipe, of = drawn(context.space, generator), f"recipe {number}", number + 1
        noted = {"recipe": recipe, "variance": 0.24 / size, "items": size, "told": number}
        noted["tasks"] = {task: [0.5, 0.001] for task in weights}
        if number < warm:
            noted["start"] = warm_starts(context.space)[number][0]
            point = warm_starts(context.space)[number][1]
        add("trials", of, number, 1, "COMPLETE", *2 * ["2026-01-01 00:00:00.000000"])
        add("trial_values", None, of, 0, float(values @ share / sum(weights.values())), "FINITE")
        for name, distribution in context.space.distributions.items():
            value = distribution.to_internal_repr(point[name])
            add("trial_params", None, of, name, value, distribution_to_json(distribution))
        for key, attribute in noted.items():
            add("trial_user_attributes", None, of, key, json.dumps(attribute))
        add("trial_system_attributes", None, of, "gain", "1.0")
        key = to_recipe(context.space, point).key
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
    context = make_context(sampler, options.items, options.trials + 2)
    Store(folder / DATABASE)
    write(folder / DATABASE, context, options.trials)
    workers, finished = Stopwatch(context.objective), list[tuple[float, float]]()

    def note(run: Run) -> None:
        finished.append((time.perf_counter(), run.seconds()["ask"]))

    with clocked(found, "open"):
        run = Run(folder, context, workers, ignore)
        run.bind_to_store()
    start = time.perf_counter()
    search(run, after_trial=[note])
    (first, ask), (_, ask_both) = finished
    found |= {
        "rebuild": workers.submitted[0] - start - ask,
        "ask": ask,
        "ask_again": ask_both - ask,
        "tell": first - max(end for end in workers.replied if end < first),
    }
    found = {name: round(seconds, 2) for name, seconds in found.items()}
    for name in ("conclude", "conclude_again"):
        fit_kernel.cache_clear()
        with clocked(found, name):
            result, _ = conclude(run)
    write_result(folder, result, {})
    fit_kernel.cache_clear()
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
