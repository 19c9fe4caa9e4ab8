"""The live view of a run: a pure function from its state to what a terminal shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich.console import Group, OverflowMethod, RenderableType
from rich.constrain import Constrain
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from objectives.base import printable
from search.running.events import STOPPING, RaceProgress, duration
from search.storing.result import short_names

if TYPE_CHECKING:
    from search.storing.trials import TrialRecord

WIDTH: Final = 80
SHOWN: Final = 4  # trials at work; of more, how many more


@dataclass(frozen=True)
class View:
    """A run as it is now.

    Args:
        total: Trials at most.
        done: Trials that are finished.
        best: Of them, as it is believed, or at first as they were told.
        believed: Its value, luck taken away; None: not known yet.
        racing: Those at work.
        evaluations: Item evaluations so far.
        left: Seconds until the run is over; None: not known yet.
        searching: Whether trials are still asked for.
        memory: The plan, in a line.
        stopping: Whether the run ends with this block.
    """

    total: int = 0
    done: int = 0
    best: TrialRecord | None = None
    believed: float | None = None
    racing: tuple[RaceProgress, ...] = ()
    evaluations: int = 0
    left: float | None = None
    searching: bool = True
    memory: str = ""
    stopping: bool = False


def render(view: View) -> RenderableType:
    """What is seen: one line each, cut where the terminal is too narrow; the plan is folded.

    It is never wide: a terminal may be made narrower and not break a line.
    """
    rows = Table.grid(padding=(0, 1), expand=True)
    rows.add_column(no_wrap=True)
    rows.add_column(ratio=1)
    for name, text, *style in _rows(view):
        folded = name == "memory"
        overflow: OverflowMethod = "fold" if folded else "ellipsis"
        what = Text(text, *style, no_wrap=not folded, overflow=overflow)
        rows.add_row(Text(name, "bold"), what)
    return Constrain(Group(_head(view), rows) if view.searching else rows, WIDTH)


def _head(view: View) -> RenderableType:
    head = Table.grid(padding=(0, 1), expand=True)
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(no_wrap=True)
    left = "" if view.left is None else f"about {duration(view.left)} left"
    bar = ProgressBar(total=max(view.total, 1), completed=view.done)
    head.add_row(f"trial {view.done} of at most {view.total}", bar, left)
    return head


def _rows(view: View) -> Iterator[tuple[str, ...]]:
    if view.best is not None:
        sure = "" if view.believed is None else f"believed {100 * view.believed:.1f} %, "
        yield "best", f"{sure}told {percent(view.best).strip()}, {_described(view.best)}"
        yield "", _tasks_of(view.best), "dim"
    for place, one in enumerate(view.racing[:SHOWN]):
        yield "" if place else "racing", _race(one)
    if (more := len(view.racing) - SHOWN) > 0:
        yield "", f"and {more} more"
    yield "asked", f"{view.evaluations:,} items"
    if view.memory:
        yield "memory", view.memory, "dim"
    if view.stopping:
        yield "", STOPPING, "yellow"


def _race(one: RaceProgress) -> str:
    text = f"trial {one.trial}  {one.blocks} of {one.of} blocks"
    if one.lead is not None:
        error = 100 * one.lead.variance**0.5
        text += f"  {100 * one.lead.value:+.1f} ± {error:.1f} to the best"
    return f"{text}  {one.method}"


def percent(trial: TrialRecord | None) -> str:
    """What a trial was told to be worth."""
    return "  -   " if trial is None or trial.estimate is None else f"{100 * trial.value:5.1f} %"


def _described(trial: TrialRecord) -> str:
    """Its number, method and scale."""
    scale = trial.point.get("scale")
    recipe = str(trial.point.get("method")) + ("" if scale is None else f" at scale {scale:.2f}")
    return f"trial {trial.number}, {recipe}"


def _tasks_of(trial: TrialRecord) -> str:
    """A trial's mean in each task."""
    names = short_names(trial.tasks, "_")
    means = (f"{printable(names[task])} {100 * one.value:.1f}" for task, one in trial.tasks.items())
    return " · ".join(means)
