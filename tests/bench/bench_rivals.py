"""Searches, and objectives without labels, side by side at equal item evaluations.

    PYTHONPATH=tests/support python tests/bench/bench_rivals.py STUDY.yaml [--seeds 0,1,2]
        [--systems tuned,flat,tpe,cma,ga,entropy,kl] [--budgets 2500,5000,10000]

``tuned`` and ``flat`` are the program's search with and without weights tuned by gradient, ``tpe``
is the latter with Optuna's TPE, ``cma`` mergekit-evolve's CMA-ES over one weight a donor of task
arithmetic (``pip install cma``), ``ga`` mergenetic's genetic algorithm. ``entropy`` (AdaMerging)
and ``kl`` (DAM: to the logits of the donor whose name a task has, else of the base) are losses in
the place of ours, without labels or race: our steps from the uniform average, over the same tune
items, for as long as the budget lasts; an item's gradient counts three evaluations, a donor's
logits one. Both see the tokens of the right answers, which a user without labels has not.

A search's recipe at a budget is that of the highest posterior mean (``cma``: mean) among the trials
that ended within it. One JSON line a seed and system: ``test``, its true score in per cent by
budget, is the mean on all select and test items, on which nothing was chosen.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from bench_finding import CMA, BudgetSpent, open_run
from bench_search import GA25, LUCKY
from merge_engine.building.recipe_gradient import RecipeGradient
from merge_engine.building.units import Units
from merge_engine.recipe.recipe import Recipe
from replay import LuckyMaximum
from search.preparing.context import LiveContext, load, plan_study
from search.preparing.models import Hardware
from search.proposing.recipes import to_recipe
from search.proposing.starts import baselines, even_weights
from search.proposing.tuned_path import TunedPath
from search.proposing.tuning import first_state, minibatch, update
from search.racing.race import Floats
from search.running.run import Run
from search.running.search_loop import search
from search.running.tuner import BATCH, GRADIENT_COST, RATES
from search.running.workers import EvalJob, Worker
from search.study.reading import load_study

ALONE = {"cma": CMA, "ga": LUCKY(GA25)}  # systems without a posterior
SYSTEMS = ("tuned", "flat", "tpe", "cma", "ga", "entropy", "kl")

Found = Iterator[tuple[int, Recipe]]  # evaluations so far, and the recipe exported then


def searched(context: LiveContext, system: str, most: int) -> list[tuple[int, Recipe]]:
    """Search until the largest budget is spent."""
    found: list[tuple[int, Recipe]] = []

    def note(run: Run) -> None:
        if system in ALONE:
            found.append((ALONE[system].evaluations(run), LuckyMaximum().select(run).recipe))
        else:
            (best, *_), _ = run.ranked_candidates()
            spent = sum(run.store.evaluations()[0].values())
            found.append((spent, run.recipe_of(best.trial)))
        if found[-1][0] >= most:
            raise BudgetSpent

    with tempfile.TemporaryDirectory() as folder, suppress(BudgetSpent):
        run = open_run(Path(folder) / "run", context)
        if system in ALONE:
            ALONE[system].search(run, note)
        else:
            search(run, after_trial=[note])
    return found


class Unlabelled:
    """Steps along the gradient of another objective."""

    def __init__(self, context: LiveContext, objective: str, seed: int) -> None:
        units = context.tuned_units
        assert units is not None
        self.context, self.objective, self.seed, self.units = context, objective, seed, units
        self.builder = context.builder
        names = self.builder.model_set.names
        self.gradient = RecipeGradient(self.builder, Units.of_filters(names, units.filters))
        self.tune = context.splits.tune
        self.labels = dict(zip(self.tune, Worker(context).labels(self.tune), strict=True))
        self.tasks: dict[str, list[int]] = {}
        for number in self.tune:
            self.tasks.setdefault(context.objective.items[number].task, []).append(number)
        self.teachers = self._teachers() if objective == "kl" else {}

    def answers(self, items: Sequence[int]) -> list[Tensor]:
        """Log-probabilities at each token of each item's answer, (tokens, vocabulary)."""
        objective = self.context.objective
        tokenizer = objective.language_model.tokenizer  # type: ignore[attr-defined]
        found = []
        for number in items:
            (asked,) = objective.snapshots([number])
            start = tokenizer.encode(asked.prompt)
            whole = torch.tensor([[*start, *tokenizer.encode(str(self.labels[number]))]])
            logits = self.builder.model(input_ids=whole, use_cache=False).logits[0]
            found.append(logits[len(start) - 1 : -1].log_softmax(-1))
        return found

    @torch.no_grad()
    def _teachers(self) -> dict[int, Tensor]:
        known, found = baselines(self.context.space), dict[int, Tensor]()
        for task, items in self.tasks.items():
            own = [d for d in self.context.space.donors if task.endswith(d.rsplit("/", 1)[-1])]
            self.builder.build(known[own[0] if own else self.context.space.base])
            found |= zip(items, self.answers(items), strict=True)
        return found

    def loss(self, items: Sequence[int]) -> Tensor:
        logs = self.answers(items)
        if self.objective == "entropy":
            return torch.stack([-(one.exp() * one).sum(-1).mean() for one in logs])
        pairs = zip(items, logs, strict=True)
        return torch.stack(
            [
                kl_div(one, self.teachers[n], log_target=True, reduction="none").sum(-1).mean()
                for n, one in pairs
            ]
        )

    def recipe(self, weights: Floats) -> Recipe:
        space = replace(self.context.space, tuned=TunedPath(self.units, weights[None]))
        k = len(space.donors)
        point = space.point("task_arithmetic", even_weights(space, range(k), 1 / k))
        return to_recipe(space, {**point, "strength": 1.0, "position": 0.0})

    def path(self) -> Found:
        k = len(self.context.space.donors)
        start = torch.full((len(self.units.filters), k), 1 / k, dtype=torch.float64).numpy()
        state, spent, step = first_state(start), len(self.teachers), 0
        while True:
            items = minibatch(self.tasks, self.context.weights, BATCH, step, (self.seed, 0))
            self.builder.build(self.recipe(state[0]))
            _, gradient = self.gradient.values_and_grad(self.loss, items)
            step += 1
            state = update(state, gradient.numpy(), step, RATES[0])
            spent += GRADIENT_COST * len(items)
            yield spent, self.recipe(state[-1])


def pursued(context: LiveContext, objective: str, seed: int, most: int) -> list[tuple[int, Recipe]]:
    """Take steps until the largest budget is spent."""
    found = []
    for spent, recipe in Unlabelled(context, objective, seed).path():
        if spent > most:
            return found
        found.append((spent, recipe))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--budgets", default="2500,5000,10000")
    given = parser.parse_args()
    budgets = [int(one) for one in given.budgets.split(",")]
    for seed in map(int, given.seeds.split(",")):
        for system in given.systems.split(","):
            spec = load_study(given.study)
            tuned = system in ("tuned", "entropy", "kl")
            changed = {"seed": seed, "tune": tuned, "trials": 10_000, "stop": False}
            changed |= {"sampler": "tpe"} if system == "tpe" else {}
            spec = spec.model_copy(update={"search": spec.search.model_copy(update=changed)})
            context = load(plan_study(spec), Hardware("cpu"))
            if system in ("entropy", "kl"):
                found = pursued(context, system, seed, max(budgets))
            else:
                found = searched(context, system, max(budgets))
            worker, items = Worker(context), (*context.splits.select, *context.splits.test)
            scores = {}
            for budget in budgets:
                recipe = [recipe for spent, recipe in found if spent <= budget][-1]
                results = worker.evaluate(EvalJob(recipe, items)).results
                of_task: dict[str, list[float]] = {}
                for number, one in zip(items, results, strict=True):
                    task = context.objective.items[number].task
                    of_task.setdefault(task, []).append(one.value)
                means = [sum(each) / len(each) for each in of_task.values()]
                scores[budget] = round(100 * sum(means) / len(means), 1)
            line = {"study": given.study.parent.name, "seed": seed, "system": system}
            print(json.dumps(line | {"test": scores}), flush=True)


if __name__ == "__main__":
    main()
