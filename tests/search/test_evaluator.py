"""Jobs and blocks: what is asked at once, what is stored, and what a kill loses."""

import multiprocessing
import os
import signal

import pytest

from landscape import planted
from objectives.base import ObjectiveError
from search.proposing.starts import baselines
from search.running import evaluator as module
from search.storing.folder import JOURNALS, check_run_folder
from search.study.spec import StudyError
from simulated import SimulatedWorkers, simulated_context, simulated_run

COUNTS = {"search": 60, "select": 60, "test": 250}


@pytest.fixture
def context():
    return simulated_context(planted(0), 0, COUNTS)


def evaluated(context, folder, recipes, **settings):
    workers = SimulatedWorkers(context.objective, **settings)
    run = simulated_run(folder, context, workers)
    run.scores.evaluate(recipes, "test")
    return run, workers


@pytest.mark.parametrize("size", [1, 3])
def test_split_that_is_asked_whole_takes_fewer_jobs_and_gives_the_same_answers(
    context, tmp_path, monkeypatch, size
):
    recipes = [*baselines(context.space).values()]
    whole, in_jobs = evaluated(context, tmp_path / "whole", recipes, size=size)
    monkeypatch.setattr(module, "JOB_ITEMS", 1)  # a job is one block
    parts, in_blocks = evaluated(context, tmp_path / "parts", recipes, size=size)
    assert len(in_jobs.jobs) == 3 * len(recipes)  # 250 items, 100 at once
    assert len(in_blocks.jobs) == 13 * len(recipes)  # 20 at once
    for recipe in recipes:
        stored = whole.evaluator.stored(recipe, "test")
        assert stored == parts.evaluator.stored(recipe, "test")
        assert len(stored) == COUNTS["test"]
        assert whole.store.blocks(recipe.key, "test") == set(range(13))


def test_jobs_end_at_the_same_items_whatever_is_stored(context, tmp_path):
    recipe = next(iter(baselines(context.space).values()))
    run, workers = evaluated(context, tmp_path / "run", [])
    run.evaluator.submit(recipe, "test", 6)
    run.evaluator.collect()
    run.scores.evaluate([recipe], "test")
    order = context.splits.test
    jobs = [job.items for job in workers.jobs]
    assert jobs == [order[120:140], order[:100], order[100:120] + order[140:200], order[200:]]


def test_job_of_several_blocks_alone_has_a_journal_until_it_is_stored(context, tmp_path):
    recipe, other, *_ = baselines(context.space).values()
    journals = []

    def note(job):
        journals.append(job.journal)
        if job.journal:
            job.journal.parent.mkdir(exist_ok=True)
            job.journal.write_text("responses")

    run, workers = evaluated(context, tmp_path / "run", [recipe, other], failure=note)
    run.evaluator.submit(recipe, "search", 0)
    run.evaluator.collect()
    *long, last = journals
    assert last is None
    assert len({*long}) == len(long) == len(workers.jobs) - 1
    assert {journal.parent for journal in long} == {(tmp_path / "run" / JOURNALS).absolute()}
    assert [*(tmp_path / "run" / JOURNALS).iterdir()] == []


def test_what_is_in_place_of_the_folder_of_journals_is_refused(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "study.db").touch()
    check_run_folder(run)
    (run / JOURNALS).write_text("mine")
    with pytest.raises(StudyError, match="journals is not a folder"):
        check_run_folder(run)
    (run / JOURNALS).unlink()
    (run / JOURNALS).symlink_to(tmp_path)
    with pytest.raises(StudyError, match="journals is a link"):
        check_run_folder(run)


def test_kill_in_the_middle_of_a_job_keeps_those_before_and_the_same_job_is_asked_again(
    context, tmp_path
):
    recipe, folder = next(iter(baselines(context.space).values())), tmp_path / "run"
    jobs = []

    def kill(job):
        jobs.append(job)
        if len(jobs) == 2:
            (tmp_path / "journal").write_text(str(job.journal))
            os.kill(os.getpid(), signal.SIGKILL)

    killed = multiprocessing.get_context("fork").Process(
        target=evaluated, args=(context, folder, [recipe]), kwargs={"failure": kill}
    )
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    again, later = evaluated(context, folder, [recipe])
    assert [len(job.items) for job in later.jobs] == [100, 50]
    assert str(later.jobs[0].journal) == (tmp_path / "journal").read_text()
    assert len(again.evaluator.stored(recipe, "test")) == COUNTS["test"]


def test_job_that_fails_leaves_no_results_and_ends_its_recipe_alone(context, tmp_path):
    first, second, *_ = baselines(context.space).values()

    def failure(job):
        return ObjectiveError("NaN") if job.recipe.key == first.key else None

    workers = SimulatedWorkers(context.objective, failure=failure)
    run = simulated_run(tmp_path / "run", context, workers)
    assert [*run.evaluator.attempt([first, second], "test")] == [first.key]
    assert run.store.blocks(first.key, "test") == set()
    assert len(run.store.blocks(second.key, "test")) == 13


def test_exported_recipe_is_asked_in_the_jobs_in_which_it_was(context, tmp_path):
    recipe = next(iter(baselines(context.space).values()))
    run, workers = evaluated(context, tmp_path / "run", [recipe])
    for number in (0, 1):
        run.evaluator.submit(recipe, "search", number)
        run.evaluator.collect()
    asked = []
    workers.call = lambda method, recipe, evaluated, out, card: asked.extend(evaluated)
    run.evaluator.export(recipe, tmp_path / "out", "")
    assert {job.items for job, _ in asked} == {job.items for job in workers.jobs}
    assert all(len(job.items) == len(results) for job, results in asked)
