"""What a study finds beside what needs no search, and a rival's search: one JSON line a recipe.

    PYTHONPATH=tests/support python tests/bench/bench_finding.py STUDY.yaml --out DIR
        [--seeds N] [--first N] [--trials N]

Each seed draws its own splits. The study's search is run to its end; CMA-ES, as mergekit-evolve has
it over the weights of task arithmetic (``pip install cma``; left out without), may evaluate as
many items as that has evaluated to choose. Then all are evaluated on the same test items: both
winners, base, donors and their average, ``model_stock``, ``ties`` (density 0.5) and
``task_arithmetic`` with weights of 1, and the latter with 0.4. ``lead`` is the mean paired
difference of the study's winner to the recipe, ``low`` and ``high`` are its 95 % interval,
``evaluations`` the item evaluations that it took to find the recipe. What is in DIR is not
evaluated again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from merge_engine.recipe.recipe import Recipe
from replay import LuckyMaximum, System
from rivals import WeightsCma
from search.preparing.context import LiveContext, load, plan_study
from search.preparing.models import Hardware
from search.proposing.recipes import to_recipe
from search.proposing.space import Space
from search.proposing.starts import baselines
from search.running.conclusion import conclude
from search.running.run import Run
from search.running.search_loop import search
from search.running.workers import LocalWorker
from search.storing.folder import locked
from search.study.reading import load_study

DEFAULTS = ("model_stock", "ties", "task_arithmetic")
TASK_ARITHMETIC = 0.4  # the scale that Ilharco et al. (2212.04089) found to do for many tasks
CMA = System(partial(WeightsCma, "task_arithmetic"), LuckyMaximum(), raced=False, baselines=False)


class BudgetSpent(Exception):  # noqa: N818
    """A rival has evaluated as many items as it may."""


def open_run(folder: Path, context: LiveContext) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, context, LocalWorker(context), lambda _: None)
    run.bind_to_store()
    return run


def without_search(space: Space) -> Iterator[tuple[str, Recipe]]:
    """Names and recipes that need no search."""
    yield from baselines(space).items()
    k = len(space.donors)
    for method in DEFAULTS:
        if method in space.methods:
            yield method, to_recipe(space, space.point(method, (1.0,) * k, density=0.5))
    weights = (TASK_ARITHMETIC,) * k
    yield (
        f"task_arithmetic {TASK_ARITHMETIC}",
        to_recipe(space, space.point("task_arithmetic", weights)),
    )


def search_with_cma(run: Run, budget: int) -> Recipe:
    """The recipe with the highest mean after as many evaluations of search items."""

    def stop(run: Run) -> None:
        if CMA.evaluations(run) >= budget:
            raise BudgetSpent

    if CMA.evaluations(run) < budget:
        with suppress(BudgetSpent):
            CMA.search(run, stop)
    return LuckyMaximum().select(run).recipe


def compare(study: Path, out: Path, seed: int, trials: int | None) -> Iterator[dict[str, object]]:
    spec = load_study(study)
    changed = {"seed": seed, "trials": trials or spec.search.trials}
    spec = spec.model_copy(update={"search": spec.search.model_copy(update=changed)})
    context = load(plan_study(spec), Hardware("cpu"))
    run = open_run(out / f"seed{seed}", context)
    with locked(run.folder):
        search(run)
        result, winner = conclude(run)
        asked = result.items_asked["search"] + result.items_asked.get("select", 0)
        recipes = {"mergesearch": (winner, asked)}
        recipes |= {name: (recipe, 0) for name, recipe in without_search(context.space)}
        if importlib.util.find_spec("cma"):
            rival = open_run(out / f"seed{seed}-cma", context)
            recipes["cma-es"] = (search_with_cma(rival, asked), CMA.evaluations(rival))
        scores = run.scores.evaluate([recipe for recipe, _ in recipes.values()], "test")
    for (name, (_, evaluations)), one in zip(recipes.items(), scores, strict=True):
        lead = scores[0].minus(one, seed)
        yield {
            "seed": seed,
            "recipe": name,
            "test": round(one.mean, 4),
            "lead": round(lead.mean, 4),
            "low": round(lead.low, 4),
            "high": round(lead.high, 4),
            "evaluations": evaluations,
            "verdict": result.verdict,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--trials", type=int)
    given = parser.parse_args()
    for seed in range(given.first, given.first + given.seeds):
        for line in compare(given.study, given.out, seed, given.trials):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
