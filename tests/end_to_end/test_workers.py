"""Several real workers: their scores, the winner they save, and kills of Ray's."""

import math
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from typing_extensions import override

from merge_engine.models.model_set import AlignedTensors
from merge_engine.numerics.kernel_runner import KernelRunner
from objectives.base import ObjectiveError
from objectives.items import blocks
from pack_holder import mapped
from ray_actors import ray_workers
from search.cli import main
from search.preparing.context import load, load_outline, plan_study
from search.preparing.models import Hardware
from search.running.conclusion import conclude
from search.running.search_loop import search
from search.running.tuner import Tuner
from search.running.workers import AnswerJob, AnswerReply, EvalJob, Worker
from search.storing.folder import DATABASE
from search.storing.snapshot import snapshot_items
from search.storing.store import Store
from search.storing.trials import TrialLog
from search.study.reading import load_study
from simulated import SimulatedWorkers, simulated_run


@dataclass
class SeveralWorkers(SimulatedWorkers):
    """Real workers in this process, whose jobs end in the order of simulated times."""

    workers: Sequence[Worker] = ()

    @override
    def evaluate(self, worker, job):
        return self.workers[worker].do(job)

    @override
    def call(self, method, *args):
        return getattr(self.workers[-1], method)(*args)


@pytest.fixture(scope="module")
def study(make_study, tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("study"), search__trials=12)


@pytest.fixture(scope="module")
def contexts(study):
    return [load(plan_study(load_study(study)), Hardware("cpu")) for _ in range(2)]


@pytest.fixture(scope="module")
def run(contexts, tmp_path_factory):
    """A run whose search two workers have finished."""
    first = contexts[0]
    workers = SeveralWorkers(first.objective, size=2, workers=[*map(Worker, contexts)])
    run = simulated_run(tmp_path_factory.mktemp("finished") / "run", first, workers)
    search(run)
    assert workers.most == 2
    return run


def test_scores_from_several_workers_are_those_from_one(run, contexts):
    context = contexts[0]
    for trial in run.log.complete()[::5]:
        context.builder.build(run.recipe_of(trial))
        items = context.splits.search[: trial.items]
        alone = context.objective.score(context.builder.model, items)
        assert run.scores_of(trial).values == tuple(result.value for result in alone)


def test_three_workers_take_the_steps_that_one_takes(make_study, tmp_path):
    study = make_study(tmp_path / "study", search__trials=2, search__tune=True)
    live = [load(plan_study(load_study(study)), Hardware("cpu")) for _ in range(3)]
    weights = []
    for count in (1, 3):
        crew = SeveralWorkers(live[0].objective, size=count, workers=[*map(Worker, live)])
        run = simulated_run(tmp_path / str(count), live[0], crew)
        Tuner(run, math.inf).advance([])
        assert crew.most == count
        weights.append(run.store.states(points=True)[-1])
    assert weights[0] == pytest.approx(weights[1], rel=1e-3, abs=1e-5)


def test_answers_of_two_workers_are_in_the_order_of_the_items(run, contexts, monkeypatch):
    for context in contexts:  # the models' own answers are all wrong
        monkeypatch.setattr(context.objective, "right_answers", lambda _, items: [*map(str, items)])
    recipe, items = run.recipe_of(run.log.complete()[0]), run.context.splits.search
    jobs = [AnswerJob(recipe, part) for part in blocks(items, 5)]
    replies = run.evaluator.do_all(jobs, AnswerReply)
    assert [answer for each in replies for answer in each.answers] == [*map(str, items)]


def test_winner_is_chosen_and_saved_as_it_was_scored(run, tmp_path):
    result, recipe = conclude(run)
    compared, differing, _ = run.evaluator.export(recipe, tmp_path / "checkpoint", "# a card")
    assert (tmp_path / "checkpoint" / "model.safetensors").is_file()
    assert (tmp_path / "checkpoint" / "README.md").read_text() == "# a card"
    assert compared >= 24 + 8  # the test, and a block of the search
    assert not differing
    assert result.trials == 12


@pytest.mark.parametrize("where", ["read", "merge", "score"])
def test_candidate_without_memory_fails_alone_and_leaves_nothing(run, contexts, monkeypatch, where):
    context = contexts[0]
    worker, builder = Worker(context), context.builder
    first, second, *_ = run.log.complete()
    recipe, items = run.recipe_of(first), context.splits.search[:3]
    expected = worker.evaluate(EvalJob(recipe, items)).results

    def full(*_args, **_settings):
        torch.empty(1 << 50)

    builder.model_set.release()
    with monkeypatch.context() as patch:
        owner, name = {
            "read": (AlignedTensors, "read"),
            "merge": (KernelRunner, "write"),
            "score": (type(builder.model.model.layers[0].mlp), "forward"),
        }[where]
        patch.setattr(owner, name, full)
        with pytest.raises(ObjectiveError, match=r"out of memory: \d+ bytes more were wanted"):
            worker.evaluate(EvalJob(run.recipe_of(second), items))
    assert (builder.loaded is None) == (where != "score")  # half a merge is never evaluated
    assert not builder.model_set.measurements.kept
    again = worker.evaluate(EvalJob(recipe, items)).results
    assert [result.value for result in again] == [result.value for result in expected]


def test_context_without_weights_has_the_same_items(study, run):
    outline = load_outline(plan_study(load_study(study)))
    assert outline.splits == run.context.splits
    assert outline.space == run.context.space
    assert snapshot_items(outline.objective, outline.splits) == run.store.items()


def test_missing_ray_is_an_error_before_anything_is_prepared(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["run", str(study), "--out", str(tmp_path / "run"), "--workers", "2"]
    assert main(command) == 2
    assert "--workers needs Ray: pip install 'mergesearch[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_ray_that_does_not_start_is_an_error_of_one_sentence(study, tmp_path, monkeypatch, capsys):
    def init(**options):
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(pytest.importorskip("ray"), "init", init)
    command = ["run", str(study), "--out", str(tmp_path / "run"), "--workers", "2"]
    assert main(command) == 2
    said = "Ray could not start: The current node timed out during startup"
    assert said in capsys.readouterr().err


def blocks_of(run):
    """List the evaluated blocks."""
    try:
        with sqlite3.connect(f"file:{run / DATABASE}?mode=ro", uri=True) as database:
            return database.execute(
                "select recipe, split, block from mergesearch_answers"
            ).fetchall()
    except sqlite3.Error:  # not made yet
        return []


def finished_in(run):
    return TrialLog(Store(run / DATABASE).study()).finished()


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
        one, other = (each.pid for each in first)
        while process.poll() is None and not {*mapped(one)} & {*mapped(other)}:
            time.sleep(0.01)  # until both have the same copy of a donor
        first[0].kill()
        wait_for(24)
        process.kill()
    finished = finished_in(run)
    before = set(blocks_of(run))
    assert len(before) >= 24
    assert main(command[3:]) == 0  # one worker, in this process
    trials = finished_in(run)
    assert [trial.number for trial in trials] == list(range(12))
    assert {trial.state for trial in trials} == {"complete"}
    assert all(trials[one.number].value == one.value for one in finished)
    assert before < set(blocks_of(run))
