"""The end of a run: the winner on fresh items, the truth on a third kind, result.json."""

from __future__ import annotations

from optuna.trial import TrialState

from merge_engine.recipe import Recipe
from objectives.scores import bootstrap
from search.result import (
    Baseline,
    Difference,
    DonorDifference,
    Result,
    Score,
    Seconds,
    Winner,
    package_versions,
)
from search.runner import Run
from search.selection import Sheet, ranked, verdict
from search.space import UNIFORM
from search.spec import StudyError


def choose(run: Run) -> tuple[int, Recipe]:
    """The winner among the finalists: best on search and fresh select items together.

    Returns:
        The number of the trial that first proposed it, and the recipe.

    Raises:
        StudyError: Not one trial could be scored.
    """
    candidates = run.recipes()
    if not candidates:
        errors = sorted({str(trial.user_attrs.get("error")) for trial in run.finished()})
        raise StudyError(f"every trial failed, the first with: {errors[0]}")
    floors = run.spec.objective.constraints
    searched = {key: run.sheet(recipe, "search") for key, (_, recipe) in candidates.items()}
    finalists = ranked(searched, floors)[: run.spec.search.finalists]
    run.progress.stage(f"asking the best {len(finalists)} recipes the select items")
    both = {key: searched[key] + run.sheet(candidates[key][1], "select") for key in finalists}
    return candidates[ranked(both, floors)[0]]


def conclude(run: Run) -> tuple[Result, Recipe]:
    """Choose the winner, ask it and its inputs the test items, and say what is true of it.

    The best donor is named before the test items are opened, so that its interval is honest.
    """
    number, recipe = choose(run)
    baselines = run.bench.space.baselines()
    run.progress.stage("asking the winner and what it was made from the test items")
    known = {
        model: (run.sheet(baselines[model], "search") + run.sheet(baselines[model], "select")).mean
        for model in run.spec.models
    }
    best_donor = max(known, key=lambda model: known[model])
    winner = run.sheet(recipe, "test")
    compared = {name: run.sheet(baseline, "test") for name, baseline in baselines.items()}
    seed = run.spec.search.seed
    intervals = {name: winner.minus(sheet, seed) for name, sheet in compared.items()}
    found = {
        name: Baseline(test=score_of(sheet, seed), difference=Difference.of(intervals[name]))
        for name, sheet in compared.items()
    }
    tested = run.store.recipes("test") - {baseline.key for baseline in baselines.values()}
    evaluations, scoring = run.store.scored()
    states = [trial.state for trial in run.finished()]
    result = Result(
        verdict=verdict([intervals[name] for name in baselines if name != UNIFORM]),
        winner=Winner(
            recipe=recipe.model_dump(mode="json"), trial=number, test=score_of(winner, seed)
        ),
        donors={model: found[model] for model in run.spec.models},
        base=found[run.spec.base_model],
        uniform=found[UNIFORM],
        difference_to_best_donor=DonorDifference(
            donor=best_donor, **found[best_donor].difference.model_dump()
        ),
        search_score=run.sheet(recipe, "search").mean,
        select_score=run.sheet(recipe, "select").mean,
        trials=states.count(TrialState.COMPLETE),
        failed_trials=states.count(TrialState.FAIL),
        item_evaluations=evaluations,
        times_tested=max(1, len(tested)),
        seconds=Seconds(score=scoring, **run.seconds()),
        seed=seed,
        versions=package_versions(),
    )
    return result, recipe


def score_of(sheet: Sheet, seed: int) -> Score:
    """A sheet's means, and the 95 % bootstrap interval of their weighted mean."""
    interval = bootstrap(sheet.answers, sheet.tasks, sheet.weights, seed=seed)
    return Score(mean=interval.mean, ci95=(interval.low, interval.high), tasks=sheet.by_task)
