"""Events of a command, and who listens to them: a terminal, or a file of JSON lines."""

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


@dataclass(frozen=True)
class PlanReady:
    """A line of what a command will take: memory, item evaluations, workers."""

    line: str | MemoryPlan


@dataclass(frozen=True)
class Note:
    """Something the user should know."""

    text: str


@dataclass(frozen=True)
class Stage:
    """A part of the work begins, or has ended, outside the search."""

    text: str


@dataclass(frozen=True)
class SearchStarted:
    """A search begins, or is resumed."""

    trials: int  # at most, earlier sessions' included
    finished: Sequence[TrialRecord]  # trials of earlier sessions
    evaluations: int  # item evaluations of earlier sessions
    concluding: int  # item evaluations that follow the search, about


@dataclass(frozen=True)
class BlockEvaluated:
    """A recipe was evaluated on a block of so many items."""

    items: int


@dataclass(frozen=True)
class RaceProgress:
    """A trial in the race."""

    trial: int  # its number
    method: str  # of its recipe
    blocks: int  # evaluated so far
    of: int  # blocks of the search split
    # Over the incumbent on the items both were evaluated on; None: nothing to compare.
    lead: Estimate | None


@dataclass(frozen=True)
class RaceProgressed:
    """Trials in the race, by number."""

    trials: Sequence[RaceProgress]


@dataclass(frozen=True)
class TrialFinished:
    """A trial has its estimate, or has failed."""

    trial: TrialRecord


@dataclass(frozen=True)
class IncumbentChanged:
    """The trial with the highest posterior mean among the feasible ones, computed anew."""

    trial: TrialRecord
    posterior_mean: float


@dataclass(frozen=True)
class StopRequested:
    """The run ends after the blocks that are being evaluated; raised in a signal's handler."""


@dataclass(frozen=True)
class SessionEnded:
    """The work on a run is over, or has failed."""


@dataclass(frozen=True)
class ScoreReady:
    """A model's score on a split, and what ``score`` prints of each item."""

    model: str
    split: str
    score: Score
    items: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class SamplesReady:
    """Responses of a run's models to the same prompts."""

    samples: Sequence[Sample]


@dataclass(frozen=True)
class RunFinished:
    """A run has a result."""

    result: Result
    folder: Path


@dataclass(frozen=True)
class CommandDone:
    """Another command is done: its text for people, its facts for programs."""

    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)


Event = (
    PlanReady
    | Note
    | Stage
    | SearchStarted
    | BlockEvaluated
    | RaceProgressed
    | TrialFinished
    | IncumbentChanged
    | StopRequested
    | SessionEnded
    | ScoreReady
    | SamplesReady
    | RunFinished
    | CommandDone
)
Listener = Callable[[Event], None]
