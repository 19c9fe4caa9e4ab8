"""What proposing costs a trial: one JSON line per sampler and storage.

    python tests/bench/bench_ask.py [--samplers gp,tpe,random] [--trials 300]

Milliseconds in the mean over the trials of one search of the demo's landscape: wall and CPU time
of asking and telling, in memory and in a database like a run's.
"""

import argparse
import json
import time
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import optuna

from landscape import LANDSCAPES
from search.proposing.recipes import to_recipe
from search.proposing.samplers import Proposer
from search.proposing.starts import warm_starts
from search.racing.race import Estimate
from search.storing.store import Store
from search.storing.trials import TrialLog


def clock() -> np.ndarray:
    """Wall and CPU time, in milliseconds."""
    return 1e3 * np.array([time.perf_counter(), time.process_time()])


def milliseconds(log: TrialLog, sampler: str, trials: int) -> np.ndarray:
    """Wall and CPU time that a trial takes besides its evaluation."""
    landscape, generator = LANDSCAPES["demo"](0), np.random.default_rng(0)
    spent = np.zeros(2)
    proposer = Proposer(sampler, landscape.space, 0)
    for label, point in warm_starts(landscape.space):
        log.enqueue(point, start=label)
    for number in range(trials):
        start = clock()
        trial = proposer.ask(log)
        spent += clock() - start
        value = landscape.truth(to_recipe(landscape.space, trial.point))
        start = clock()
        estimate = Estimate(value + 0.02 * generator.standard_normal(), 0.02**2)
        trial.tell(estimate, {}, items=240, order=number)
        spent += clock() - start
    return spent / trials


def main() -> None:
    """Ask, tell and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samplers", default="gp,tpe,random")
    parser.add_argument("--trials", type=int, default=300)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for sampler, storage in product(options.samplers.split(","), ("memory", "database")):
        with TemporaryDirectory() as folder:
            in_memory = storage == "memory"
            file = Path(folder) / "study.db"
            study = optuna.create_study(direction="maximize") if in_memory else Store(file).study()
            wall, cpu = milliseconds(TrialLog(study), sampler, options.trials).round(1).tolist()
        print(json.dumps({"sampler": sampler, "storage": storage, "wall": wall, "cpu": cpu}))


if __name__ == "__main__":
    main()
