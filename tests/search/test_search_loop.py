"""The search loop on simulated workers: order of trials, kills, interrupts and failures."""

import math
import random

import numpy as np
import pytest

from landscape import planted
from merge_engine.errors import MergeError
from search.proposing.recipes import to_recipe
from search.proposing.starts import warm_starts
from search.running.baselines import open_race
from search.running.evaluator import MAX_DEATHS
from search.running.events import BlockEvaluated, Note, RaceProgressed
from search.running.search_loop import SearchLoop, search
from search.running.workers import WorkerDied
from simulated import SimulatedWorkers, simulated_context, simulated_run

TRIALS = 14
SEARCH = {"trials": TRIALS, "stop": False, "seed": 0}


def make_context(**settings):
    counts = {"search": 60, "select": 40, "test": 40}
    return simulated_context(planted(0), 0, counts, search=SEARCH | settings)


@pytest.fixture(scope="module")
def context():
    return make_context()


@pytest.fixture
def workers(context):
    """Three workers."""
    return SimulatedWorkers(context.objective, size=3)


def in_order_of_telling(run):
    return sorted(run.log.finished(), key=lambda trial: trial.tell_order)


def decisions(run):
    return [(trial.number, trial.point, trial.estimate) for trial in run.log.records()]


def blocks_of(run):
    return {
        (recipe, number)
        for recipe in run.store.recipes("search")
        for number in run.store.blocks(recipe, "search")
    }


def test_every_trial_is_told_once_and_none_waits_for_the_others(context, workers, tmp_path):
    run = simulated_run(tmp_path / "run", context, workers)
    search(run)
    order = [trial.number for trial in in_order_of_telling(run)]
    assert sorted(order) == list(range(TRIALS))
    assert order != sorted(order), "no trial has overtaken another"
    assert workers.most == 3


def test_candidates_are_evaluated_on_the_first_blocks_and_some_are_stopped(context, tmp_path):
    run = simulated_run(tmp_path / "run", context)
    search(run)
    of_trials = {trial.recipe: trial.items for trial in run.log.complete()}
    counts = {recipe: sorted(run.store.blocks(recipe, "search")) for recipe in of_trials}
    assert all(numbers == list(range(len(numbers))) for numbers in counts.values())
    assert {*of_trials.values()} == {20, 40, 60}
    proposed = {trial.recipe for trial in run.log.complete() if not trial.start}
    assert all(20 * len(counts[recipe]) == of_trials[recipe] for recipe in proposed)


def test_same_seed_makes_the_same_decisions_and_another_seed_others(tmp_path):
    runs = []
    seeds = {"one": 0, "same": 0, "other": 1}
    for name, seed in seeds.items():
        searched = make_context(seed=seed, trials=30)  # more than the warm starts
        runs.append(simulated_run(tmp_path / name, searched))
        search(runs[-1])
    one, same, other = map(decisions, runs)
    assert one == same != other


def test_race_of_a_resumed_run_is_the_one_that_was_interrupted(context, tmp_path):
    search(simulated_run(tmp_path / "run", make_context(trials=8)))
    run = simulated_run(tmp_path / "run", context)
    loop = SearchLoop(run, math.inf, ())
    loop.work()
    again = open_race(simulated_run(tmp_path / "run", context))
    assert len(again.evaluated) == len(loop.race.evaluated) > 1
    for one, other in zip(again.evaluated, loop.race.evaluated, strict=True):
        assert one.mean == other.mean
        assert np.array_equal(one.values, other.values)


def test_equal_proposals_in_the_race_at_once_are_evaluated_once(context, workers, tmp_path):
    run = simulated_run(tmp_path / "run", context, workers)
    point = context.space.point("task_arithmetic", (0.3, 0.2, 0.1))
    for _ in range(3):
        run.log.enqueue(point)
    search(run)  # storing a block twice is an error
    first, second, third = run.log.finished()[:3]
    assert first.point == second.point == third.point
    assert first.estimate == second.estimate == third.estimate
    assert len(run.log.finished()) == TRIALS


def test_blocks_of_the_last_trial_are_evaluated_by_all_idle_workers(context, workers, tmp_path):
    run = simulated_run(tmp_path / "run", make_context(trials=1), workers)
    open_race(run)
    workers.most = 0
    search(run)
    assert len(run.log.finished()) == 1
    assert workers.most == 2  # of its three blocks the first was known


def test_timeout_begins_no_trial_but_the_first_and_a_later_session_goes_on(context, tmp_path):
    notes = []
    run = simulated_run(tmp_path / "run", context, listener=notes.append)
    search(run, timeout=0.0)
    assert len(run.log.finished()) == 1
    assert any(isinstance(one, Note) and "the time limit" in one.text for one in notes)
    search(simulated_run(tmp_path / "run", context))
    whole = simulated_run(tmp_path / "whole", context)
    search(whole)
    assert decisions(run) == decisions(whole)


def test_interrupted_search_finishes_its_block_and_goes_on(context, tmp_path):
    blocks, run = [], None

    def interrupt(event):
        if isinstance(event, RaceProgressed):
            blocks.append(event)
            if len(blocks) in (2, 12):
                run.evaluator.stopping = True

    for _ in range(2):
        run = simulated_run(tmp_path / "run", context, listener=interrupt)
        with pytest.raises(KeyboardInterrupt):
            search(run)
    run = simulated_run(tmp_path / "run", context)
    search(run)
    whole = simulated_run(tmp_path / "whole", context)
    search(whole)
    assert decisions(run) == decisions(whole)
    assert blocks_of(run) == blocks_of(whole)


def test_interrupted_search_has_stored_what_was_evaluated_by_all_workers(
    workers, tmp_path, monkeypatch
):
    context, stored = make_context(stop=True), []

    def interrupt(event):
        if isinstance(event, BlockEvaluated):
            stored.append(event.items)
            run.evaluator.stopping = len(stored) > 16

    run = simulated_run(tmp_path / "run", context, workers, interrupt)
    with pytest.raises(KeyboardInterrupt):
        search(run)
    assert run.evaluator.idle == [0, 1, 2]
    assert 20 * len(blocks_of(run)) == sum(stored)
    begun = {trial.number for trial in run.log.records() if trial.state != "waiting"}
    assert len(run.log.finished()) < len(begun) < TRIALS
    again = simulated_run(tmp_path / "run", context, workers)
    with monkeypatch.context() as stopped:
        stopped.setattr("search.running.search_loop.should_stop", lambda *_: True)
        search(again)  # trials that were begun are finished, even after early stopping
    assert {trial.number for trial in again.log.finished()} == begun
    search(again)
    assert sorted(trial.number for trial in again.log.finished()) == list(range(TRIALS))


def test_worker_that_dies_is_replaced_and_its_block_evaluated_again(context, workers, tmp_path):
    generator, deaths = random.Random(1), []

    def failure(job):
        if generator.random() < 0.05 and job not in deaths:
            deaths.append(job)
            return WorkerDied("killed")
        return None

    workers.failure = failure
    run = simulated_run(tmp_path / "run", context, workers)
    search(run)
    assert deaths
    assert {trial.state for trial in run.log.finished()} == {"complete"}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (WorkerDied("killed"), f"it ended its worker {MAX_DEATHS} times: killed"),
        (MergeError("no such merge"), "no such merge"),
    ],
)
def test_candidate_that_fails_is_a_failed_trial_and_the_search_goes_on(
    context, workers, tmp_path, error, message
):
    bad = to_recipe(context.space, warm_starts(context.space)[6][1])
    workers.failure = lambda job: error if job.recipe == bad else None
    run = simulated_run(tmp_path / "run", context, workers)
    search(run)
    states = {trial.recipe: trial.state for trial in run.log.finished()}
    assert states.pop(bad.key) == "fail"
    assert set(states.values()) == {"complete"}
    (failed,) = [trial for trial in run.log.finished() if trial.state == "fail"]
    assert failed.error == message
