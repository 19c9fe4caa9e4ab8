"""How much of a front a search finds for its item evaluations: one JSON line per system and seed.

    python tests/bench_front.py [--systems front,mean,random] [--seeds 10] [--budget 10000]

On the demo's tabulated landscape, whose tasks are the goals. ``front`` searches as a study with
``search.front`` does, ``mean`` as one without, ``random`` by random points and all search items;
all three choose their front in the same way. ``volume`` is the share of the goals' box, between
the worst donor's and the best value known of each task, in which a point is beaten by the front's
true values; ``lead`` compares it with the volume of all recipes of the table.
"""

import argparse
import json

import numpy as np
import optuna

from landscape import LANDSCAPES, Floats, Tabulated
from replay import Candidate, Raced, Replay
from search.front import believed_front, confirmed, nondominated
from search.racing import Race
from search.samplers import make_sampler

FINALISTS = 8
SYSTEMS = {"front": ("gp", True), "mean": ("gp", False), "random": ("random", False)}


def by_task(table: Tabulated, answers: Floats) -> Floats:
    """Means (n, tasks) of answers (n, m) to all items of the table."""
    return np.stack([answers[:, table.tasks == task].mean(axis=1) for task in table.weights], 1)


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
    parser.add_argument("--budget", type=int, default=10_000)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for seed in range(options.seeds):
        for system in options.systems.split(","):
            table = LANDSCAPES["demo"](seed)
            assert isinstance(table, Tabulated)
            replay = Replay(table, seed)
            front = search(replay, system, options.budget)
            donors = [
                r for name, r in table.space.baselines().items() if name in table.space.donors
            ]
            truth, known, of_donors = (
                by_task(table, np.array([table.answers(recipe) for recipe in recipes]))
                for recipes in ([c.recipe for c in front], table.recipes, donors)
            )
            box = of_donors.min(axis=0), known.max(axis=0)
            found, most = volume(truth, *box), volume(known[nondominated(known)], *box)
            line = {"system": system, "seed": seed, "asked": replay.asked, "recipes": len(front)}
            print(json.dumps(line | {"volume": round(found, 4), "lead": round(found / most, 3)}))


if __name__ == "__main__":
    main()
