"""The end of a run: the winner on fresh items, the truth on a third kind, result.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from optuna.trial import TrialState

from merge_engine.recipe.recipe import Recipe
from objectives.scores import score_interval
from search.proposing.gp import MODELLED
from search.proposing.starts import UNIFORM, baselines
from search.racing.item_scores import (
    SELECT_SHARE,
    ItemScores,
    items_to_decide,
    verdict,
)
from search.racing.pareto import believed_front, confirmed, leading
from search.racing.race import Floats, elect
from search.running.run import Candidate, Run
from search.showing.card import OtherTrial
from search.storing.result import (
    Baseline,
    Difference,
    DonorDifference,
    Result,
    Score,
    Seconds,
    Winner,
    package_versions,
)
from search.study.spec import StudyError


@dataclass(frozen=True)
class Choice:
    """The winner and what was thought of it before the test.

    Args:
        candidate: The winner.
        believed: Its value as the search believes it, luck taken away.
        selected: Its answers to the select items it was asked.
    """

    candidate: Candidate
    believed: float
    selected: ItemScores


def choose(run: Run) -> Choice:
    """The winner: those that the search believes in most are raced on fresh select items.

    Raises:
        StudyError: Not one trial could be scored.
    """
    if not run.candidates():
        errors = sorted({str(trial.user_attrs.get("error")) for trial in run.finished()})
        raise StudyError(f"every trial failed, the first with: {errors[0]}")
    candidates, belief = run.beliefs()
    missed = [candidate.missed for candidate in candidates]
    best = belief.ranked(missed)[: run.spec.search.finalists]
    searched = [run.sheet_of(candidates[place].trial) for place in best]
    run.output.stage(f"asking the best {len(best)} recipes the select items")
    asked = [0] * len(best)

    def ask(some: Sequence[int], items: int) -> Floats:
        for finalist in some:
            asked[finalist] = items
        return run.answers([candidates[best[one]].recipe for one in some], "select", items)

    def missing(finalist: int, items: int) -> float:
        select = run.sheet(candidates[best[finalist]].recipe, "select", items)
        return run.missed({"search": searched[finalist], "select": select})

    ends = run.ends("select")
    budget = SELECT_SHARE * run.store.scored()[0]["search"]
    place = elect(
        belief[best],
        run.strata("select"),
        ask,
        ends,
        budget=max(budget, len(best) * ends[0]),
        shortfall=missing,
    )
    winner = candidates[best[place]]
    selected = run.sheet(winner.recipe, "select", asked[place])
    return Choice(winner, float(belief.means[best[place]]), selected)


def find_front(run: Run) -> list[Candidate]:
    """Those whom no other is believed to beat on every task, fresh select items considered."""
    candidates, finalists = run.candidates(), run.spec.search.finalists
    least = min(candidate.missed for candidate in candidates)
    candidates = [candidate for candidate in candidates if candidate.missed == least]
    strata = run.strata_of_goals("select")
    by_task = [
        [one.trial.user_attrs["tasks"][goal][0] for goal in strata.weights] for one in candidates
    ]
    means = [candidate.value for candidate in candidates]
    candidates = [candidates[i] for i in leading(np.column_stack([by_task, means]), MODELLED)]
    trials = [candidate.trial for candidate in candidates]
    places, beliefs = believed_front(
        run.bench.space,
        [trial.params for trial in trials],
        {
            goal: np.array([trial.user_attrs["tasks"][goal] for trial in trials])
            for goal in strata.weights
        },
        finalists,
    )
    front = [candidates[place] for place in places]
    run.output.stage(f"asking the {len(front)} recipes of the front the select items")
    run.scorer.ask([candidate.recipe for candidate in front], "select")
    values = [run.goals(run.sheet(candidate.recipe, "select")) for candidate in front]
    return [front[i] for i in confirmed(beliefs, strata, np.array(values))]


def conclude(run: Run) -> tuple[Result, Recipe]:
    """Choose the winner, ask it and its inputs the test items, and say what is true of it.

    The best donor is named before the test items are opened, so that its interval is honest.
    """
    choice = choose(run)
    recipe, best_donor = choice.candidate.recipe, run.best_donor()
    inputs = baselines(run.bench.space)
    front = find_front(run) if run.spec.search.front else []
    run.output.stage("asking the winner and what it was made from the test items")
    tested = [recipe, *(one.recipe for one in front), *inputs.values()]
    run.scorer.ask(tested, "test")
    winner = run.sheet(recipe, "test")
    members = [tested_winner(run, candidate) for candidate in front]
    compared = {name: run.sheet(baseline, "test") for name, baseline in inputs.items()}
    seed = run.spec.search.seed
    intervals = {name: winner.minus(sheet, seed) for name, sheet in compared.items()}
    found = {
        name: Baseline(test=score_of(sheet, seed), difference=Difference.of(intervals[name]))
        for name, sheet in compared.items()
    }
    others = run.store.recipes("test") - {one.key for one in tested}
    asked, scoring = run.store.scored()
    states = [trial.state for trial in run.finished()]
    result = Result(
        verdict=verdict([intervals[name] for name in inputs if name != UNIFORM]),
        winner=tested_winner(run, choice.candidate),
        front=members,
        donors={model: found[model] for model in run.spec.models_but_base},
        floors=run.floors({"test": winner}),
        base=found[run.spec.base_model],
        uniform=found[UNIFORM],
        difference_to_best_donor=DonorDifference(
            donor=best_donor,
            items_to_decide=items_to_decide(winner, compared[best_donor]),
            **found[best_donor].difference.model_dump(),
        ),
        search_score=choice.candidate.value,
        believed_score=choice.believed,
        select_score=choice.selected.mean if choice.selected.answers else None,
        trials=states.count(TrialState.COMPLETE),
        failed_trials=states.count(TrialState.FAIL),
        item_evaluations=sum(asked.values()),
        items_asked=dict(asked),
        times_tested=1 + len(others),
        seconds=Seconds(score=scoring, **run.seconds()),
        seed=seed,
        versions=package_versions(),
    )
    return result, recipe


def tested_winner(run: Run, candidate: Candidate) -> Winner:
    """A chosen candidate's recipe, and its score on the test items."""
    return Winner(
        recipe=candidate.recipe.model_dump(mode="json"),
        trial=candidate.number,
        test=score_of(run.sheet(candidate.recipe, "test"), run.spec.search.seed),
    )


def other_trial(run: Run, number: int, recipe: Recipe, result: Result | None) -> OtherTrial | None:
    """What is known of a finished trial's recipe, or None if it is the winner's."""
    if result and Recipe.model_validate(result.winner.recipe).key == recipe.key:
        return None
    trial = next(trial for trial in run.finished() if trial.number == number)
    blocks = run.store.answers(recipe.key, "test")
    tested = sum(map(len, blocks.values())) == len(run.bench.items_of("test"))
    return OtherTrial(
        number,
        trial.values[0] if trial.values else None,
        trial.user_attrs.get("items", 0),
        score_of(run.sheet(recipe, "test"), run.spec.search.seed) if tested else None,
    )


def score_of(sheet: ItemScores, seed: int) -> Score:
    """A sheet's means, and the 95 % interval of their weighted mean."""
    interval = score_interval(sheet.answers, sheet.tasks, sheet.weights, seed=seed)
    return Score(
        mean=interval.mean,
        ci95=(interval.low, interval.high),
        tasks=sheet.by_task,
        tokens=sheet.tokens,
    )
