"""What a study finds beside what needs no search, and a rival's search: one JSON line a recipe.

    PYTHONPATH=tests/support python tests/bench/bench_finding.py STUDY.yaml --out DIR
        [--seeds 0,1,2] [--systems mergesearch,untuned,cma-es] [--budget N] [--search-only]

All seeds share the splits of the study's own. The study is searched with and without weights tuned
by gradient, each time to its end, or until no further trial fits the budget of item evaluations (an
item's gradient counts three), and its winner is chosen on select items. CMA-ES, as mergekit-evolve
has it over the weights of task arithmetic (``pip install cma``), may evaluate as many items as the
first search has. Then all are evaluated on the same test items: the winners,
base, donors and their average, ``model_stock``, ``ties`` (density 0.5) and ``task_arithmetic`` with
weights of 1, and the latter with 0.4. ``lead`` is the mean paired difference of the seed's winner
to the recipe, ``low`` and ``high`` are its 95 % interval, ``evaluations`` the item evaluations that
it took to find the recipe, those of selection included, ``seconds`` how long they took. What is in
DIR is not evaluated again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
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
from search.proposing.tuning import LEAST_STEPS
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


def is_over(run: Run, budget: float) -> bool:
    """Return whether the next trial, with the steps before it, would exceed a budget."""
    (*_, last) = run.store.steps() or [None]
    doubled = last.step * last.evaluations if last and last.step < LEAST_STEPS else 0
    return spent(run) + doubled >= budget


def search_within(run: Run, budget: float) -> None:
    """Search a study until its next trial would exceed the budget."""

    def stop(run: Run) -> None:
        if is_over(run, budget):
            raise BudgetSpent

    if not is_over(run, budget):
        with suppress(BudgetSpent):
            search(run, after_trial=[stop])


def search_with_cma(run: Run, budget: int) -> None:
    """Search until as many search items are evaluated as the budget."""

    def stop(run: Run) -> None:
        if CMA.evaluations(run) >= budget:
            raise BudgetSpent

    if CMA.evaluations(run) < budget:
        with suppress(BudgetSpent):
            CMA.search(run, stop)


def copy_results(recipes: Sequence[Recipe], source: Run, target: Run) -> None:
    """Copy the stored test results of recipes into another run of the same splits."""
    for recipe in recipes:
        known = source.store.results(recipe.key, "test")
        missing = known.keys() - target.store.results(recipe.key, "test").keys()
        if missing:
            blocks = {number: known[number] for number in missing}
            target.store.save(recipe.key, "test", blocks, 0.0)


def load_context(study: Path, system: str) -> LiveContext:
    """Load the study; weights are tuned by gradient for ``mergesearch`` alone."""
    spec = load_study(study)
    changed = {"tune": system == "mergesearch", "stop": False}
    spec = spec.model_copy(update={"search": spec.search.model_copy(update=changed)})
    return load(plan_study(spec), Hardware("cpu"))


def search_all(
    contexts: Mapping[str, LiveContext], out: Path, seed: int, budget: float
) -> dict[str, Run]:
    """Search with every system; ``cma-es``, the last, with as many evaluations as the first."""
    runs: dict[str, Run] = {}
    for name, context in contexts.items():
        search_spec = context.spec.search.model_copy(update={"seed": seed})
        spec = context.spec.model_copy(update={"search": search_spec})
        if name == "cma-es":  # evaluates a candidate on all search items at once
            whole = {"block": spec.objective.items.search}
            spec = spec.model_copy(update={"objective": spec.objective.model_copy(update=whole)})
        runs[name] = open_run(out / f"seed{seed}-{name}", replace(context, spec=spec))
        with locked(runs[name].folder):
            if name == "cma-es":
                search_with_cma(runs[name], spent(runs["mergesearch"]))
            else:
                search_within(runs[name], budget)
    return runs


def compare(runs: dict[str, Run], known: Run) -> Iterator[dict[str, object]]:
    """Conclude the searches of one seed, and test what they found.

    ``known`` has, or receives, the test results of what needs no search.
    """
    first, seed = runs["mergesearch"], runs["mergesearch"].spec.search.seed
    fixed = dict(without_search(first.context.space))
    known.scores.evaluate([*fixed.values()], "test")
    found, recipes = {}, {}
    for name, run in runs.items():
        if name == "cma-es":
            recipes[name] = (LuckyMaximum().select(run).recipe, CMA.evaluations(run))
            continue
        copy_results([*fixed.values()], known, run)
        found[name], recipe = conclude(run)
        evaluated = found[name].split_evaluations
        recipes[name] = (recipe, sum(n for split, n in evaluated.items() if split != "test"))
        copy_results([recipe], run, first)
    recipes |= {name: (recipe, 0) for name, recipe in fixed.items()}
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
            "seconds": round(sum(runs[name].store.evaluations()[1].values()))
            if name in runs
            else 0,
            "verdict": found[name].verdict if name in found else None,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--systems", default="mergesearch,untuned,cma-es")
    parser.add_argument("--budget", type=float, default=math.inf, help="item evaluations")
    parser.add_argument("--search-only", action="store_true", help="leave the test items alone")
    given = parser.parse_args()
    systems, known = given.systems.split(","), None
    contexts = {name: load_context(given.study, name) for name in systems}
    for seed in map(int, given.seeds.split(",")):
        runs = search_all(contexts, given.out, seed, given.budget)
        known = known or runs["mergesearch"]
        if not given.search_only:
            for line in compare(runs, known):
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
