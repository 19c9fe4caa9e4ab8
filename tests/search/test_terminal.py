"""What a run shows while it goes on: in a terminal, in a pipe, and to programs."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest
from rich.console import Console

from search.cli import main
from search.racing.race import Estimate
from search.running.events import BlockEvaluated, RaceProgress, SearchStarted, TrialFinished
from search.showing.live_view import View, render
from search.showing.terminal import LEAST_TRIALS, Terminal
from search.storing.result import Result
from search.storing.trials import TrialRecord

BEST = TrialRecord(
    number=9,
    state="complete",
    point={"method": "ties", "scale": 0.75},
    estimate=Estimate(0.8831, 0.01),
    items=20,
    tasks={"demo_sort": Estimate(0.9, 0.1), "demo_know\x1b[2J": Estimate(0.5, 0.1)},
)
VIEW = View(
    total=100,
    done=23,
    best=BEST,
    posterior_mean=0.871,
    racing=(RaceProgress(23, "dare_linear", 3, 12, Estimate(-0.021, 0.0361**2)),),
    evaluations=9780,
    left=200.0,
    memory="3 MiB for the live model",
)


def lines_of(view, width=80):
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(render(view))
        return console.export_text().splitlines()


def test_view_has_the_trials_the_best_and_those_at_work():
    text = "\n".join(lines_of(VIEW))
    assert "trial 23 of at most 100" in text
    assert "about 3 min left" in text
    assert "posterior mean 87.1 %, estimate 88.3 %, trial 9, ties at scale 0.75" in text
    assert "sort 90.0" in text
    assert "\x1b" not in text
    assert "trial 23  3 of 12 blocks  lead -2.1 ± 3.6 over the best  dare_linear" in text
    assert "9,780 evaluations" in text
    assert "3 MiB for the live model" in text


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_each_fact_is_one_line_that_fits(width):
    lines = lines_of(VIEW, width)
    assert max(map(len, lines)) <= min(width, 80)
    assert len([line for line in lines if line.strip()]) == (6 if width >= 40 else 7)


def test_of_many_trials_at_work_four_are_shown():
    many = tuple(RaceProgress(number, "ties", 0, 12, None) for number in range(7))
    text = "\n".join(lines_of(View(total=100, racing=many)))
    assert "trial 3" in text
    assert "trial 4" not in text
    assert "and 3 more" in text


def test_time_left_is_said_when_there_is_a_pace_and_has_what_follows_the_search(monkeypatch):
    clock = SimpleNamespace(perf_counter=iter(range(0, 100, 2)).__next__)
    monkeypatch.setattr("search.showing.terminal.time", clock)
    with io.StringIO() as file:
        terminal = Terminal(Console(file=file, width=200))
        terminal(SearchStarted(20, [], 500, 300))
        for _ in range(LEAST_TRIALS):
            terminal(BlockEvaluated(20))
            terminal(TrialFinished(BEST))
        *before, last = file.getvalue().splitlines()
    assert "left" not in "".join(before)
    assert last.endswith("(about 50 s left)")  # 10 trials of 2 s, 300 items of 0.1 s


def command(study, folder, *options):
    common = ["--out", str(folder / "run"), "--device", "cpu", "--trials", "4"]
    return ["run", str(study), *common, *options]


def all_of(ours):
    """What comes out of a pseudo-terminal until its other end is closed."""
    written = b""
    with suppress(OSError):
        while data := os.read(ours, 1 << 16):
            written += data
    os.close(ours)
    return written.decode()


def test_terminal_has_a_live_view_that_goes_away(make_study, tmp_path, monkeypatch):
    for name, value in {"TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "80", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    ours, theirs = pty.openpty()
    with ThreadPoolExecutor() as threads:
        reading = threads.submit(all_of, ours)
        with open(theirs, "w") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            assert main(command(make_study(tmp_path), tmp_path)) == 0
        written = reading.result()
    assert "of at most 4" in written
    assert not re.search(r"\x1b\[[\d;]*3\dm", written), "a colour, though there is to be none"
    after = written[written.rindex("\x1b[?25h") :]  # the cursor is shown again
    assert "of at most" not in after
    assert "on the test items" in after


def test_json_is_an_object_for_every_event_and_there_is_no_noise(make_study, tmp_path):
    run = tmp_path / "run"
    mine = [sys.executable, "-m", "search.cli", *command(make_study(tmp_path), tmp_path, "--json")]
    said = subprocess.run(mine, capture_output=True, text=True, check=True)
    assert said.stderr == ""
    events = [json.loads(line) for line in said.stdout.splitlines()]
    trials = [event for event in events if event["event"] == "trial"]
    assert [trial["trial"] for trial in trials] == [0, 1, 2, 3]
    assert {"plan", "start", "stage", "trial", "result"} == {event["event"] for event in events}
    result = events[-1]
    assert result.pop("event") == "result"
    assert result.pop("run") == str(run)
    assert Result.model_validate(result) == Result.model_validate_json(
        (run / "result.json").read_bytes()
    )


@pytest.mark.parametrize(
    "wrong", [["check", "nowhere.yaml"], ["run", "study.yaml"], ["run", "--trials", "x"]]
)
def test_json_ends_with_the_error(wrong, capsys):
    assert main([*wrong, "--json"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("mergesearch: ")
    error = json.loads(said.out.splitlines()[-1])
    assert error["event"] == "error"
    assert error["exit"] == 2
    assert error["message"] in said.err


def test_check_prints_its_plan_as_json(make_study, tmp_path, capsys):
    study = make_study(tmp_path)
    assert main(["check", str(study), "--json"]) == 0
    *plan, result = map(json.loads, capsys.readouterr().out.splitlines())
    assert "memory" in " ".join(event["text"] for event in plan)
    assert result == {"event": "result", "file": str(study)}
