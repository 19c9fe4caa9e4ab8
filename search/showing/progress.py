"""Progress of a search, counted from its events."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from search.running.events import (
    BlockEvaluated,
    Event,
    SearchStarted,
    StepTaken,
    TrialFinished,
)

if TYPE_CHECKING:
    from search.storing.trials import TrialRecord

STOPPING: Final = "stopping after this block; Ctrl-C again stops now"


@dataclass
class Progress:
    """Trials and item evaluations so far."""

    total: int = 0  # trials at most
    done: int = 0  # trials that are finished
    evaluations: int = 0  # item evaluations, earlier sessions' included
    best: TrialRecord | None = None  # the feasible trial with the highest estimate

    def update(self, event: Event) -> None:
        """Count an event."""
        match event:
            case SearchStarted():
                self.total, self.done, self.best = event.trials, 0, None
                self.evaluations = event.evaluations
                for trial in event.finished:
                    self._add(trial)
            case BlockEvaluated():
                self.evaluations += event.items
            case StepTaken():
                self.evaluations += event.evaluations
            case TrialFinished():
                self._add(event.trial)

    def _add(self, trial: TrialRecord) -> None:
        self.done += 1
        if trial.state == "complete" and (self.best is None or trial.sort_key < self.best.sort_key):
            self.best = trial


def write_stopping() -> None:
    """Announce the stop from a signal handler, where a buffered stream may be mid-write."""
    os.write(2, f"\nmergesearch: {STOPPING}\n".encode())
