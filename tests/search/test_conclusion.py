"""The end of a run on simulated workers: the winner under constraints, and the Pareto front."""

import pytest

from landscape import demo
from objectives.scores import task_means
from search.proposing.starts import baselines
from search.running.conclusion import conclude
from search.running.search_loop import search
from simulated import simulated_context, simulated_run

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
