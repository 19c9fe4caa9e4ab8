"""How much of a front a search finds for its item evaluations: one JSON line per system.

    python tests/bench_front.py [--systems front,mean,random] [--seeds 10] [--budget 8000]

``demo`` is the demo's tabulated landscape with its tasks as goals, which hardly conflict;
``conflict`` has two goals whose best recipes are far apart. ``front`` searches as a study with
``search.front`` does, ``mean`` as one without, ``random`` by random points and all search items;
all three choose their front in the same way. ``volume`` is the share of the goals' box in which a
point is beaten by the front's true values. The box of ``demo`` lies between the worst donor's and
the best tabulated value of each task, that of ``conflict`` between floor and top.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol

import numpy as np
import optuna

from landscape import LANDSCAPES, Bits, Floats, Items, Landscape, Planted, Tabulated
from merge_engine.recipe import Recipe
from replay import Candidate, Raced, Replay
from search.front import believed_front, confirmed
from search.racing import Race
from search.samplers import make_sampler

FINALISTS = 8
SYSTEMS = {"front": ("gp", True), "mean": ("gp", False), "random": ("random", False)}


class Goals(Protocol):
    """A landscape with the truth about each of its goals."""

    landscape: Landscape
    box: tuple[Floats, Floats]

    def truth(self, recipe: Recipe) -> Floats:
        """The value in each goal."""


class Demo:
    """Tasks of the demo."""

    def __init__(self, seed: int) -> None:
        table = LANDSCAPES["demo"](seed)
        assert isinstance(table, Tabulated)
        self.landscape = self.table = table
        donors = [table.space.baselines()[donor] for donor in table.space.donors]
        known = np.array([self.truth(recipe) for recipe in table.recipes])
        self.box = np.array([self.truth(r) for r in donors]).min(axis=0), known.max(axis=0)

    def truth(self, recipe: Recipe) -> Floats:
        answers, tasks = self.table.answers(recipe), self.table.tasks
        return np.array([answers[tasks == task].mean() for task in self.table.weights])


@dataclass(frozen=True)
class ConflictItems:
    """Items of either goal in turn."""

    goals: tuple[Items, Items]
    tasks: tuple[str, ...]

    def answers(self, recipe: Recipe) -> Bits:
        first = np.array(self.tasks) == self.tasks[0]
        return np.where(first, *(goal.answers(recipe) for goal in self.goals))


class Conflict:
    """Two planted goals with the same methods, their tops mirrored."""

    weights: Mapping[str, float] = {"x": 1.0, "y": 1.0}

    def __init__(self, seed: int) -> None:
        one = LANDSCAPES["planted"](seed)
        assert isinstance(one, Planted)
        centres = {m: (*(1.4 - np.array(at[:3])), *at[3:]) for m, at in one.centres.items()}
        self.goals = one, replace(one, centres=centres, seed=seed + 1000)
        self.space, self.landscape, self.best = one.space, self, one.best
        self.box = np.full(2, one.floor), np.full(2, one.best)

    def truth(self, recipe: Recipe) -> Floats:
        return np.array([goal.truth(recipe) for goal in self.goals])

    def draw(self, count: int, generator: np.random.Generator) -> ConflictItems:
        one, other = (goal.draw(count, generator) for goal in self.goals)
        return ConflictItems((one, other), ("x", "y") * (count // 2))


PLACES = {"demo": Demo, "conflict": Conflict}


def volume(front: Floats, low: Floats, high: Floats) -> float:
    """The share of the box (tasks) that points of a front (n, tasks) beat."""
    points = np.random.default_rng(0).uniform(low, high, (20_000, len(low)))
    return float((points[:, None] <= front[None]).all(axis=2).any(axis=1).mean())


def search(replay: Replay, system: str, budget: int) -> list[Candidate]:
    """Search until the budget is spent, and the candidates' front on fresh items."""
    name, front = SYSTEMS[system]
    space, study = replay.space, optuna.create_study(direction="maximize")
    for _, point in space.warm_starts():
        study.enqueue_trial(point)
    raced = Raced()
    raced.start(replay)
    contest = raced.contest = Race(
        raced.contest.strata, front=front, complete=raced.contest.complete
    )
    if name == "random":
        contest.hope = -1.0
    estimates: list[dict[str, list[float]]] = []
    candidates = []
    while replay.asked < budget:
        study.sampler = make_sampler(name, space, replay.seed, len(estimates), front=front)
        trial = study.ask(space.distributions())
        candidate = replay.candidate(space.recipe(trial.params))
        candidate.point = trial.params
        (told,) = raced.race(replay, [candidate])
        said = contest.by_task(replay.ask(candidate, candidate.seen))
        estimates.append({task: [one.value, one.variance] for task, one in said.items()})
        candidates.append(candidate)
        trial.set_user_attr("variance", told.variance)
        trial.set_user_attr("tasks", estimates[-1])
        study.tell(trial, told.value)
    points = [candidate.point or {} for candidate in candidates]
    known = {task: np.array([one[task] for one in estimates]) for task in estimates[0]}
    places, beliefs = believed_front(space, points, known, FINALISTS)
    chosen = [candidates[place] for place in places]
    answers = np.array([replay.answers(candidate, "select") for candidate in chosen])
    return [chosen[i] for i in confirmed(beliefs, replay.strata["select"], answers)]


def main() -> None:
    """Replay and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget", type=int, default=8000)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for place, system in product(PLACES, options.systems.split(",")):
        volumes = []
        for seed in range(options.seeds):
            goals = PLACES[place](seed)
            front = search(Replay(goals.landscape, seed), system, options.budget)
            truth = np.array([goals.truth(candidate.recipe) for candidate in front])
            volumes.append(volume(truth, *goals.box))
        line = {"landscape": place, "system": system, "budget": options.budget}
        quartiles = np.quantile(volumes, [0.25, 0.5, 0.75]).round(4).tolist()
        print(json.dumps(line | {"seeds": options.seeds, "volume": quartiles}), flush=True)


if __name__ == "__main__":
    main()
