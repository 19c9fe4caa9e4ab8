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
from search.proposing.edges import edges, widen_to
from search.proposing.gp import posterior_of
from search.proposing.gp_sampler import MAX_TRIALS
from search.proposing.recipes import is_tuned
from search.proposing.starts import UNIFORM, baselines
from search.racing.elimination import JointPosterior, successive_elimination
from search.racing.item_scores import ItemScores
from search.racing.pareto import confirmed, leading, posterior_front
from search.racing.race import Floats
from search.racing.verdict import SELECT_SHARE, items_to_decide, verdict
from search.running.baselines import check_inputs, named_inputs, rank_donors
from search.running.evaluator import Evaluated, UnderOwnTemplate, under_own_templates
from search.running.events import Note, Stage
from search.running.run import Run
from search.storing.result import (
    Baseline,
    Difference,
    Donor,
    DonorDifference,
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

    winner: Candidate
    posterior_mean: float  # of its value, after the search
    select_scores: ItemScores  # on the select items it was evaluated on
    # The recipe without tuned weights that has the highest posterior mean, where the winner's are
    # tuned; None: they are not, or there is none.
    untuned: Candidate | None


def choose(run: Run) -> Choice:
    """Choose the winner: the highest posterior means race on fresh select items.

    Raises:
        CandidateError: Some cannot be evaluated on select items.
        StudyError: Every trial has failed.
    """
    if not run.log.complete():
        first = run.log.finished()[0]
        raise StudyError(f"every trial failed, the first with: {first.error}")
    ranked, posterior = run.ranked_candidates()
    finalists = ranked[: run.spec.search.finalists]
    run.listener(Stage(f"evaluating the best {len(finalists)} recipes on the select items"))
    index, scores = _race_finalists(run, finalists, posterior[range(len(finalists))])
    winner, untuned = finalists[index], None
    if is_tuned(winner.trial.point):
        untuned = next((one for one in ranked if not is_tuned(one.trial.point)), None)
    return Choice(winner, float(posterior.means[index]), scores, untuned)


def _race_finalists(
    run: Run, finalists: Sequence[Candidate], posterior: JointPosterior
) -> tuple[int, ItemScores]:
    """Race candidates, given their posterior after the search, on select items.

    Returns:
        Index of the best, and its scores on the select items it was evaluated on.
    """
    recipes = [run.recipe_of(one.trial) for one in finalists]
    searched = [run.scores_of(one.trial) for one in finalists]
    seen = [0] * len(finalists)

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
    best = successive_elimination(
        posterior,
        run.scores.strata("select"),
        evaluate,
        ends,
        budget=max(budget, len(finalists) * ends[0]),
        violation=violation,
    )
    return best, run.scores.stored(recipes[best], "select", seen[best])


def find_front(run: Run) -> list[Candidate]:
    """Find the Pareto front over the tasks, from search and select items.

    Raises:
        CandidateError: Some cannot be evaluated on select items.
    """
    front, posteriors = _searched_front(run)
    run.listener(Stage(f"evaluating the {len(front)} recipes of the front on the select items"))
    recipes = [run.recipe_of(one.trial) for one in front]
    _evaluate(run, recipes, "select")
    fresh = run.scores.matrix(recipes, "select")
    return [front[index] for index in confirmed(posteriors, run.scores.strata("select"), fresh)]


def _searched_front(run: Run) -> tuple[list[Candidate], dict[str, JointPosterior]]:
    """Find the front of posterior means, and its posterior of each task, after the search."""
    known, tasks = candidates(run.log.complete()), run.context.weights
    least = min(one.trial.violation for one in known)
    known = [one for one in known if one.trial.violation == least]
    values = [[*(one.trial.tasks[task].value for task in tasks), one.trial.value] for one in known]
    known = [known[index] for index in leading(np.array(values), MAX_TRIALS)]
    points = [one.trial.point for one in known]
    posteriors = {}
    for task in tasks:
        estimates = np.array([one.trial.tasks[task] for one in known])  # (n, 2)
        posteriors[task] = posterior_of(run.space, points, *estimates.T)
    front = posterior_front(posteriors, run.spec.search.finalists)
    of_front = {task: posterior[front] for task, posterior in posteriors.items()}
    return [known[index] for index in front], of_front


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
    failed = run.scores.attempt([*recipes, *inputs], split, items)
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
    best = rank_donors(run, own_templates=True)[0]
    front = find_front(run) if run.spec.search.front else []
    times_tested = _test(run, choice, front)
    return _describe(run, choice, front, best, times_tested), run.recipe_of(choice.winner.trial)


def _test(run: Run, choice: Choice, front: Sequence[Candidate]) -> int:
    """Evaluate the winner, the front and all that is compared with them on the test items.

    Returns:
        How many winners have been evaluated on them so far, in earlier sessions, too.
    """
    run.listener(Stage("evaluating the winner, base, donors and their average on the test items"))
    winners = [run.recipe_of(one.trial) for one in (choice.winner, *front)]
    untuned = [run.recipe_of(choice.untuned.trial)] if choice.untuned else []
    inputs = [*named_inputs(run).values()]
    earlier = _tested_winners(run, untuned)
    _evaluate(run, [*winners, *untuned], "test", inputs=inputs)
    return 1 + len(earlier - {one.key for one in (*winners, *inputs)} - run.log.failed.keys())


def _tested_winners(run: Run, untuned: Sequence[Recipe]) -> set[str]:
    """Return the keys of recipes that were tested as winners, not only for comparison.

    Records ``untuned`` recipes as tested for comparison, unless they were tested before.
    """
    compared = {*run.log.header().get("compared", ())}
    tested = set(run.store.recipes("test"))
    if new := {one.key for one in untuned} - tested - compared:
        run.log.set_header(compared=sorted(compared | new))
    return tested - compared


def _describe(
    run: Run,
    choice: Choice,
    front: Sequence[Candidate],
    best: tuple[str, Evaluated],
    times_tested: int,
) -> Result:
    """Compare the winner with base, donors and their average, and describe the run."""
    seed, winner = run.spec.search.seed, choice.winner
    scores = run.scores.stored(run.recipe_of(winner.trial), "test")
    inputs = {
        name: _compared(run, scores, one) for name, one in baselines(run.context.space).items()
    }
    own = {
        name: _compared(run, scores, one) for name, one in under_own_templates(run.context).items()
    }
    uniform = inputs.pop(UNIFORM)
    space = widen_to(run.context.space, [trial.point for trial in run.log.complete()])
    counts, seconds = run.store.evaluations()
    states = [trial.state for trial in run.log.finished()]
    return Result(
        verdict=verdict([one.difference.interval for one in (*inputs.values(), *own.values())]),
        winner=_tested(run, winner),
        front=[_tested(run, one) for one in front],
        donors={
            name: Donor(**dict(inputs[name]), own_template=own.get(name))
            for name in run.spec.models_but_base
        },
        floors=run.scores.floors({"test": scores}),
        edges=[*edges(space, winner.trial.point)],
        untuned=_untuned(run, scores, choice.untuned) if choice.untuned else None,
        base=inputs[run.spec.base_model],
        uniform=uniform,
        difference_to_best_donor=_lead_over(run, scores, *best),
        search_score=winner.trial.value,
        posterior_mean=choice.posterior_mean,
        select_score=choice.select_scores.mean if choice.select_scores.values else None,
        trials=states.count("complete"),
        failed_trials=states.count("fail"),
        item_evaluations=sum(counts.values()),
        split_evaluations=dict(counts),
        times_tested=times_tested,
        seconds=Seconds(score=sum(seconds.values()), **run.seconds()),
        seed=seed,
        versions=package_versions(),
    )


def _compared(run: Run, winner: ItemScores, one: Evaluated) -> Baseline:
    scores, seed = run.scores.stored(one, "test"), run.spec.search.seed
    lead = Difference.of(winner.minus(scores, seed))
    return Baseline(test=Score.of(scores, seed), difference=lead)


def _lead_over(run: Run, winner: ItemScores, donor: str, evaluated: Evaluated) -> DonorDifference:
    return DonorDifference(
        donor=donor,
        own_template=isinstance(evaluated, UnderOwnTemplate),
        items_to_decide=items_to_decide(winner, run.scores.stored(evaluated, "test")),
        **dict(_compared(run, winner, evaluated).difference),
    )


def _untuned(run: Run, winner: ItemScores, candidate: Candidate) -> Untuned:
    lead = _compared(run, winner, run.recipe_of(candidate.trial)).difference
    return Untuned(**dict(_tested(run, candidate)), difference=lead)


def _tested(run: Run, candidate: Candidate) -> Winner:
    """Describe a candidate by its recipe and its score on the test items."""
    recipe = run.recipe_of(candidate.trial)
    return Winner(
        recipe=recipe.model_dump(mode="json"),
        trial=candidate.number,
        test=Score.of(run.scores.stored(recipe, "test"), run.spec.search.seed),
    )
