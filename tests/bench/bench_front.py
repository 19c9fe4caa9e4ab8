"""How much of a front a search finds for its item evaluations: one JSON line per system.

    python tests/bench/bench_front.py [--systems front,nsga2] [--landscapes demo] [--seeds 10]
        [--budget 8000]

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, Protocol

import numpy as np
import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler

from landscape import LANDSCAPES, Bits, Floats, Items, Landscape, Planted, Tabulated
from merge_engine.recipe.recipe import Recipe
from replay import Candidate, Raced, Replay, StudySampler
from rivals import StockFront
from search.proposing.gp import posterior_of
from search.proposing.recipes import to_recipe
from search.proposing.space import Point, Space
from search.proposing.starts import baselines
from search.racing.pareto import confirmed, posterior_front
from search.racing.race import STOP_BELOW, Estimate

FINALISTS = 8


class Proposer(Protocol):
    """Proposes a point, and is told its estimates."""

    def ask(self) -> Point:
        """The next point."""

    def tell(self, estimate: Estimate, by_task: Mapping[str, Estimate]) -> None:
        """What it is worth in the mean and in each task."""


@dataclass(frozen=True)
class System:
    """A sampler, made from a space, a seed and the number of objectives, and how it is raced.

    ``raced`` for one objective or for a front; None evaluates every candidate on all items.
    """

    proposer: Callable[[Space, int, int], Proposer]
    raced: Literal["mean", "front"] | None = None


def shipped(name: str, front: bool = False) -> Callable[[Space, int, int], Proposer]:
    """A sampler of ours."""
    return lambda space, seed, _: StudySampler(name, space, seed, front=front)


def stock(make: Callable[[int], BaseSampler]) -> Callable[[Space, int, int], Proposer]:
    """One of Optuna's."""
    return lambda space, seed, count: StockFront(make, space, seed, count)


SYSTEMS = {
    "front": System(shipped("gp", front=True), "front"),
    "mean": System(shipped("gp"), "mean"),
    "random": System(shipped("random")),
    "nsga2": System(stock(lambda seed: NSGAIISampler(seed=seed, population_size=10))),
    "ehvi": System(stock(lambda seed: GPSampler(seed=seed))),
}


class Objectives(Protocol):
    """A landscape with the true score in each of its objectives."""

    landscape: Landscape
    box: tuple[Floats, Floats]

    def truth(self, recipe: Recipe) -> Floats:
        """Return the true score in each objective."""


class Demo:
    """Tasks of the demo."""

    def __init__(self, seed: int) -> None:
        table = LANDSCAPES["demo"](seed)
        assert isinstance(table, Tabulated)
        self.landscape = self.table = table
        donors = [baselines(table.space)[donor] for donor in table.space.donors]
        known = np.array([self.truth(recipe) for recipe in table.recipes])
        self.box = np.array([self.truth(r) for r in donors]).min(axis=0), known.max(axis=0)

    def truth(self, recipe: Recipe) -> Floats:
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

    def truth(self, recipe: Recipe) -> Floats:
        return np.array([one.truth(recipe) for one in self.objectives])

    def draw(self, count: int, generator: np.random.Generator) -> ConflictItems:
        one, other = (each.draw(count, generator) for each in self.objectives)
        return ConflictItems((one, other), ("x", "y") * (count // 2))


CASES = {"demo": Demo, "conflict": Conflict}


def volume(front: Floats, low: Floats, high: Floats) -> float:
    """The share of the box (tasks) that points of a front (n, tasks) beat."""
    points = np.random.default_rng(0).uniform(low, high, (20_000, len(low)))
    return float((points[:, None] <= front[None]).all(axis=2).any(axis=1).mean())


def search(replay: Replay, system: str, budget: int) -> list[Candidate]:
    """Search until the budget is spent, and the candidates' front on fresh items."""
    space, weights, how = replay.space, replay.landscape.weights, SYSTEMS[system]
    proposer = how.proposer(space, replay.seed, len(weights))
    raced = Raced(stop_below=STOP_BELOW if how.raced else -1.0)
    raced.start(replay)
    raced.contest.front = how.raced == "front"
    estimates: list[dict[str, list[float]]] = []
    candidates = []
    while replay.evaluations < budget:
        point = proposer.ask()
        candidate = replay.candidate(to_recipe(space, point))
        candidate.point = point
        (estimate,) = raced.race(replay, [candidate])
        by_task = raced.contest.by_task(replay.evaluate(candidate, candidate.seen))
        estimates.append({task: [one.value, one.variance] for task, one in by_task.items()})
        candidates.append(candidate)
        proposer.tell(estimate, by_task)
    points = [candidate.point or {} for candidate in candidates]
    known = {task: np.array([one[task] for one in estimates]) for task in estimates[0]}
    posteriors = {task: posterior_of(space, points, *of.T) for task, of in known.items()}
    front = posterior_front(posteriors, FINALISTS)
    of_front = {task: posterior[front] for task, posterior in posteriors.items()}
    chosen = [candidates[index] for index in front]
    answers = np.array([replay.answers(candidate, "select") for candidate in chosen])
    return [chosen[i] for i in confirmed(of_front, replay.strata["select"], answers)]


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
            front = search(Replay(objectives.landscape, seed), system, options.budget)
            truth = np.array([objectives.truth(candidate.recipe) for candidate in front])
            volumes.append(volume(truth, *objectives.box))
        line = {"landscape": name, "system": system, "budget": options.budget}
        quartiles = np.quantile(volumes, [0.25, 0.5, 0.75]).round(4).tolist()
        print(json.dumps(line | {"seeds": options.seeds, "volume": quartiles}), flush=True)


if __name__ == "__main__":
    main()
