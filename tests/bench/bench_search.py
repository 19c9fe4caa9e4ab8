"""What a search finds for its item evaluations: one JSON line per landscape, system and budget.

    PYTHONPATH=tests/support python tests/bench/bench_search.py [--landscapes demo,planted]
        [--systems run,full] [--seeds 20] [--first 0] [--budgets 5000,20000,60000] [--trials]
        [--jobs 2] [--runs]

A budget counts every item evaluation that goes into the choice: the search's and the selector's.
The test items that some systems are evaluated on, to report, are counted apart. With ``--trials`` a
budget is a number of trials, the warm starts among them, whatever each of them costs. Lists are
quartiles over the seeds; all values are in [0, 1].

``regret`` is the best value known less the true value of what is exported; ``optimism`` what is
reported of it less that truth, ``optimism_mean`` its mean; ``covered`` the share of 95 % intervals
that hold the truth; ``reached`` the share of runs with 95 % of the way from the uniform average to
the best; ``dropped`` the share of runs in which the truly best recipe tried, by half a point or
more, is not among the finalists; ``better`` the share of verdicts that say so; ``method`` the
share of runs whose recipe is of the best method, where that is known. ``--runs`` prints every run's
own line, too.

The rival ``cma-lucky`` needs ``pip install cma``.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import optuna
from optuna.samplers import CmaEsSampler, RandomSampler, TPESampler

from landscape import LANDSCAPES, Landscape, Planted
from replay import FreshItems, LuckyMaximum, System, replay
from rivals import Started, Stock, WeightsCma, WeightsGa
from search.proposing.space import Space
from search.proposing.starts import UNIFORM, baselines
from simulated import COUNTS

Row = dict[str, object]
GA7 = partial(WeightsGa, 7, "task_arithmetic")
GA25 = partial(WeightsGa, 25, "task_arithmetic")
STOCK_TPE = partial(Stock, lambda seed: TPESampler(seed=seed), ())
STOCK_RANDOM = partial(Stock, lambda seed: RandomSampler(seed=seed), ())
STOCK_CMAES = partial(Stock, lambda seed: CmaEsSampler(seed=seed), ("task_arithmetic",))


def alike(space: Space) -> Space:
    """Give depth groups the same weights throughout."""
    return replace(space, stages=(*space.stages[:1],) * 1000)


def apart(space: Space) -> Space:
    """Give depth groups weights of their own from the first trial."""
    return replace(space, stages=())


def default(space: Space) -> Space:
    """Let ranges be widened, as if the study did not give them."""
    return replace(space, widenable=frozenset({"scale", *space.ranges}))


def narrow(space: Space) -> Space:
    """End the scale's range before the best of ``planted``."""
    return replace(space, scale=(0.0, 0.4))


FIXED = partial(System, raced=False)
LUCKY = partial(FIXED, selector=LuckyMaximum(), baselines=False)

SYSTEMS: Mapping[str, System] = {
    "run": System(),  # what ships
    "full": FIXED(selector=FreshItems()),  # every candidate on every item
    "run-alike": System(space=alike),
    "run-apart": System(space=apart),
    "run-default": System(space=default),
    "run-narrow": System(space=narrow),
    "run-narrow-default": System(space=lambda space: default(narrow(space))),
    "run-lucky": System(selector=LuckyMaximum()),
    "full-lucky": FIXED(selector=LuckyMaximum()),
    "full-elected": FIXED(),
    "tpe-raced": System("tpe"),
    "cmaes-raced": System("cmaes"),
    "random-raced": System("random"),
    "tpe-lucky": LUCKY("tpe"),
    "random-lucky": LUCKY("random"),
    "random-fresh": FIXED("random", FreshItems()),
    "cma-lucky": LUCKY(partial(WeightsCma, "task_arithmetic"), items=100),
    "ga7-lucky": LUCKY(GA7, items=100),
    "ga25-lucky": LUCKY(GA25, items=100),
    "ga25-started": LUCKY(partial(Started, GA25), items=100),
    "stock-tpe": LUCKY(STOCK_TPE),
    "stock-tpe-started": LUCKY(partial(Started, STOCK_TPE)),
    "stock-random": LUCKY(STOCK_RANDOM),
    "stock-cmaes": LUCKY(STOCK_CMAES),
    "tpe": FIXED("tpe", FreshItems()),
}


def runs(pair: tuple[str, str], seed: int, budgets: Sequence[int], *, trials: bool) -> list[Row]:
    """One run of a system on a landscape: a row per budget."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    landscape, system = LANDSCAPES[pair[0]](seed), SYSTEMS[pair[1]]
    uniform = landscape.truth(baselines(landscape.space)[UNIFORM])
    rows: list[Row] = []
    ends = replay(system, landscape, seed, budgets, trials=trials)
    for budget, end in zip(sorted(budgets), ends, strict=True):
        truth, reported = landscape.truth(end.export.recipe), end.export.reported
        rows.append(
            {
                "landscape": pair[0],
                "system": pair[1],
                "budget": budget,
                "seed": seed,
                "value": truth,
                "regret": landscape.best - truth,
                "optimism": reported.mean - truth,
                "covered": reported.low <= truth <= reported.high,
                "reached": truth >= uniform + 0.95 * (landscape.best - uniform),
                "dropped": end.dropped >= 0.005,
                "better": end.export.verdict and end.export.verdict == "better",
                "method": found_method(landscape, end.export.recipe.merge_method),
                "recipes": end.recipes,
                "evaluations": end.evaluations,
                "tested": 0 if end.export.verdict is None else COUNTS["test"],
            }
        )
    return rows


def found_method(landscape: Landscape, method: str) -> bool | None:
    """Whether it is the landscape's best method; None where that is not known or all are."""
    if not isinstance(landscape, Planted) or len(set(landscape.heights.values())) == 1:
        return None
    return landscape.heights[method] == landscape.best


def summary(rows: Sequence[Row]) -> Row:
    """One row of a system's runs on a landscape within a budget."""
    found: Row = {name: rows[0][name] for name in ("landscape", "system", "budget")}
    found["seeds"] = len(rows)
    for name in ("value", "regret", "optimism"):
        found[name] = np.quantile([row[name] for row in rows], [0.25, 0.5, 0.75]).round(4).tolist()
    found["optimism_mean"] = round(float(np.mean([row["optimism"] for row in rows])), 4)
    for name in ("covered", "reached", "dropped", "better", "method"):
        said = [row[name] for row in rows if row[name] is not None]
        found[name] = round(float(np.mean(said)), 3) if said else None
    for name in ("recipes", "evaluations", "tested"):
        found[name] = int(np.median([row[name] for row in rows]))
    return found


def main() -> None:
    """Replay and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--landscapes", default=",".join(LANDSCAPES))
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="of the seeds")
    parser.add_argument("--budgets", default="5000,20000,60000")
    parser.add_argument("--trials", action="store_true", help="budgets are numbers of trials")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--runs", action="store_true", help="print every run, too")
    options = parser.parse_args()
    budgets = [int(budget) for budget in options.budgets.split(",")]
    pairs = list(product(options.landscapes.split(","), options.systems.split(",")))
    seeds = range(options.first, options.first + options.seeds)
    work = [(pair, seed) for pair in pairs for seed in seeds]
    gathered: dict[object, list[Row]] = defaultdict(list)
    replayed = partial(runs, budgets=budgets, trials=options.trials)
    with ProcessPoolExecutor(options.jobs) as pool:
        for rows in pool.map(replayed, *zip(*work, strict=True)):
            for row in rows:
                same = gathered[row["landscape"], row["system"], row["budget"]]
                same.append(row)
                if options.runs:
                    print(json.dumps(row), flush=True)
                if len(same) == options.seeds:
                    print(json.dumps(summary(same)), flush=True)


if __name__ == "__main__":
    main()
