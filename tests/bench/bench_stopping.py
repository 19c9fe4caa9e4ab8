"""What it costs and saves to stop a search early: one JSON line per landscape and rule.

    PYTHONPATH=tests/support python tests/bench/bench_stopping.py
        [--landscapes null_flat,planted,demo] [--seeds 12] [--trials 300]

Each search goes on to its last trial; what it would have exported is noted after fixed numbers of
trials and where ``stopping`` with a share of the standard error would have ended it.
``evaluations`` are of items, those of the selection among them; lists are quartiles over the seeds.
"""

import argparse
import json
from collections import defaultdict

import numpy as np
import optuna

from landscape import LANDSCAPES, Landscape
from replay import System, select, watch
from search.proposing.stopping import should_stop
from search.running.run import Run
from simulated import COUNTS

SHARES = (0.2, 0.1, 0.05, 0.03)
FIXED = (60, 100, 200)

End = tuple[int, int, float]  # trials, item evaluations, regret


def ends(landscape: Landscape, seed: int, most: int) -> dict[str, End]:
    """Find where each rule ends one search."""
    system, found = System(), dict[str, End]()
    left = {f"share {share:g}": share for share in SHARES}

    def goes_on(run: Run) -> bool:
        complete = run.log.complete()
        trials = len(complete)
        over = [n for n, share in left.items() if should_stop(complete, COUNTS["select"], share)]
        if trials == most:
            over = [*left]
        for name in over:
            del left[name]
        if trials in (*FIXED, most):
            over.append(f"{trials} trials")
        if over:
            export = select(system.selector, run)
            evaluations = system.evaluations(run) + export.evaluations
            regret = landscape.best - landscape.truth(export.recipe)
            found.update(dict.fromkeys(over, (trials, evaluations, regret)))
        return trials < most

    watch(system, landscape, seed, goes_on)
    return found


def main() -> None:
    """Replay and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--landscapes", default="null_flat,planted,demo")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--trials", type=int, default=300)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for name in options.landscapes.split(","):
        gathered: dict[str, list[End]] = defaultdict(list)
        for seed in range(options.seeds):
            for rule, end in ends(LANDSCAPES[name](seed), seed, options.trials).items():
                gathered[rule].append(end)
        for rule, of_seeds in gathered.items():
            trials, evaluations, regret = np.quantile(of_seeds, [0.25, 0.5, 0.75], axis=0).T
            row = {
                "landscape": name,
                "rule": rule,
                "trials": trials.tolist(),
                "evaluations": evaluations.tolist(),
                "regret": regret.round(4).tolist(),
                "regret_mean": round(float(np.mean([end[2] for end in of_seeds])), 4),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
