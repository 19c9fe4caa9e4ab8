"""The end of a run on simulated workers: constraints, the Pareto front, candidates that fail."""

import shutil
from dataclasses import replace
from functools import cached_property

import numpy as np
import pytest

from landscape import Planted, demo, planted
from merge_engine.recipe.recipe import Recipe
from objectives.base import ObjectiveError
from objectives.scores import task_means
from search.proposing.recipes import is_tuned
from search.proposing.space import Space
from search.proposing.starts import baselines
from search.proposing.tuned_path import TunedUnits
from search.proposing.tuning import first_state
from search.running.conclusion import conclude
from search.running.events import Note
from search.running.search_loop import search
from search.storing.store import PathStep
from search.study.spec import StudyError
from simulated import SimulatedWorkers, simulated_context, simulated_run

COUNTS = {"search": 120, "select": 80, "test": 80}


def make_run(folder, *, objective=None, **settings):
    settings = {"trials": 24, "stop": False} | settings
    context = simulated_context(demo(0), 0, COUNTS, search=settings, objective=objective)
    return simulated_run(folder / "run", context)


def test_feasible_candidate_wins_and_a_floor_may_follow_the_base_on_the_same_items(tmp_path):
    floors = {"demo_know": "base - 0.05", "demo_rev": 0.5}
    run = make_run(tmp_path, objective={"constraints": floors})
    search(run)
    base = run.scores.stored(baselines(run.context.space)[run.spec.base_model], "search")
    violations = {}
    for trial in run.log.complete():
        scores = run.scores_of(trial)
        same = slice(len(scores.values))
        of_base = task_means(base.values[same], base.tasks[same])
        short = max(0.0, of_base["demo_know"] - 0.05 - scores.by_task["demo_know"])
        short += max(0.0, 0.5 - scores.by_task["demo_rev"])
        violations[trial.number] = trial.violation
        assert trial.violation == pytest.approx(short)
    assert any(violations.values()), "the floors exclude no candidate"
    assert not all(violations.values())
    result, _ = conclude(run)
    assert violations[result.winner.trial] == 0
    of_base = result.base.test.tasks["demo_know"]
    assert result.floors == {"demo_rev": 0.5, "demo_know": pytest.approx(of_base - 0.05)}


@pytest.fixture(scope="module")
def tuned_run(tmp_path_factory):
    """A searched run with a path of tuned weights that leads to the best recipe there is."""
    landscape = planted(0)
    context = simulated_context(landscape, 0, COUNTS, search={"trials": 16, "stop": False})
    context = replace(context, tuned_units=TunedUnits(((),), (0,)))
    run = simulated_run(tmp_path_factory.mktemp("tuned") / "run", context)
    even = np.full((1, len(run.context.space.donors)), 0.5)
    centre = np.array(landscape.centres["task_arithmetic"][: even.size])[None]
    for step, weights in enumerate((even, centre)):
        run.store.save_step(PathStep(0, step, True, 0, 0.0, {}), first_state(weights))
    run.read_tuned_path()
    point = run.space.point("task_arithmetic", even[0], strength=1.0, position=1.0)
    run.log.enqueue(point, start="tuned, 1 steps")
    search(run)
    return run


def test_tuned_winner_is_compared_with_the_best_recipe_without_tuned_weights(tuned_run):
    run = tuned_run
    result, recipe = conclude(run)
    known, posterior = run.ranked_candidates()
    means = dict(zip([one.number for one in known], posterior.means, strict=True))
    points = {one.number: one.trial.point for one in known}
    assert is_tuned(points[result.winner.trial])
    flat = [number for number, point in points.items() if not is_tuned(point)]
    assert result.untuned.trial == max(flat, key=means.__getitem__)
    other = Recipe.model_validate(result.untuned.recipe)
    scores = [run.scores.stored(one, "test") for one in (recipe, other)]
    assert result.untuned.difference.interval == scores[0].minus(scores[1], result.seed)
    assert result.times_tested == 1, "a recipe that is compared is no winner"
    again, _ = conclude(run)
    assert again.model_copy(update={"seconds": result.seconds}) == result


def test_recipe_without_tuned_weights_that_has_failed_gives_way(tuned_run, tmp_path):
    before, _ = conclude(tuned_run)
    fresh = tmp_path / "fresh"
    shutil.copytree(tuned_run.folder, fresh)
    lost = {before.untuned.trial}
    run = simulated_run(fresh, tuned_run.context)
    run.log.fail_recipe(Recipe.model_validate(before.untuned.recipe).key, "not a number")
    after, _ = conclude(run)
    assert after.untuned.trial not in lost
    assert after.times_tested == 1


def test_what_tuning_gained_is_said_with_its_interval_and_may_be_nothing(tuned_run):
    untuned = conclude(tuned_run)[0].untuned
    for ends, shown in (((0.01, 0.05), False), ((-0.01, 0.05), True)):
        lead = untuned.difference.model_copy(update={"mean": 0.03, "ci95": ends})
        text = untuned.model_copy(update={"difference": lead}).text
        assert f"gained +3.0 [{100 * ends[0]:+.1f}, +5.0] points" in text
        assert ("not shown to have helped" in text) == shown


class OneDonor(Planted):
    """A landscape whose best recipe is its only donor."""

    @cached_property
    def space(self):
        return Space("base", ("donor",), ("task_arithmetic",), (0.0, 1.5), {})


def test_winner_that_is_the_only_donor_is_not_better_than_it(tmp_path):
    landscape = OneDonor({"task_arithmetic": 0.75}, {"task_arithmetic": (1.0,)}, 0.35)
    context = simulated_context(landscape, 0, COUNTS, search={"trials": 8})
    run = simulated_run(tmp_path / "run", context)
    search(run)
    result, _ = conclude(run)
    assert result.base.difference.interval.low > 0
    assert result.donors["donor"].difference.interval.low <= 0
    assert result.verdict == "not better"


def test_front_is_tested_and_concluding_again_evaluates_nothing(tmp_path):
    run = make_run(tmp_path, front=True)
    search(run)
    first, _ = conclude(run)
    assert first.front
    assert len({one.trial for one in first.front}) == len(first.front)
    assert all(one.test.tasks.keys() == run.context.weights.keys() for one in first.front)
    assert first.times_tested == 1
    again, _ = conclude(simulated_run(run.folder, run.context))
    assert again.model_copy(update={"seconds": first.seconds}) == first


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A run with a front that was searched, and not concluded."""
    run = make_run(tmp_path_factory.mktemp("searched"), front=True, trials=16)
    search(run)
    return run


@pytest.fixture(scope="module")
def before(searched, tmp_path_factory):
    """Its result if no candidate fails."""
    return conclude_copy(searched, tmp_path_factory.mktemp("before"))[0]


def failing(run, split, trials):
    """Return a failure of some trials' recipes on the items of a split."""
    of_split = set(getattr(run.context.splits, split))
    keys = {one.recipe for one in run.log.complete() if one.number in trials}

    def failure(job):
        if job.recipe.key in keys and not of_split.isdisjoint(job.items):
            return ObjectiveError(f"item {min(job.items)} is not a number")
        return None

    return failure


def conclude_copy(run, folder, failure=lambda job: None, workers=1, stop_after=None):
    """Conclude a copy of a run; return its result, the notes and the failed trials."""
    shutil.copytree(run.folder, folder, dirs_exist_ok=True)
    notes, jobs = [], []

    def counted(job):
        jobs.append(job)
        if stop_after and len(jobs) > stop_after:
            raise KeyboardInterrupt
        return failure(job)

    team = SimulatedWorkers(run.context.objective, workers, failure=counted)
    copy = simulated_run(folder, run.context, team, notes.append)
    result, _ = conclude(copy)
    failed = {trial.number: trial.error for trial in copy.log.records("fail")}
    return result, [note.text for note in notes if isinstance(note, Note)], failed


@pytest.mark.parametrize("split", ["select", "test"])
def test_winner_that_fails_after_the_search_gives_way_to_the_next_best(
    searched, before, tmp_path, split
):
    lost = {before.winner.trial}
    after, notes, failed = conclude_copy(
        searched, tmp_path / "after", failing(searched, split, lost)
    )
    assert after.winner.trial not in lost
    assert failed.keys() == lost
    assert after.failed_trials == 1
    assert after.trials == before.trials - 1
    assert after.times_tested == 1
    (note,) = notes
    assert f"trial {before.winner.trial} fails on the {split} items and is replaced" in note
    assert "is not a number" in note


@pytest.mark.parametrize("split", ["select", "test"])
def test_front_goes_on_without_a_recipe_that_fails(searched, before, tmp_path, split):
    inputs = {recipe.key for recipe in baselines(searched.context.space).values()}
    known = {one.number for one in searched.log.complete() if one.recipe not in inputs}
    lost = {one.trial for one in before.front} & known - {before.winner.trial}
    assert lost
    after, _, failed = conclude_copy(searched, tmp_path / "after", failing(searched, split, lost))
    assert failed.keys() == lost
    assert after.winner.trial == before.winner.trial
    assert after.front
    assert lost.isdisjoint(one.trial for one in after.front)


@pytest.mark.parametrize("stop_after", [2, 12])
def test_killed_conclusion_with_failures_comes_to_the_same_result(
    searched, before, tmp_path, stop_after
):
    lost = {before.winner.trial}
    failure = failing(searched, "test", lost)
    whole, _, failed = conclude_copy(searched, tmp_path / "whole", failure)
    assert failed.keys() == lost
    with pytest.raises(KeyboardInterrupt):
        conclude_copy(searched, tmp_path / "killed", failure, stop_after=stop_after)
    workers = SimulatedWorkers(searched.context.objective, 2, failure=failure)
    resumed = simulated_run(tmp_path / "killed", searched.context, workers)
    search(resumed)
    assert len(resumed.log.finished()) == len(searched.log.finished())
    again, _ = conclude(resumed)
    assert again.winner == whole.winner
    assert again.front == whole.front
    assert again.failed_trials == whole.failed_trials


def test_failed_recipe_is_not_asked_again(searched, before, tmp_path):
    lost = {before.winner.trial}
    conclude_copy(searched, tmp_path / "run", failing(searched, "test", lost))
    workers = SimulatedWorkers(searched.context.objective)
    conclude(simulated_run(tmp_path / "run", searched.context, workers))
    assert not workers.jobs


def test_run_of_which_no_candidate_is_left_ends_with_one_sentence(searched, tmp_path):
    select = set(searched.context.splits.select)

    def failure(job):
        return ObjectiveError("it is not a number") if select.issuperset(job.items) else None

    with pytest.raises(StudyError, match=r"^every trial failed, the first with: it is not"):
        conclude_copy(searched, tmp_path / "run", failure)


def test_input_that_fails_on_test_items_is_named(searched, tmp_path):
    test, donor = set(searched.context.splits.test), searched.spec.models_but_base[0]
    key = baselines(searched.context.space)[donor].key

    def failure(job):
        broken = job.recipe.key == key and not test.isdisjoint(job.items)
        return ObjectiveError("it is not a number") if broken else None

    with pytest.raises(StudyError, match=f"^{donor} alone: it is not a number"):
        conclude_copy(searched, tmp_path / "run", failure)
