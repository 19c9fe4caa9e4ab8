"""Several workers: what they do at once, what becomes of one that dies, and what a kill costs."""

import contextlib
import random
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
from rich.console import Console

from search.cli import main
from search.preparing.context import load, load_outline, plan_study
from search.preparing.models import Hardware
from search.proposing.recipes import to_recipe
from search.proposing.starts import warm_starts
from search.running.baselines import open_race
from search.running.conclusion import conclude
from search.running.run import Run
from search.running.search_loop import SearchLoop, search
from search.running.workers import FAILURES, Worker, WorkerDied
from search.showing.terminal import Terminal
from search.storing.folder import DATABASE
from search.storing.snapshot import freeze
from search.storing.store import Store
from search.storing.trials import TrialLog
from search.study.reading import load_study


class Crew:
    """Three real workers in this process; chance says whose job ends next, and who dies of it."""

    count = 3

    def __init__(self, workers, deadly=lambda job: False):
        self.workers = workers
        self.random = random.Random(0)
        self.deadly = deadly
        self.jobs = {}
        self.most = 0  # jobs at once

    def submit(self, place, job):
        assert place not in self.jobs
        self.jobs[place] = job
        self.most = max(self.most, len(self.jobs))

    def next(self):
        place = self.random.choice(sorted(self.jobs))
        job = self.jobs.pop(place)
        if self.deadly(job):
            return place, WorkerDied("killed")
        try:
            return place, self.workers[place].evaluate(job)
        except FAILURES as error:
            return place, error

    def call(self, method, *args):
        return getattr(self.workers[-1], method)(*args)


@pytest.fixture(scope="module")
def study(make_study, tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("study"), search__trials=12)


@pytest.fixture(scope="module")
def three(study):
    return [Worker(load(plan_study(load_study(study)), Hardware("cpu"))) for _ in range(3)]


def run_of(folder, crew):
    folder.mkdir(exist_ok=True)
    run = Run(folder, crew.workers[0].context, crew, Terminal(Console(quiet=True)))
    run.bind_to_store()
    return run


def told(run):
    """Finished trials as they were told, one after another."""
    return sorted(run.log.finished(), key=lambda trial: trial.tell_order)


@pytest.fixture(scope="module")
def done(three, tmp_path_factory):
    """A run by three, its race as it was at its end, and who was at work."""
    crew = Crew(three)
    run = run_of(tmp_path_factory.mktemp("done") / "run", crew)
    races = []
    with pytest.MonkeyPatch.context() as patch:
        kept = lambda run: races.append(open_race(run)) or races[-1]  # noqa: E731
        patch.setattr("search.running.search_loop.open_race", kept)
        search(run)
    return run, races[0], crew


def test_every_trial_is_told_once_and_never_waits_for_the_others(done):
    run, _, crew = done
    order = [trial.number for trial in told(run)]
    assert sorted(order) == list(range(12))
    assert order != sorted(order)  # some overtook others
    assert crew.most == 3


def test_answers_are_those_that_one_worker_gives(done):
    run, _, crew = done
    worker = Worker(crew.workers[0].context)
    for trial in told(run)[::5]:
        recipe = to_recipe(run.context.space, trial.point)
        worker.context.builder.build(recipe)
        asked = worker.context.splits.search[: trial.items]
        alone = worker.context.objective.score(worker.context.builder.model, asked)
        assert run.scores_of(trial).values == tuple(answer.value for answer in alone)


def test_race_of_a_resumed_run_is_the_one_that_was_stopped(done):
    run, race, crew = done
    again = open_race(Run(run.folder, run.context, crew, run.listener))
    assert len(again.evaluated) == len(race.evaluated) > 1
    for one, other in zip(again.evaluated, race.evaluated, strict=True):
        assert one.mean == other.mean
        assert np.array_equal(one.values, other.values)


def test_winner_is_chosen_and_saved_as_it_was_scored(done, tmp_path):
    run, _, _ = done
    result, recipe = conclude(run)
    compared, differing, _ = run.evaluator.export(recipe, tmp_path / "checkpoint", "# a card")
    assert (tmp_path / "checkpoint" / "model.safetensors").is_file()
    assert (tmp_path / "checkpoint" / "README.md").read_text() == "# a card"
    assert compared >= 24 + 8  # the test, and a block of the search
    assert not differing
    assert result.trials == 12


def test_equal_proposals_at_work_at_once_are_asked_once(three, tmp_path):
    crew = Crew(three)
    run = run_of(tmp_path / "run", crew)
    point = run.context.space.point("task_arithmetic", (0.3, 0.2, 0.1))
    for _ in range(3):
        run.log.enqueue(point)
    search(run)  # storing a block twice is an error
    first, second, third = run.log.finished()[:3]
    assert first.point == second.point == third.point
    assert len(run.log.finished()) == 12


def test_last_trial_is_asked_by_all_who_would_be_idle(three, tmp_path):
    crew = Crew(three)
    run = run_of(tmp_path / "run", crew)
    open_race(run)
    crew.most = 0
    spec = run.spec.model_copy(update={"search": run.spec.search.model_copy(update={"trials": 1})})
    run.context = replace(run.context, spec=spec)
    search(run)
    assert len(run.log.finished()) == 1
    assert crew.most == 2  # of its three blocks the first was known


def test_stopped_run_has_stored_what_was_at_work_and_goes_on(three, tmp_path, monkeypatch):
    crew = Crew(three)
    run = run_of(tmp_path / "run", crew)
    asked = []
    run.evaluator.on_block = lambda items: (
        asked.append(0) or setattr(run.evaluator, "stopping", len(asked) > 20)
    )
    with pytest.raises(KeyboardInterrupt):
        search(run)
    assert not crew.jobs
    assert len(blocks_of(tmp_path / "run")) == len(asked)
    begun = {trial.number for trial in run.log.records() if trial.state != "waiting"}
    assert len(run.log.finished()) < len(begun) < 12
    again = run_of(tmp_path / "run", crew)
    with monkeypatch.context() as stopped:
        stopped.setattr(SearchLoop, "_exhausted", lambda *_: True)
        search(again)  # as it would have ended, had nobody stopped it
    assert {trial.number for trial in told(again)} == begun
    search(again)
    assert sorted(trial.number for trial in told(again)) == list(range(12))


def test_worker_that_dies_is_replaced_and_its_block_asked_again(three, tmp_path):
    chance = random.Random(1)
    crew = Crew(three, deadly=lambda job: chance.random() < 0.02)
    deaths = []
    crew.deadly = lambda job, deadly=crew.deadly: deadly(job) and not deaths.append(job)
    run = run_of(tmp_path / "run", crew)
    search(run)
    assert deaths
    assert {trial.state for trial in run.log.finished()} == {"complete"}


def test_candidate_that_kills_two_workers_is_set_aside(three, tmp_path):
    crew = Crew(three)
    run = run_of(tmp_path / "run", crew)
    bad = to_recipe(run.context.space, warm_starts(run.context.space)[6][1])
    crew.deadly = lambda job: job.recipe == bad
    search(run)
    states = {trial.recipe: trial.state for trial in run.log.finished()}
    assert states.pop(bad.key) == "fail"
    assert set(states.values()) == {"complete"}
    (failed,) = [trial for trial in run.log.finished() if trial.state == "fail"]
    assert failed.error == "it ended its worker 2 times: killed"


def test_outline_without_weights_shows_the_same_items(study, done):
    run, _, _ = done
    spec = load_study(study)
    bench = load_outline(plan_study(spec))
    assert bench.splits == run.context.splits
    assert bench.space == run.context.space
    assert freeze(bench.objective, bench.splits) == run.store.items()


def test_missing_ray_is_said_before_anything_is_prepared(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["run", str(study), "--out", str(tmp_path / "run"), "--workers", "2"]
    assert main(command) == 2
    assert "--workers needs Ray: pip install 'mergesearch[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def blocks_of(run):
    """What has been answered, block by block."""
    try:
        with sqlite3.connect(run / DATABASE) as database:
            return database.execute(
                "select recipe, split, block from mergesearch_answers"
            ).fetchall()
    except sqlite3.Error:  # not made yet
        return []


def finished_in(run):
    return TrialLog(Store(run / DATABASE).study()).finished()


def ray_workers(process):
    """The worker processes of a run."""
    named = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if "ray::_Actor" in " ".join(child.cmdline()[:1]):
                named[child.pid] = (child, child.ppid())
    # what a worker starts has its name
    return [child for child, parent in named.values() if parent not in named]


def test_ray_workers_and_the_coordinator_may_be_killed(study, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "search.cli", "run", str(study), "--out", str(run)]
    command += ["--device", "cpu"]
    with subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.PIPE) as process:

        def wait_for(count):
            while process.poll() is None and len(blocks_of(run)) < count:
                time.sleep(0.01)

        wait_for(10)
        first = ray_workers(process)
        assert len(first) == 2
        first[0].kill()
        wait_for(24)
        process.kill()
    told = finished_in(run)
    before = set(blocks_of(run))
    assert len(before) >= 24
    assert main(command[3:]) == 0  # one worker, in this process
    trials = finished_in(run)
    assert [trial.number for trial in trials] == list(range(12))
    assert {trial.state for trial in trials} == {"complete"}
    assert all(trials[one.number].value == one.value for one in told)
    assert before < set(blocks_of(run))
