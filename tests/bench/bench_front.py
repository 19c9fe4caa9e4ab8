"""How much of a front a search finds for its item evaluations: one JSON line per system.

    PYTHONPATH=tests/support python tests/bench/bench_front.py [--systems front,nsga2]
        [--landscapes demo] [--seeds 10] [--budget 8000]

``demo`` is the demo's tabulated landscape with its tasks as objectives, which hardly conflict;
``conflict`` has two objectives whose best recipes are far apart. ``front`` searches as a study with
``search.front`` does, ``mean`` as one without, ``random`` by random points and all search items;
``nsga2`` and ``ehvi`` are Optuna's NSGA-II and Gaussian process (expected hypervolume improvement),
with our warm starts and all search items. All choose their front in the same way. ``volume`` is the
share of the objectives' box in which a point is beaten by the front's true values. The box of
``demo`` lies between the worst donor's and the best tabulated value of each task, that of
``conflict`` between floor and top.
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol

import numpy as np
import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler

from landscape import LANDSCAPES, Bits, Floats, Items, Landscape, Planted, Tabulated
from merge_engine.recipe.recipe import Recipe
from objectives.scores import Interval
from replay import Export, System, replay
from rivals import StockFront
from search.proposing.starts import baselines
from search.running.conclusion import find_front
from search.running.run import Run


class Front:
    """The run's own choice of a Pareto front, as finalists."""

    def cost(self, run: Run) -> int:
        return 0

    def select(self, run: Run) -> Export:
        front = tuple(run.recipe_of(one.trial) for one in find_front(run))
        unknown = math.nan  # nothing is reported
        return Export(front[0], Interval(unknown, unknown, unknown), finalists=front)


def stock(make: Callable[[int], BaseSampler]) -> Callable[[int], System]:
    """Search with a sampler of Optuna's for so many objectives."""
    return lambda count: System(
        lambda space, seed: StockFront(make, space, seed, count), Front(), raced=False
    )


SYSTEMS: Mapping[str, Callable[[int], System]] = {
    "front": lambda _: System("gp", Front(), front=True),
    "mean": lambda _: System("gp", Front()),
    "random": lambda _: System("random", Front(), raced=False),
    "nsga2": stock(lambda seed: NSGAIISampler(seed=seed, population_size=10)),
    "ehvi": stock(lambda seed: GPSampler(seed=seed)),
}


class Objectives(Protocol):
    """A landscape with the true score in each of its objectives."""

    landscape: Landscape
    box: tuple[Floats, Floats]

    def by_task(self, recipe: Recipe) -> Floats:
        """Return the true score in each objective."""


class Demo:
    """Tasks of the demo."""

    def __init__(self, seed: int) -> None:
        table = LANDSCAPES["demo"](seed)
        assert isinstance(table, Tabulated)
        self.landscape = self.table = table
        donors = [baselines(table.space)[donor] for donor in table.space.donors]
        known = np.array([self.by_task(recipe) for recipe in table.recipes])
        self.box = np.array([self.by_task(r) for r in donors]).min(axis=0), known.max(axis=0)

    def by_task(self, recipe: Recipe) -> Floats:
        answers, tasks = self.table.answers(recipe), self.table.tasks
        return np.array([answers[tasks == task].mean() for task in self.table.weights])


@dataclass(frozen=True)
class ConflictItems:
    """Items of either objective alternately."""

    objectives: tuple[Items, Items]
    tasks: tuple[str, ...]

    def answers(self, recipe: Recipe) -> Bits:
        first = np.array(self.tasks) == self.tasks[0]
        return np.where(first, *(one.answers(recipe) for one in self.objectives))


class Conflict:
    """Two planted objectives with the same methods, their tops mirrored."""

    weights: Mapping[str, float] = {"x": 1.0, "y": 1.0}

    def __init__(self, seed: int) -> None:
        one = LANDSCAPES["planted"](seed)
        assert isinstance(one, Planted)
        centres = {m: (*(1.4 - np.array(at[:3])), *at[3:]) for m, at in one.centres.items()}
        self.objectives = one, replace(one, centres=centres, seed=seed + 1000)
        self.space, self.landscape, self.best = one.space, self, one.best
        self.box = np.full(2, one.floor), np.full(2, one.best)

    def by_task(self, recipe: Recipe) -> Floats:
        return np.array([one.truth(recipe) for one in self.objectives])

    def truth(self, recipe: Recipe) -> float:
        return float(self.by_task(recipe).mean())

    def draw(self, count: int, generator: np.random.Generator) -> ConflictItems:
        one, other = (each.draw(count, generator) for each in self.objectives)
        return ConflictItems((one, other), ("x", "y") * (count // 2))


CASES = {"demo": Demo, "conflict": Conflict}


def volume(front: Floats, low: Floats, high: Floats) -> float:
    """The share of the box (tasks) that points of a front (n, tasks) beat."""
    points = np.random.default_rng(0).uniform(low, high, (20_000, len(low)))
    return float((points[:, None] <= front[None]).all(axis=2).any(axis=1).mean())


def main() -> None:
    """Replay and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--landscapes", default=",".join(CASES))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget", type=int, default=8000)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for name, system in product(options.landscapes.split(","), options.systems.split(",")):
        volumes = []
        for seed in range(options.seeds):
            objectives = CASES[name](seed)
            searched = SYSTEMS[system](len(objectives.landscape.weights))
            (end,) = replay(searched, objectives.landscape, seed, [options.budget])
            truth = np.array([objectives.by_task(recipe) for recipe in end.export.finalists])
            volumes.append(volume(truth, *objectives.box))
        line = {"landscape": name, "system": system, "budget": options.budget}
        quartiles = np.quantile(volumes, [0.25, 0.5, 0.75]).round(4).tolist()
        print(json.dumps(line | {"seeds": options.seeds, "volume": quartiles}), flush=True)


if __name__ == "__main__":
    main()
