"""What a command says while it works: to people (``terminal``), or to programs (``--json``)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from merge_engine.models.memory_plan import MemoryPlan
    from search.racing.race import Estimate
    from search.running.sampling import Sample
    from search.storing.result import Result, Score
    from search.storing.trials import TrialRecord

STOPPING = "stopping after this block; Ctrl-C again stops now"


@dataclass(frozen=True)
class RaceProgress:
    """A trial at work.

    Args:
        trial: Its number.
        method: Of its recipe.
        blocks: That are answered.
        of: So many, if it is asked all.
        lead: Over the best so far on the items both have answered; None: nothing to compare.
    """

    trial: int
    method: str
    blocks: int
    of: int
    lead: Estimate | None


class Output(Protocol):
    """Hears of a command's events as they happen."""

    def plan(self, line: str | MemoryPlan) -> None:
        """What will be where, before anything is loaded."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def start(
        self, total: int, finished: Sequence[TrialRecord], evaluations: int, after: int
    ) -> None:
        """A search begins, or goes on after finished trials and so many item evaluations.

        About as many as ``after`` follow it.
        """

    def block(self, items: int) -> None:
        """A block of items was answered."""

    def racing(self, trials: Sequence[RaceProgress]) -> None:
        """These trials are at work."""

    def trial(self, trial: TrialRecord) -> None:
        """A trial was told."""

    def believes(self, best: TrialRecord, value: float) -> None:
        """This trial is believed to be the best so far, luck taken away."""

    def stage(self, what: str) -> None:
        """The search is over and something else begins."""

    def stopping(self) -> None:
        """The run ends with this block; called by a signal's handler."""

    def stop(self) -> None:
        """The work is over, or has failed."""

    def score(self, model: str, split: str, score: Score, items: Sequence[dict[str, Any]]) -> None:
        """What ``score`` has found."""

    def samples(self, samples: Sequence[Sample]) -> None:
        """What models write to the same prompts."""

    def result(self, result: Result, run: Path) -> None:
        """What a run has found."""

    def done(self, text: str, **facts: Any) -> None:
        """What another command has done."""


@dataclass
class Tally:
    """The trials so far."""

    total: int = 0
    done: int = 0
    evaluations: int = 0
    best: TrialRecord | None = None

    def add(self, trial: TrialRecord) -> bool:
        """Count a finished trial; whether it is the best so far."""
        self.done += 1
        better = trial.state == "complete" and (
            self.best is None or trial.sort_key < self.best.sort_key
        )
        if better:
            self.best = trial
        return better


class JsonLines:
    """One JSON object a line for every event; the last is the result.

    Args:
        file: Where to.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._tally = Tally()

    def plan(self, line: str | MemoryPlan) -> None:
        """A line of it."""
        self._print("plan", text=str(line))

    def note(self, text: str) -> None:
        """Its text."""
        self._print("note", text=text)

    def start(
        self,
        total: int,
        finished: Sequence[TrialRecord],
        evaluations: int,
        after: int,  # noqa: ARG002
    ) -> None:
        """How many trials there are to be, and how many there are."""
        self._tally = Tally(total, 0, evaluations)
        for trial in finished:
            self._tally.add(trial)
        self._print("start", trials=len(finished), of=total)

    def block(self, items: int) -> None:
        """Counted."""
        self._tally.evaluations += items

    def racing(self, trials: Sequence[RaceProgress]) -> None:
        """Not said."""

    def trial(self, trial: TrialRecord) -> None:
        """What it is and what it was told, as ``report`` has it; values are not in %."""
        better = self._tally.add(trial)
        self._print(
            "trial",
            trial=trial.number,
            trials=self._tally.done,
            of=self._tally.total,
            state=trial.state,
            value=trial.estimate and trial.estimate.value,
            tasks={task: one.value for task, one in trial.tasks.items()},
            items=trial.items,
            error=trial.error,
            best=better,
            start=trial.start,
            params=trial.point,
            item_evaluations=self._tally.evaluations,
        )

    def believes(self, best: TrialRecord, value: float) -> None:
        """Not said."""

    def stage(self, what: str) -> None:
        """Its name."""
        self._print("stage", text=what)

    def stopping(self) -> None:
        """Said to whoever has pressed the keys."""
        say_stopping()

    def stop(self) -> None:
        """Nothing to put away."""

    def score(
        self,
        model: str,  # noqa: ARG002
        split: str,
        score: Score,
        items: Sequence[dict[str, Any]],
    ) -> None:
        """Each item's answer, too."""
        self._print("result", **score.model_dump(), split=split, items=items)

    def samples(self, samples: Sequence[Sample]) -> None:
        """As in samples.json."""
        self._print("result", samples=[sample.model_dump(mode="json") for sample in samples])

    def result(self, result: Result, run: Path) -> None:
        """As in result.json."""
        self._print("result", **result.model_dump(mode="json"), run=str(run))

    def done(self, text: str, **facts: Any) -> None:  # noqa: ARG002
        """The facts alone."""
        self._print("result", **facts)

    def _print(self, event: str, **facts: Any) -> None:
        print(json.dumps({"event": event, **facts}), file=self._file, flush=True)


def duration(seconds: float) -> str:
    """In seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def say_stopping() -> None:
    """Write a line in a signal's handler, where a stream that is being written to may not be."""
    os.write(2, f"\nmergesearch: {STOPPING}\n".encode())
