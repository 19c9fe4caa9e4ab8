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
from search.running.events import StepTaken, TrialProgress
from search.showing.progress import STOPPING, Progress
from search.wording import duration, percent, short_names

if TYPE_CHECKING:
    from search.storing.trials import TrialRecord

WIDTH: Final = 80  # columns at most: a terminal made narrower then rarely breaks a line
SHOWN: Final = 4  # trials in the race; of the others, how many there are


@dataclass(frozen=True)
class View:
    """State of a run."""

    progress: Progress  # of the search
    incumbent: TrialRecord | None = None  # highest posterior mean; None: not computed yet
    posterior_mean: float | None = None  # of the incumbent's value; None: not computed yet
    racing: tuple[TrialProgress, ...] = ()  # trials in the race
    tuning: StepTaken | None = None  # the latest step, while weights are tuned
    left: float | None = None  # seconds until the run is over; None: not known yet
    searching: bool = True  # whether the search goes on
    memory: str = ""  # the memory plan, in a line
    stopping: bool = False  # whether the run ends after the blocks that are being evaluated


def render(view: View) -> RenderableType:
    """Lay out a state, a line for each fact, cut to the width; only the memory plan is folded."""
    rows = Table.grid(padding=(0, 1), expand=True)
    rows.add_column(no_wrap=True)
    rows.add_column(ratio=1)
    for name, text, *style in _rows(view):
        folded = name == "memory"
        overflow: OverflowMethod = "fold" if folded else "ellipsis"
        fact = Text(printable(text), *style, no_wrap=not folded, overflow=overflow)
        rows.add_row(Text(name, "bold"), fact)
    return Constrain(Group(_head(view), rows) if view.searching else rows, WIDTH)


def _head(view: View) -> RenderableType:
    head = Table.grid(padding=(0, 1), expand=True)
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(no_wrap=True)
    left = "" if view.left is None else f"about {duration(view.left)} left"
    done, total = view.progress.done, view.progress.total
    bar = ProgressBar(total=max(total, 1), completed=done)
    head.add_row(f"trial {done} of at most {total}", bar, left)
    return head


def _rows(view: View) -> Iterator[tuple[str, ...]]:
    if best := view.incumbent or view.progress.best:
        mean = view.posterior_mean
        posterior = "" if mean is None else f"posterior mean {percent(mean)} %, "
        estimate = f"estimate {estimate_of(best).strip()}"
        yield "best", f"{posterior}{estimate}, {_describe(best)}"
        yield "", _task_means(best), "dim"
    for index, one in enumerate(view.racing[:SHOWN]):
        yield "" if index else "racing", _race(one)
    if (more := len(view.racing) - SHOWN) > 0:
        yield "", f"and {more} more"
    if (step := view.tuning) is not None:
        yield "tuning", f"step {step.step} of {step.of} to the next point  loss {step.loss:.3f}"
    yield "items", f"{view.progress.evaluations:,} evaluations"
    if view.memory:
        yield "memory", view.memory, "dim"
    if view.stopping:
        yield "", STOPPING, "yellow"


def _race(one: TrialProgress) -> str:
    text = f"trial {one.trial}  {one.blocks} of {one.of} blocks"
    if one.lead is not None:
        error = one.lead.variance**0.5
        text += f"  lead {percent(one.lead.value, '+')} ± {percent(error)} over the best"
    return f"{text}  {one.method}"


def estimate_of(trial: TrialRecord) -> str:
    """Format a trial's estimate in six columns, a dash where it has none."""
    return "  -   " if trial.estimate is None else f"{percent(trial.value):>5} %"


def _describe(trial: TrialRecord) -> str:
    scale = trial.point.get("scale")
    recipe = str(trial.point.get("method")) + ("" if scale is None else f" at scale {scale:.2f}")
    return f"trial {trial.number}, {recipe}"


def _task_means(trial: TrialRecord) -> str:
    names = short_names(trial.tasks, "_")
    means = (f"{printable(names[task])} {percent(one.value)}" for task, one in trial.tasks.items())
    return " · ".join(means)
