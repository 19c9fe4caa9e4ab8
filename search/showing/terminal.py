"""Events for people: a live view during a search, and permanent lines and tables.

Without an interactive terminal, every trial is a line.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from functools import singledispatchmethod
from typing import TYPE_CHECKING, Final

from rich.console import Console, RenderableType
from rich.live import Live

from merge_engine.methods import METHODS
from merge_engine.models.memory_plan import MemoryPlan
from objectives.base import printable
from search.running import events
from search.showing.live_view import View, estimate_of, render
from search.showing.markup import shown
from search.showing.progress import Progress, write_stopping
from search.showing.tables import print_result, print_sample, print_score
from search.wording import duration

if TYPE_CHECKING:
    from search.storing.trials import TrialRecord

LEAST_TRIALS: Final = 10  # finished in this session, for an estimate of the time left
LATEST_TRIALS: Final = 20  # whose pace that estimate follows


class Terminal:
    """Listener that writes to a terminal or a pipe."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress()
        self._view = View(self._progress)
        self._live: Live | None = None
        self._began = 0.0  # when this session's search was begun
        self._evaluations_before = 0  # item evaluations of earlier sessions
        self._concluding = 0  # item evaluations after the search
        self._finish_times = deque[float](maxlen=LATEST_TRIALS)  # of this session's trials

    def __call__(self, event: events.Event) -> None:
        """Handle an event."""
        self._progress.update(event)
        self._show(event)

    @singledispatchmethod
    def _show(self, event: events.Event) -> None:
        pass

    @_show.register
    def _(self, event: events.PlanReady) -> None:
        self._say(str(event.line))
        if isinstance(event.line, MemoryPlan):
            self._view = replace(self._view, memory=str(event.line).removeprefix("memory: "))

    @_show.register
    def _(self, event: events.Note) -> None:
        self.console.print(f"[yellow]note:[/] {shown(event.text)}", highlight=False)

    @_show.register
    def _(self, event: events.SearchStarted) -> None:
        self._began = time.perf_counter()
        self._evaluations_before, self._concluding = event.evaluations, event.concluding
        if event.finished:
            done, total = len(event.finished), event.trials
            self._say(f"resumed: {done} of {total} trials are finished already")
        if self.console.is_interactive and self._live is None:
            self._live = Live(
                get_renderable=self._render,
                console=self.console,
                transient=True,
                vertical_overflow="crop",
            )
            self._live.start()

    @_show.register
    def _(self, event: events.RaceProgressed) -> None:
        self._view = replace(self._view, racing=tuple(event.trials), tuning=None)

    @_show.register
    def _(self, event: events.StepTaken) -> None:
        self._view = replace(self._view, tuning=event, racing=())

    @_show.register
    def _(self, event: events.TrialFinished) -> None:
        trial = event.trial
        better = self._progress.best is trial
        self._finish_times.append(time.perf_counter())
        if self._live is None or better or trial.state == "fail":
            self._say(self._line(trial, better))

    @_show.register
    def _(self, event: events.IncumbentChanged) -> None:
        mean = event.posterior_mean
        self._view = replace(self._view, incumbent=event.trial, posterior_mean=mean)

    @_show.register
    def _(self, event: events.Stage) -> None:
        self._say(event.text)
        self._view = replace(self._view, searching=False, racing=())

    @_show.register
    def _(self, event: events.StopRequested) -> None:  # noqa: ARG002
        if self._live is None:
            write_stopping()
        self._view = replace(self._view, stopping=True)

    @_show.register
    def _(self, event: events.SessionEnded) -> None:  # noqa: ARG002
        self._end_live_view()

    @_show.register
    def _(self, event: events.ScoreReady) -> None:
        print_score(self.console, event)

    @_show.register
    def _(self, event: events.SamplesReady) -> None:
        for sample in event.samples:
            print_sample(self.console, sample)

    @_show.register
    def _(self, event: events.RunFinished) -> None:
        self._end_live_view()
        print_result(self.console, event.result, event.folder)

    @_show.register
    def _(self, event: events.CommandDone) -> None:
        if event.text:
            self._say(event.text)

    def _end_live_view(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _say(self, line: str) -> None:
        self.console.print(printable(line), highlight=False, markup=False)

    def _render(self) -> RenderableType:
        return render(replace(self._view, left=self._seconds_left()))

    def _seconds_left(self) -> float | None:
        """Estimate the seconds left, of trials at the latest pace and of the conclusion."""
        if len(self._finish_times) < LEAST_TRIALS:
            return None
        first, last = self._finish_times[0], self._finish_times[-1]
        per_trial = (last - first) / (len(self._finish_times) - 1)
        evaluations = self._progress.evaluations - self._evaluations_before
        per_item = (last - self._began) / max(1, evaluations)
        trials = self._progress.total - self._progress.done
        return per_trial * trials + per_item * self._concluding

    def _line(self, trial: TrialRecord, better: bool) -> str:
        what = trial.start or _describe_point(trial)
        done, total = self._progress.done, self._progress.total
        line = f"{done}/{total}  trial {trial.number}  {estimate_of(trial)}  {what}"
        if trial.state == "fail":
            line += f"  failed: {trial.error}"
        else:
            line += f"  {trial.items} items"
        if better:
            line += "  <- best so far"
        left = self._seconds_left() if self._live is None else None
        return line if left is None else f"{line}  (about {duration(left)} left)"


def _describe_point(trial: TrialRecord) -> str:
    """Name the method, the weights and the parameters that change what the method does."""
    method = str(trial.point.get("method"))
    params = METHODS[method].params if method in METHODS else {}
    effective = {name for name, param in params.items() if param.effect}
    numbers = (
        f"{name}={value:.2f}"
        for name, value in trial.point.items()
        if name in effective or name.startswith(("scale", "mix_", "strength", "position"))
    )
    return " ".join([method, *numbers])
