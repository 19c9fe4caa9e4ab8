"""Whether winners keep the floors they were chosen for: one JSON line per set of floors.

    PYTHONPATH=tests/support python tests/bench/bench_floors.py
        [--floors rev,rev-high,two,none] [--seeds 20] [--first 0] [--runs]

The run's own loop and choice on the demo's tabulated answers, where the true mean of every recipe
in every task is known. ``kept`` is the share of runs whose winner truly meets all floors, ``short``
by how many points it misses them, summed over tasks and in the mean over runs; ``says_kept`` the
share of runs whose search and select items say that it meets them, ``test_kept`` that of the test
items, ``test_right`` the share where these say what is true. ``value`` is the winner's true value
in the mean, ``best`` that of the best recipe known which meets the floors, ``evaluations`` the item
evaluations of search and choice. ``--runs`` prints every run's own line, too.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import optuna

from landscape import Bits, Floats, Tabulated, demo
from search.racing.item_scores import ItemScores
from search.running.conclusion import choose
from search.running.search_loop import search
from simulated import simulated_context, simulated_run

Row = dict[str, float]
FLOORS: Mapping[str, Mapping[str, float]] = {
    "rev": {"demo_rev": 0.95},
    "rev-high": {"demo_rev": 0.98},
    "two": {"demo_rev": 0.8, "demo_know": 0.88},
    "none": {},
}


def short(table: Tabulated, answers: Bits, floors: Mapping[str, float]) -> Floats:
    """By how much the true task means of recipes with these answers (n, m) miss floors, (n)."""
    means = {task: answers[:, table.tasks == task].mean(axis=1) for task in floors}
    missed = [np.maximum(0.0, floor - means[task]) for task, floor in floors.items()]
    return np.sum([np.zeros(len(answers)), *missed], axis=0)


def keeps(scores: ItemScores, floors: Mapping[str, float]) -> bool:
    """Whether the task means of these scores meet floors."""
    return all(scores.by_task[task] >= floor for task, floor in floors.items())


def best(table: Tabulated, floors: Mapping[str, float]) -> float:
    """The highest truth within floors that random steps from the best of the table find."""
    generator, donors = np.random.default_rng(0), len(table.space.donors)
    highest, answers, where = 0.0, table.table, table.where
    for width in (0.2, 0.1, 0.05, 0.02, 0.01):
        values = np.where(short(table, answers, floors) > 0, -1.0, answers @ table.item_weights)
        highest = max(highest, float(values.max()))
        near = np.repeat(where[np.argsort(-values)[:10]], 200, axis=0)
        near[:, :donors] += width * generator.standard_normal((len(near), donors))
        answers, where = table.surrogate(near), near
    return highest


def searched(table: Tabulated, floors: Mapping[str, float], seed: int) -> Row:
    """Run a search, and look up the true values of its winner."""
    settings = {"trials": 60, "seed": seed}
    constraints = {"constraints": dict(floors)}
    context = simulated_context(table, seed, search=settings, objective=constraints)
    with tempfile.TemporaryDirectory() as folder:
        run = simulated_run(Path(folder), context)
        search(run)
        choice = choose(run)
        evaluations = sum(run.store.evaluations()[0].values())
        chosen_on = run.scores_of(choice.winner.trial) + choice.select_scores
        recipe = run.recipe_of(choice.winner.trial)
        (test,) = run.scores.evaluate([recipe], "test")
    truly = float(short(table, table.answers(recipe)[None], floors)[0])
    return {
        "kept": truly == 0,
        "short": 100 * truly,
        "says_kept": keeps(chosen_on, floors),
        "test_kept": keeps(test, floors),
        "test_right": keeps(test, floors) == (truly == 0),
        "value": table.truth(recipe),
        "evaluations": evaluations,
    }


def main() -> None:
    """Replay and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--floors", default=",".join(FLOORS))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="of the seeds")
    parser.add_argument("--runs", action="store_true", help="print every run, too")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for name in options.floors.split(","):
        table, floors = demo(0), FLOORS[name]
        rows: list[Row] = []
        for seed in range(options.first, options.first + options.seeds):
            rows.append(searched(table, floors, seed))
            if options.runs:
                print(json.dumps({"floors": name, "seed": seed, **rows[-1]}), flush=True)
        means = {key: round(float(np.mean([row[key] for row in rows])), 4) for key in rows[0]}
        line = {"floors": name, "seeds": options.seeds, **means, "best": best(table, floors)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
