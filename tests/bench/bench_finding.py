"""What a study finds beside what needs no search, and a rival's search: one JSON line a recipe.

    PYTHONPATH=tests/support python tests/bench/bench_finding.py STUDY.yaml --out DIR
        [--seeds N] [--first N] [--budget N] [--early N,...] [--search-only]

Each seed draws its own splits. The study is searched with and without weights tuned by gradient,
each time to its end, or to the first trial that ends with as many item evaluations as the budget
(an item's gradient counts three), and its winner chosen on select items. CMA-ES, as mergekit-evolve
has it over the weights of task arithmetic (``pip install cma``; left out without), may evaluate as
many items as the first search has evaluated to choose. Then all are evaluated on the same test
items: the winners, base, donors and their average, ``model_stock``, ``ties`` (density 0.5) and
``task_arithmetic`` with weights of 1, and the latter with 0.4. ``lead`` is the mean paired
difference of the study's winner to the recipe, ``low`` and ``high`` are its 95 % interval,
``evaluations`` the item evaluations that it took to find the recipe, ``seconds`` those of its
search. What is in DIR is not evaluated again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
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


def spent(run: Run) -> int:
    """Count the item evaluations so far; an item's gradient counts three."""
    return sum(run.store.evaluations()[0].values())


def search_within(run: Run, budget: float) -> None:
    """Search a study until a trial ends with as many evaluations as the budget."""
    file = run.folder / "spent.jsonl"  # evaluations at the end of each trial

    def note(run: Run) -> None:
        trial = max(run.log.finished(), key=lambda trial: trial.tell_order)
        with file.open("a") as lines:
            lines.write(json.dumps([trial.number, spent(run)]) + "\n")
        if spent(run) >= budget:
            raise BudgetSpent

    if spent(run) < budget:
        with suppress(BudgetSpent):
            search(run, after_trial=[note])


def incumbent(run: Run, budget: int) -> tuple[Recipe, int]:
    """Return the best recipe on search items within a budget, and the evaluations until then."""
    lines = map(json.loads, (run.folder / "spent.jsonl").read_text().splitlines())
    within = {number: evaluations for number, evaluations in lines if evaluations <= budget}
    trials = [trial for trial in run.log.complete() if trial.number in within]
    best = min(trials, key=lambda trial: trial.sort_key)
    return run.recipe_of(best), max(within.values())


def search_with_cma(run: Run, budget: int) -> None:
    """Search until as many search items are evaluated as the budget."""

    def stop(run: Run) -> None:
        if CMA.evaluations(run) >= budget:
            raise BudgetSpent

    if CMA.evaluations(run) < budget:
        with suppress(BudgetSpent):
            CMA.search(run, stop)


def compare(
    study: Path, out: Path, seed: int, budget: float, early: list[int], *, search_only: bool
) -> Iterator[dict[str, object]]:
    spec, runs = load_study(study), dict[str, Run]()
    for name, tune in (("mergesearch", True), ("untuned", False)):
        changed = {"seed": seed, "tune": tune, "stop": False}
        own = spec.model_copy(update={"search": spec.search.model_copy(update=changed)})
        context = load(plan_study(own), Hardware("cpu"))
        runs[name] = open_run(out / f"seed{seed}-{name}", context)
        with locked(runs[name].folder):
            search_within(runs[name], budget)
    first = runs["mergesearch"]
    if importlib.util.find_spec("cma"):
        runs["cma-es"] = open_run(out / f"seed{seed}-cma", first.context)
        search_with_cma(runs["cma-es"], spent(first))
    if search_only:
        return
    found = {name: conclude(run) for name, run in runs.items() if name != "cma-es"}
    asked = {name: result.items_asked for name, (result, _) in found.items()}
    recipes = {
        name: (recipe, sum(n for split, n in asked[name].items() if split != "test"))
        for name, (_, recipe) in found.items()
    }
    recipes |= {
        f"{name} at {within}": incumbent(runs[name], within) for within in early for name in found
    }
    if rival := runs.get("cma-es"):
        recipes["cma-es"] = (LuckyMaximum().select(rival).recipe, CMA.evaluations(rival))
    recipes |= {name: (recipe, 0) for name, recipe in without_search(first.context.space)}
    scores = first.scores.evaluate([recipe for recipe, _ in recipes.values()], "test")
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
            "seconds": round(runs[name].store.evaluations()[1]) if name in runs else 0,
            "verdict": found[name][0].verdict if name in found else None,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--budget", type=float, default=math.inf, help="item evaluations")
    parser.add_argument("--early", default="", help="smaller budgets, whose best are tested too")
    parser.add_argument("--search-only", action="store_true", help="leave the test items alone")
    given = parser.parse_args()
    [int(one) for one in given.early.split(",") if one]
    for seed in range(given.first, given.first + given.seeds):
        lines = compare(given.study, given.out, seed, given.budget, search_only=given.search_only)
        for line in lines:
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
