"""What a finished session leaves in the run folder, on simulated workers."""

import math

import pytest

import search.pipeline
from landscape import planted
from search.pipeline import finish
from search.running.events import Note, RunFinished
from search.storing.result import read_result
from simulated import simulated_context, simulated_run

COUNTS = {"search": 60, "select": 40, "test": 40}


@pytest.fixture(scope="module")
def context():
    return simulated_context(planted(0), 0, COUNTS, search={"trials": 6})


def test_finished_session_leaves_result_recipe_checkpoint_samples_and_report(context, tmp_path):
    events = []
    run = simulated_run(tmp_path / "run", context, listener=events.append)
    finish(run, math.inf)
    names = {path.name for path in run.folder.iterdir()}
    assert names >= {"result.json", "recipe.yaml", "checkpoint", "samples.json", "report.html"}
    assert events[-1] == RunFinished(read_result(run.folder), run.folder)


def test_finishing_again_evaluates_nothing_and_writes_the_card_again(context, tmp_path):
    run = simulated_run(tmp_path / "run", context)
    finish(run, math.inf)
    card, result = run.folder / "checkpoint" / "README.md", read_result(run.folder)
    text = card.read_text()
    card.unlink()
    again = simulated_run(tmp_path / "run", context)
    finish(again, math.inf)
    assert card.read_text() == text
    assert not again.workers.jobs
    repeated = read_result(run.folder)
    assert repeated.model_copy(update={"seconds": result.seconds}) == result


def test_session_whose_time_is_up_concludes(context, tmp_path):
    events = []
    run = simulated_run(tmp_path / "run", context, listener=events.append)
    finish(run, 0.0)
    assert read_result(run.folder).trials == 1
    assert any(isinstance(one, Note) and "the time limit" in one.text for one in events)


def test_report_is_there_during_a_search_and_its_failure_stops_nothing(tmp_path, monkeypatch):
    context = simulated_context(planted(0), 0, COUNTS, search={"trials": 3})
    seen, notes, draw = [], [], search.pipeline.make_report

    def drawing(folder, store):
        seen.append((folder / "report.html").is_file())
        if len(seen) == 2:
            raise KeyError("no such thing")
        return draw(folder, store)

    monkeypatch.setattr(search.pipeline, "make_report", drawing)
    monkeypatch.setattr(search.pipeline, "REPORT_EVERY", 0.0)
    monkeypatch.setattr(search.pipeline, "SHOWING_SHARE", 1e9)
    run = simulated_run(tmp_path / "run", context, listener=notes.append)
    finish(run, math.inf)
    assert seen == [False, True, True, True]
    assert Note("report.html was not written: 'no such thing'") in notes
    assert "The winner is" in (run.folder / "report.html").read_text()
