"""Events for programs: one JSON object a line, the last one the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, TextIO

from search.running import events
from search.showing.progress import Progress, write_stopping

if TYPE_CHECKING:
    from search.storing.trials import TrialRecord


def _stored(event: events.RunFinished) -> dict[str, Any]:
    """Read a run's result from its file, which names folders without their paths."""
    from search.storing.result import RESULT

    stored: dict[str, Any] = json.loads((event.folder / RESULT).read_bytes())
    return stored


# Name and facts of each kind of event but trials; kinds that are not listed are not written.
_LINES: Final[Mapping[type, Callable[[Any], tuple[str, Mapping[str, Any]]]]] = {
    events.PlanReady: lambda event: ("plan", {"text": str(event.line)}),
    events.Note: lambda event: ("note", {"text": event.text}),
    events.Stage: lambda event: ("stage", {"text": event.text}),
    events.SearchStarted: lambda event: (
        "start",
        {"trials": len(event.finished), "of": event.trials},
    ),
    events.ScoreReady: lambda event: (
        "result",
        event.score.model_dump() | {"split": event.split, "items": event.items},
    ),
    events.StepTaken: lambda event: ("step", asdict(event)),
    events.SamplesReady: lambda event: (
        "result",
        {"samples": [sample.model_dump(mode="json") for sample in event.samples]},
    ),
    events.RunFinished: lambda event: ("result", _stored(event) | {"run": str(event.folder)}),
    events.CommandDone: lambda event: ("result", event.facts),
}


class JsonLines:
    """Listener that writes JSON lines to a file."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._progress = Progress()

    def __call__(self, event: events.Event) -> None:
        """Handle an event."""
        self._progress.update(event)
        if isinstance(event, events.TrialFinished):
            self._print("trial", self._describe(event.trial))
        elif isinstance(event, events.StopRequested):
            write_stopping()
        elif line := _LINES.get(type(event)):
            self._print(*line(event))

    def _print(self, name: str, facts: Mapping[str, Any]) -> None:
        print(json.dumps({"event": name, **facts}), file=self._file, flush=True)

    def _describe(self, trial: TrialRecord) -> dict[str, Any]:
        return {
            "trial": trial.number,
            "trials": self._progress.done,
            "of": self._progress.total,
            "state": trial.state,
            "value": trial.estimate and trial.estimate.value,
            "tasks": {task: one.value for task, one in trial.tasks.items()},
            "items": trial.items,
            "error": trial.error,
            "best": self._progress.best is trial,
            "start": trial.start,
            "params": trial.point,
            "item_evaluations": self._progress.evaluations,
        }
