"""The end of a run: finalists on fresh select items, the winner on test items, the result.

A candidate that fails on those items (say, with a NaN log-likelihood) counts as a failed trial from
then on, and the conclusion starts over without it. All scores and failures are in the database, so
a killed and resumed session comes to the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from merge_engine.recipe.recipe import Recipe
from objectives.items import Split
from search.proposing.edges import around, edges
from search.proposing.gp import posterior_of
from search.proposing.gp_sampler import MAX_TRIALS
from search.proposing.recipes import is_tuned
from search.proposing.starts import UNIFORM, baselines
from search.racing.elimination import successive_elimination
from search.racing.item_scores import ItemScores
from search.racing.pareto import confirmed, leading, posterior_front
from search.racing.race import Floats
from search.racing.verdict import SELECT_SHARE, items_to_decide, verdict
from search.running.baselines import best_donor, check_inputs
from search.running.evaluator import Evaluated, UnderOwnTemplate, under_own_templates
from search.running.events import Note, Stage
from search.running.run import Run
from search.storing.result import (
    AtEdge,
    Baseline,
    Difference,
    Donor,
    DonorDifference,
    OtherTrial,
    Result,
    Score,
    Seconds,
    Untuned,
    Winner,
    package_versions,
)
from search.storing.trials import Candidate, candidates
from search.study.spec import StudyError


class CandidateError(Exception):
    """Candidates failed after the search and now count as failed trials."""


@dataclass(frozen=True)
class Choice:
    """The winner as chosen before the test."""

    candidate: Candidate  # the winner
    posterior_mean: float  # of its value, after the search
    # The recipe without tuned weights that has the highest posterior mean, where the winner's are
    # tuned; None: they are not, or there is none.
    untuned: Candidate | None
    selected: ItemScores  # its scores on the select items it was evaluated on


def choose(run: Run) -> Choice:
    """Choose the winner: the highest posterior means race on fresh select items.

    Raises:
        CandidateError: Some cannot be evaluated on select items.
        StudyError: Every trial has failed.
    """
    if not run.log.complete():
        first = run.log.finished()[0]
        raise StudyError(f"every trial failed, the first with: {first.error}")
    known, posterior = run.posterior()
    ranked = posterior.ranked([one.trial.violation for one in known])
    best = ranked[: run.spec.search.finalists]
    recipes = [run.recipe_of(known[index].trial) for index in best]
    searched = [run.scores_of(known[index].trial) for index in best]
    run.listener(Stage(f"evaluating the best {len(best)} recipes on the select items"))
    seen = [0] * len(best)

    def evaluate(some: Sequence[int], items: int) -> Floats:
        for finalist in some:
            seen[finalist] = items
        left = [recipes[finalist] for finalist in some]
        _evaluate(run, left, "select", items)
        return run.scores.matrix(left, "select", items)

    def violation(finalist: int, items: int) -> float:
        select = run.scores.stored(recipes[finalist], "select", items)
        return run.scores.violation({"search": searched[finalist], "select": select})

    ends = run.evaluator.block_ends("select")
    budget = SELECT_SHARE * run.store.evaluations()[0]["search"]
    winner = successive_elimination(
        posterior[best],
        run.scores.strata("select"),
        evaluate,
        ends,
        budget=max(budget, len(best) * ends[0]),
        violation=violation,
    )
    selected = run.scores.stored(recipes[winner], "select", seen[winner])
    chosen, mean = known[best[winner]], float(posterior.means[best[winner]])
    untuned = None
    if is_tuned(chosen.trial.point):
        flat = (known[index] for index in ranked if not is_tuned(known[index].trial.point))
        untuned = next(flat, None)
    return Choice(chosen, mean, untuned, selected)


def find_front(run: Run) -> list[Candidate]:
    """Find the Pareto front over the tasks, from search and select items.

    Raises:
        CandidateError: Some cannot be evaluated on select items.
    """
    known = candidates(run.log.complete())
    least = min(one.trial.violation for one in known)
    known = [one for one in known if one.trial.violation == least]
    strata = run.scores.strata("select")
    values = [
        [*(one.trial.tasks[t].value for t in strata.weights), one.trial.value] for one in known
    ]
    known = [known[index] for index in leading(np.array(values), MAX_TRIALS)]
    points = [one.trial.point for one in known]
    posteriors = {}
    for task in strata.weights:
        estimates = np.array([one.trial.tasks[task] for one in known])  # (n, 2)
        posteriors[task] = posterior_of(run.space, points, *estimates.T)
    indices = posterior_front(posteriors, run.spec.search.finalists)
    front = [known[index] for index in indices]
    run.listener(Stage(f"evaluating the {len(front)} recipes of the front on the select items"))
    recipes = [run.recipe_of(one.trial) for one in front]
    _evaluate(run, recipes, "select")
    found = [run.scores.stored(recipe, "select") for recipe in recipes]
    of_front = {task: posterior[indices] for task, posterior in posteriors.items()}
    fresh = np.array([one.values for one in found])
    return [front[index] for index in confirmed(of_front, strata, fresh)]


def conclude(run: Run) -> tuple[Result, Recipe]:
    """Choose the winner, evaluate it and its inputs on the test items, and state the verdict.

    The best donor is named before the test items are opened, so that its interval is honest.
    Donors with a chat template of their own are evaluated under that, too. A winner that fails on
    test items is replaced by the one chosen without it; test items choose nothing else.

    Raises:
        StudyError: Every trial has failed, or a donor, the base or their average has.
    """
    while True:
        with suppress(CandidateError):
            return _conclude(run)


def _evaluate(
    run: Run,
    recipes: Sequence[Recipe],
    split: Split,
    items: int | None = None,
    inputs: Sequence[Evaluated] = (),
) -> None:
    """Evaluate candidates, and inputs beside them, on the first items of a split; None: on all.

    Raises:
        CandidateError: Some candidates have failed; each was noted.
        StudyError: An input has failed.
    """
    failed = run.scores.failures([*recipes, *inputs], split, items)
    numbers = {one.trial.recipe: one.number for one in candidates(run.log.complete())}
    for key in sorted(failed.keys() & numbers.keys(), key=numbers.__getitem__):
        run.log.fail_recipe(key, str(failed[key]))
        run.listener(
            Note(
                f"trial {numbers[key]} fails on the {split} items and is replaced by the next "
                f"best: {failed[key]}"
            )
        )
    needed = {one.key for one in inputs}
    check_inputs(run, {key: failed[key] for key in failed if key in needed or key not in numbers})
    if failed:
        raise CandidateError


def _conclude(run: Run) -> tuple[Result, Recipe]:
    choice = choose(run)
    recipe = run.recipe_of(choice.candidate.trial)
    donor, best = best_donor(run, own_templates=True)
    inputs, own = baselines(run.context.space), under_own_templates(run.context)
    front = find_front(run) if run.spec.search.front else []
    run.listener(Stage("evaluating the winner, base, donors and their average on the test items"))
    fronts = [run.recipe_of(one.trial) for one in front]
    untuned = [run.recipe_of(choice.untuned.trial)] if choice.untuned else []
    earlier = _tested_winners(run, untuned)
    rivals: list[Evaluated] = [*inputs.values(), *own.values()]
    _evaluate(run, [recipe, *fronts, *untuned], "test", inputs=rivals)
    winner = run.scores.stored(recipe, "test")
    compared = {one.key: run.scores.stored(one, "test") for one in rivals}
    seed = run.spec.search.seed
    intervals = {key: winner.minus(scores, seed) for key, scores in compared.items()}
    found = {
        key: Baseline(test=Score.of(scores, seed), difference=Difference.of(intervals[key]))
        for key, scores in compared.items()
    }
    earlier -= {one.key for one in (recipe, *fronts, *rivals)} | run.log.failed.keys()
    evaluations, scoring = run.store.evaluations()
    states = [trial.state for trial in run.log.finished()]
    result = Result(
        verdict=verdict([intervals[key] for key in intervals if key != inputs[UNIFORM].key]),
        winner=tested_winner(run, choice.candidate),
        front=[tested_winner(run, candidate) for candidate in front],
        donors={
            model: Donor(
                **dict(found[inputs[model].key]),
                own_template=found[own[model].key] if model in own else None,
            )
            for model in run.spec.models_but_base
        },
        floors=run.scores.floors({"test": winner}),
        edges=at_edges(run, choice.candidate),
        untuned=_compare_untuned(run, choice.untuned, winner) if choice.untuned else None,
        base=found[inputs[run.spec.base_model].key],
        uniform=found[inputs[UNIFORM].key],
        difference_to_best_donor=DonorDifference(
            donor=donor,
            own_template=isinstance(best, UnderOwnTemplate),
            items_to_decide=items_to_decide(winner, compared[best.key]),
            **found[best.key].difference.model_dump(),
        ),
        search_score=choice.candidate.trial.value,
        posterior_mean=choice.posterior_mean,
        select_score=choice.selected.mean if choice.selected.values else None,
        trials=states.count("complete"),
        failed_trials=states.count("fail"),
        item_evaluations=sum(evaluations.values()),
        split_evaluations=dict(evaluations),
        times_tested=1 + len(earlier),
        seconds=Seconds(score=scoring, **run.seconds()),
        seed=seed,
        versions=package_versions(),
    )
    return result, recipe


def _tested_winners(run: Run, untuned: Sequence[Recipe]) -> set[str]:
    """Return the keys of recipes that were tested as winners, not only for comparison.

    Records ``untuned`` recipes as tested for comparison, unless they were tested before.
    """
    compared = {*run.log.header().get("compared", ())}
    tested = set(run.store.recipes("test"))
    if new := {one.key for one in untuned} - tested - compared:
        run.log.set_header(compared=sorted(compared | new))
    return tested - compared


def _compare_untuned(run: Run, candidate: Candidate, winner: ItemScores) -> Untuned:
    """Describe the best candidate without tuned weights, and the winner's lead over it."""
    seed = run.spec.search.seed
    scores = run.scores.stored(run.recipe_of(candidate.trial), "test")
    return Untuned(
        **dict(tested_winner(run, candidate)),
        difference=Difference.of(winner.minus(scores, seed)),
    )


def at_edges(run: Run, winner: Candidate) -> list[AtEdge]:
    """Describe the edges of ranges, as they were searched, at which the winner lies."""
    space = around(run.context.space, [trial.point for trial in run.log.complete()])
    return [*edges(space, winner.trial.point)]


def tested_winner(run: Run, candidate: Candidate) -> Winner:
    """Describe a chosen candidate: its recipe, and its score on the test items."""
    recipe = run.recipe_of(candidate.trial)
    return Winner(
        recipe=recipe.model_dump(mode="json"),
        trial=candidate.number,
        test=Score.of(run.scores.stored(recipe, "test"), run.spec.search.seed),
    )


def other_trial(run: Run, number: int, recipe: Recipe, result: Result | None) -> OtherTrial | None:
    """Describe a finished trial's recipe; None if it is the winner's."""
    if result and Recipe.model_validate(result.winner.recipe).key == recipe.key:
        return None
    trial = next(trial for trial in run.log.finished() if trial.number == number)
    tested = not run.evaluator.missing_blocks(recipe, "test")
    return OtherTrial(
        number,
        trial.estimate and trial.estimate.value,
        trial.items,
        Score.of(run.scores.stored(recipe, "test"), run.spec.search.seed) if tested else None,
    )
