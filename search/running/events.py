"""Events of a command, and the listener that shows them: a terminal, or JSON lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # events are light
    from merge_engine.models.memory_plan import MemoryPlan
    from search.racing.race import Estimate
    from search.storing.result import Result, Score
    from search.storing.samples import Sample
    from search.storing.trials import TrialRecord


class Event:
    """Something that a listener shows or counts."""


@dataclass(frozen=True)
class PlanReady(Event):
    """A line of a command's plan: memory, item evaluations, workers."""

    line: str | MemoryPlan


@dataclass(frozen=True)
class Note(Event):
    """A remark for the user."""

    text: str


@dataclass(frozen=True)
class Stage(Event):
    """A part of the work outside the search begins or has ended."""

    text: str


@dataclass(frozen=True)
class SearchStarted(Event):
    """A search begins, or is resumed."""

    trials: int  # at most, earlier sessions' included
    finished: Sequence[TrialRecord]  # trials of earlier sessions
    evaluations: int  # item evaluations of earlier sessions
    concluding: int  # item evaluations after the search, about


@dataclass(frozen=True)
class BlockEvaluated(Event):
    """A job was evaluated: one block of items, or several."""

    items: int


@dataclass(frozen=True)
class StepTaken(Event):
    """Weights were updated by a gradient."""

    step: int  # how many updates there were on this path
    of: int  # until its next point, which is a trial
    loss: float  # mean over the items of the step, before the update
    evaluations: int  # item evaluations that it took


@dataclass(frozen=True)
class TrialProgress:
    """How far a trial in the race is evaluated."""

    trial: int  # its number
    method: str  # of its recipe
    blocks: int  # evaluated so far
    of: int  # blocks of the search split
    # Over the incumbent on the items both were evaluated on; None: nothing to compare.
    lead: Estimate | None


@dataclass(frozen=True)
class RaceProgressed(Event):
    """Trials in the race, by number."""

    trials: Sequence[TrialProgress]


@dataclass(frozen=True)
class TrialFinished(Event):
    """A trial has its estimate, or has failed."""

    trial: TrialRecord


@dataclass(frozen=True)
class IncumbentChanged(Event):
    """The feasible trial with the highest posterior mean, recomputed."""

    trial: TrialRecord
    posterior_mean: float


@dataclass(frozen=True)
class StopRequested(Event):
    """The run will end after the jobs under way; sent from a signal handler."""


@dataclass(frozen=True)
class SessionEnded(Event):
    """The work on a run is over, or has failed."""


@dataclass(frozen=True)
class ScoreReady(Event):
    """A model's score on a split, and what ``score`` prints of each item."""

    model: str
    split: str
    score: Score
    items: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class SamplesReady(Event):
    """Responses of a run's models to the same prompts."""

    samples: Sequence[Sample]


@dataclass(frozen=True)
class RunFinished(Event):
    """A run has a result."""

    result: Result
    folder: Path


@dataclass(frozen=True)
class CommandDone(Event):
    """Any other command is done: text for people, facts for programs."""

    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)


Listener = Callable[[Event], None]
