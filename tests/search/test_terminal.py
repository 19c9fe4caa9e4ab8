"""Output of a run in a terminal and in a pipe."""

import io
import math
import os
import pty
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

from rich.console import Console

from landscape import planted
from search.pipeline import finish
from search.racing.race import Estimate
from search.running.events import BlockEvaluated, SearchStarted, TrialFinished
from search.showing.terminal import LEAST_TRIALS, Terminal
from search.storing.trials import TrialRecord
from simulated import simulated_context, simulated_run

TRIAL = TrialRecord(
    number=9, state="complete", point={"method": "ties"}, estimate=Estimate(0.5, 0.01)
)


def test_time_left_is_shown_after_ten_trials_and_includes_what_follows_the_search(monkeypatch):
    clock = SimpleNamespace(perf_counter=iter(range(0, 100, 2)).__next__)
    monkeypatch.setattr("search.showing.terminal.time", clock)
    with io.StringIO() as file:
        terminal = Terminal(Console(file=file, width=200))
        terminal(SearchStarted(20, [], 500, 300))
        for _ in range(LEAST_TRIALS):
            terminal(BlockEvaluated(20))
            terminal(TrialFinished(TRIAL))
        *before, last = file.getvalue().splitlines()
    assert "left" not in "".join(before)
    assert last.endswith("(about 50 s left)")  # 10 trials of 2 s, 300 items of 0.1 s


def all_of(ours):
    """Read a pseudo-terminal until its other end is closed."""
    written = b""
    with suppress(OSError):
        while data := os.read(ours, 1 << 16):
            written += data
    os.close(ours)
    return written.decode()


def test_terminal_has_a_live_view_that_goes_away(tmp_path, monkeypatch):
    for name, value in {"TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "80", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    counts = {"search": 40, "select": 20, "test": 20}
    context = simulated_context(planted(0), 0, counts, search={"trials": 4})
    ours, theirs = pty.openpty()
    with ThreadPoolExecutor() as threads:
        reading = threads.submit(all_of, ours)
        with open(theirs, "w") as stdout:
            terminal = Terminal(Console(file=stdout))
            finish(simulated_run(tmp_path / "run", context, listener=terminal), math.inf)
        written = reading.result()
    assert "of at most 4" in written
    assert not re.search(r"\x1b\[[\d;]*3\dm", written), "a colour, though there is to be none"
    after = written[written.rindex("\x1b[?25h") :]  # the cursor is shown again
    assert "of at most" not in after
    assert "on the test items" in after


def test_pipe_has_a_line_for_every_trial_and_no_escape_sequence(tmp_path):
    counts = {"search": 40, "select": 20, "test": 20}
    context = simulated_context(planted(0), 0, counts, search={"trials": 4})
    with io.StringIO() as file:
        terminal = Terminal(Console(file=file))
        finish(simulated_run(tmp_path / "run", context, listener=terminal), math.inf)
        text = file.getvalue()
    assert all(f"{number + 1}/4  trial {number}" in text for number in range(4))
    assert "\x1b" not in text
