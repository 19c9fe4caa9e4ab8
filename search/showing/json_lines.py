"""Events for programs: one JSON object a line, the last one the result."""

from __future__ import annotations

import json
from functools import singledispatchmethod
from typing import Any, TextIO

from search.running.events import (
    CommandDone,
    Event,
    Note,
    PlanReady,
    RunFinished,
    SamplesReady,
    ScoreReady,
    SearchStarted,
    Stage,
    StopRequested,
    TrialFinished,
)
from search.showing.progress import Progress, write_stopping


class JsonLines:
    """Listener that writes JSON lines to a file.

    Events that change nothing for a program (blocks, races, incumbents) are left out.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._progress = Progress()

    def __call__(self, event: Event) -> None:
        """Write an event."""
        self._progress.update(event)
        self._write(event)

    def _print(self, name: str, **facts: Any) -> None:
        print(json.dumps({"event": name, **facts}), file=self._file, flush=True)

    @singledispatchmethod
    def _write(self, event: Event) -> None:
        pass

    @_write.register
    def _(self, event: PlanReady) -> None:
        self._print("plan", text=str(event.line))

    @_write.register
    def _(self, event: Note) -> None:
        self._print("note", text=event.text)

    @_write.register
    def _(self, event: Stage) -> None:
        self._print("stage", text=event.text)

    @_write.register
    def _(self, event: SearchStarted) -> None:
        self._print("start", trials=len(event.finished), of=event.trials)

    @_write.register
    def _(self, event: TrialFinished) -> None:
        trial, progress = event.trial, self._progress
        self._print(
            "trial",
            trial=trial.number,
            trials=progress.done,
            of=progress.total,
            state=trial.state,
            value=trial.estimate and trial.estimate.value,
            tasks={task: one.value for task, one in trial.tasks.items()},
            items=trial.items,
            error=trial.error,
            best=progress.best is trial,
            start=trial.start,
            params=trial.point,
            item_evaluations=progress.evaluations,
        )

    @_write.register
    def _(self, event: StopRequested) -> None:  # noqa: ARG002
        write_stopping()

    @_write.register
    def _(self, event: ScoreReady) -> None:
        self._print("result", **event.score.model_dump(), split=event.split, items=event.items)

    @_write.register
    def _(self, event: SamplesReady) -> None:
        samples = [sample.model_dump(mode="json") for sample in event.samples]
        self._print("result", samples=samples)

    @_write.register
    def _(self, event: RunFinished) -> None:
        self._print("result", **event.result.model_dump(mode="json"), run=str(event.folder))

    @_write.register
    def _(self, event: CommandDone) -> None:
        self._print("result", **event.facts)
