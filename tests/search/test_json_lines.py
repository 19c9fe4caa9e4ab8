"""Events of a command as JSON, one object a line."""

import io
import json
import subprocess
import sys

import pytest

from search.cli import main
from search.racing.race import Estimate
from search.running.events import (
    BlockEvaluated,
    CommandDone,
    IncumbentChanged,
    Note,
    SearchStarted,
    TrialFinished,
)
from search.showing.json_lines import JsonLines
from search.storing.trials import TrialRecord


def lines_of(*events):
    file = io.StringIO()
    listener = JsonLines(file)
    for event in events:
        listener(event)
    return [json.loads(line) for line in file.getvalue().splitlines()]


def test_trial_has_its_estimate_and_the_counts_so_far():
    done = TrialRecord(0, "fail", error="NaN")
    trial = TrialRecord(
        number=1,
        state="complete",
        point={"method": "ties"},
        start="base",
        estimate=Estimate(0.75, 0.01),
        items=24,
        tasks={"sort": Estimate(0.5, 0.1)},
    )
    start, line = lines_of(
        SearchStarted(16, [done], 100, 50),
        BlockEvaluated(24),
        IncumbentChanged(trial, 0.7),
        TrialFinished(trial),
    )
    assert start == {"event": "start", "trials": 1, "of": 16}
    assert line == {
        "event": "trial",
        "trial": 1,
        "trials": 2,
        "of": 16,
        "state": "complete",
        "value": 0.75,
        "tasks": {"sort": 0.5},
        "items": 24,
        "error": None,
        "best": True,
        "start": "base",
        "params": {"method": "ties"},
        "item_evaluations": 124,
    }


def test_command_that_is_done_has_its_facts_without_its_text():
    note, done = lines_of(Note("slow"), CommandDone("wrote x", {"study": "x"}))
    assert note == {"event": "note", "text": "slow"}
    assert done == {"event": "result", "study": "x"}


def test_json_is_an_object_for_every_event_and_there_is_no_noise(make_study, tmp_path):
    run = tmp_path / "run"
    options = ["--out", str(run), "--device", "cpu", "--trials", "4", "--json"]
    command = ["run", str(make_study(tmp_path)), *options]
    mine = [sys.executable, "-m", "search.cli", *command]
    printed = subprocess.run(mine, capture_output=True, text=True, check=True)
    assert printed.stderr == ""
    events = [json.loads(line) for line in printed.stdout.splitlines()]
    trials = [event for event in events if event["event"] == "trial"]
    assert [trial["trial"] for trial in trials] == [0, 1, 2, 3]
    assert {"plan", "start", "stage", "trial", "result"} == {event["event"] for event in events}
    result = events[-1]
    assert result.pop("event") == "result"
    assert result.pop("run") == str(run)
    assert result == json.loads((run / "result.json").read_text())


@pytest.mark.parametrize(
    "wrong", [["check", "nowhere.yaml"], ["run", "study.yaml"], ["run", "--trials", "x"]]
)
def test_json_ends_with_the_error(wrong, capsys):
    assert main([*wrong, "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("mergesearch: ")
    error = json.loads(printed.out.splitlines()[-1])
    assert error["event"] == "error"
    assert error["exit"] == 2
    assert error["message"] in printed.err


def test_check_prints_its_plan_as_json(make_study, tmp_path, capsys):
    study = make_study(tmp_path)
    assert main(["check", str(study), "--json"]) == 0
    *plan, result = map(json.loads, capsys.readouterr().out.splitlines())
    assert "memory" in " ".join(event["text"] for event in plan)
    assert result == {"event": "result", "file": str(study)}
