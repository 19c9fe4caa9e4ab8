"""What people see: a live view while a run goes on, and the table at its end.

Where there is no terminal, or one that cannot move its cursor: plain lines, one for every trial.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any, Final

from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console, ConsoleRenderable, RenderableType
from rich.control import Control
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from merge_engine.models.memory_plan import MemoryPlan
from objectives.base import printable
from search.running.events import RaceProgress, Tally, duration, say_stopping
from search.running.sampling import Sample, shown
from search.showing.live_view import WIDTH, View, percent, render
from search.storing.result import Difference, Result, Score, Winner, short_names

if TYPE_CHECKING:
    from search.storing.trials import TrialRecord

LEAST_WIDTH = 28  # of what one model writes
LEAST_TRIALS, LATEST_TRIALS = 10, 20  # that a pace takes, and is taken of
CUTTING: Final = {"XTERM_VERSION", "STY"}  # variables of terminals that cut lines: xterm, screen


class NarrowingLive(Live):
    """A live view that leaves nothing behind in a terminal that is made narrower.

    Nearly all terminals then break the lines that are there, so that they take more rows.
    """

    _width = 0  # of the lines that are there

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """First go up by the rows that have been added."""
        before, self._width = self._width, min(WIDTH, self.console.width)
        breaks = 0 if CUTTING & os.environ.keys() else math.ceil(before / self._width) - 1
        rows = breaks * self._live_render.last_render_height
        up = Control(*[(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * rows)
        return [up, *super().process_renderables(renderables)]


class Terminal:
    """Tells people of a run as it goes.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._view = View()
        self._live: Live | None = None
        self._tally = Tally()
        self._began = (0.0, 0)  # when, and after how many item evaluations
        self._after = 0  # item evaluations that follow the search
        self._told = deque[float](maxlen=LATEST_TRIALS)  # when this session's trials were

    def plan(self, line: str | MemoryPlan) -> None:
        """A line of it."""
        self._say(str(line))
        if isinstance(line, MemoryPlan):
            self._view = replace(self._view, memory=str(line).removeprefix("memory: "))

    def note(self, text: str) -> None:
        """In a colour."""
        self.console.print(f"[yellow]note:[/] {escape(printable(text))}", highlight=False)

    def start(
        self, total: int, finished: Sequence[TrialRecord], evaluations: int, after: int
    ) -> None:
        """From here on there is a live view, if it can be."""
        self._tally, self._after = Tally(total, 0, evaluations), after
        self._began = (time.perf_counter(), evaluations)
        for trial in finished:
            self._tally.add(trial)
        if finished:
            self._say(f"resumed: {len(finished)} of {total} trials are there already")
        if self.console.is_interactive and self._live is None:
            self._live = NarrowingLive(
                get_renderable=self._render,
                console=self.console,
                transient=True,
                vertical_overflow="crop",
            )
            self._live.start()

    def block(self, items: int) -> None:
        """Counted."""
        self._tally.evaluations += items

    def racing(self, trials: Sequence[RaceProgress]) -> None:
        """Seen in the live view."""
        self._view = replace(self._view, racing=tuple(trials))

    def trial(self, trial: TrialRecord) -> None:
        """A line for each; beside a live view for the better and the failed ones."""
        better = self._tally.add(trial)
        self._told.append(time.perf_counter())
        if self._live is None or better or trial.state == "fail":
            self._say(self._line(trial, better))

    def believes(self, best: TrialRecord, value: float) -> None:
        """Seen in the live view."""
        self._view = replace(self._view, best=best, believed=value)

    def stage(self, what: str) -> None:
        """A line."""
        self._say(what)
        self._view = replace(self._view, searching=False, racing=())

    def stopping(self) -> None:
        """Seen in the live view, else on stderr."""
        if self._live is None:
            say_stopping()
        self._view = replace(self._view, stopping=True)

    def stop(self) -> None:
        """Take the live view away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def score(self, model: str, split: str, score: Score, items: Sequence[dict[str, Any]]) -> None:
        """A table."""
        print_score(self.console, model, split, score, len(items))

    def samples(self, samples: Sequence[Sample]) -> None:
        """Side by side in a terminal, else one below the other."""
        for sample in samples:
            print_sample(self.console, sample)

    def result(self, result: Result, run: Path) -> None:
        """Tables, the verdict, and where things are."""
        self.stop()
        print_result(self.console, result, run)

    def done(self, text: str, **facts: Any) -> None:  # noqa: ARG002
        """The text, where there is one."""
        if text:
            self._say(text)

    def _say(self, line: str) -> None:
        self.console.print(printable(line), highlight=False, markup=False)

    def _render(self) -> RenderableType:
        tally = self._tally
        return render(
            replace(
                self._view,
                total=tally.total,
                done=tally.done,
                best=self._view.best or tally.best,
                evaluations=tally.evaluations,
                left=self._left(),
            )
        )

    def _left(self) -> float | None:
        """Seconds for all trials that are left, at the latest ones' pace, and for what follows."""
        if len(self._told) < LEAST_TRIALS:
            return None
        began, before = self._began
        pace = (self._told[-1] - self._told[0]) / (len(self._told) - 1)
        of_item = (self._told[-1] - began) / max(1, self._tally.evaluations - before)
        return pace * (self._tally.total - self._tally.done) + of_item * self._after

    def _line(self, trial: TrialRecord, better: bool) -> str:
        what = trial.start or _short_point(trial)
        tally = self._tally
        line = f"{tally.done}/{tally.total}  trial {trial.number}  {percent(trial)}  {what}"
        if trial.state == "fail":
            line += f"  failed: {trial.error}"
        else:
            line += f"  {trial.items} items"
        if better:
            line += "  <- best so far"
        left = self._left() if self._live is None else None
        return line if left is None else f"{line}  (about {duration(left)} left)"


def _short_point(trial: TrialRecord) -> str:
    """The method, weights and those parameters that it follows."""
    from merge_engine.methods import METHODS

    method = str(trial.point.get("method"))
    params = METHODS[method].params if method in METHODS else {}
    follows = {name for name, param in params.items() if param.effect}
    numbers = (
        f"{name}={value:.2f}"
        for name, value in trial.point.items()
        if name in follows or name.startswith(("scale", "mix_"))
    )
    return " ".join([method, *numbers])


def print_score(console: Console, model: str, split: str, score: Score, items: int) -> None:
    """One model's score on one split."""
    table = Table(title=f"{model} on {items} {split} items, in %", title_justify="left")
    for name in (*score.tasks, "mean [95 %]", *_cost_column(score)):
        table.add_column(escape(name), justify="right", no_wrap=True)
    means = [f"{100 * mean:.1f}" for mean in score.tasks.values()]
    table.add_row(*means, _interval(score.mean, score.ci95), *_cost(score))
    console.print(table)


def print_sample(console: Console, sample: Sample) -> None:
    """A prompt, what is right, and what each model says."""
    about = [("prompt", sample.prompt)]
    if sample.right is not None:
        about.append(("right", sample.right))
    said = [(each.title, each.text or "") for each in sample.responses]
    if not console.is_terminal:
        blocks = [f"{name}:\n{indent(shown(text), '    ')}" for name, text in about + said]
        console.print("\n".join(["", sample.title, *blocks]), markup=False, highlight=False)
        return
    console.rule(escape(printable(sample.title)), align="left")
    for name, text in about:
        console.print(Text.assemble((f"{name}  ", "dim"), shown(text)))
    abreast = max(1, min(len(said), console.width // LEAST_WIDTH))
    width = console.width // abreast - 1
    panels = [
        Panel(Text(shown(text)), title=escape(printable(name)), title_align="left", width=width)
        for name, text in said
    ]
    console.print(Columns(panels))


def print_result(console: Console, result: Result, run: Path) -> None:
    """The final table, the verdict in a sentence, and where things are."""
    tasks = short_names(result.winner.test.tasks, "_")
    table = Table(title="on the test items, in % (95 % intervals)", box=SIMPLE_HEAD)
    table.add_column("")
    for name in (*tasks.values(), "mean", "winner leads by"):
        table.add_column(escape(name), justify="right", no_wrap=True)

    def row(name: str, score: Score, difference: Difference | None, style: str = "") -> None:
        means = [f"{100 * score.tasks[task]:.1f}" for task in tasks]
        lead = _half_width(difference.mean, difference.ci95, "+") if difference else ""
        table.add_row(escape(name), *means, _half_width(score.mean, score.ci95), lead, style=style)

    names = short_names(result.donors, "/")
    row("base", result.base.test, result.base.difference)
    for model, donor in result.donors.items():
        row(names[model], donor.test, donor.difference)
    row("uniform", result.uniform.test, result.uniform.difference)
    row("winner", result.winner.test, None, style="bold")
    console.print(table)
    _print_limited(console, result, names)
    if result.front:
        _print_front(console, result.front, tasks, run)
    best = result.difference_to_best_donor
    gain = _interval(best.mean, best.ci95, "+")
    console.print(
        f"[bold]{result.says}[/]: {gain} points to {escape(names[best.donor])}, "
        "the best donor before the test.",
        highlight=False,
    )
    if best.items_to_decide is not None:
        console.print(f"{best.items_to_decide} test items would show so large a difference.")
    selected = "" if result.select_score is None else f", {100 * result.select_score:.1f} on select"
    console.print(
        f"Search score {100 * result.search_score:.1f}, believed to be "
        f"{100 * result.believed_score:.1f}{selected}, on test "
        f"{100 * result.winner.test.mean:.1f}: trust the last one.",
        highlight=False,
    )
    if result.times_tested > 1:
        console.print(f"The test items have been opened for {result.times_tested} winners so far.")
    console.print(
        f"{result.winner.recipe['merge_method']} of trial {result.winner.trial} · "
        f"{result.trials} trials · {result.item_evaluations} item evaluations · "
        f"{duration(result.seconds.total)}",
        highlight=False,
    )
    console.print(
        f"{escape(str(run))}: recipe.yaml, result.json, report.html, checkpoint/", highlight=False
    )


def _print_limited(console: Console, result: Result, names: Mapping[str, str]) -> None:
    """What has become of the floors, and how much each model writes."""
    if result.floors_say:
        console.print(escape(result.floors_say), highlight=False)
    tests = {"winner": result.winner.test, "base": result.base.test, "uniform": result.uniform.test}
    tests |= {names[model]: donor.test for model, donor in result.donors.items()}
    if costs := [f"{name} {score.tokens:.1f}" for name, score in tests.items() if score.tokens]:
        console.print(f"Tokens written for an item: {escape(', '.join(costs))}.", highlight=False)


def _print_front(
    console: Console, front: Sequence[Winner], tasks: Mapping[str, str], run: Path
) -> None:
    """The recipes that none beats on every task."""
    table = Table(title="none of these beats another on every task; on test, %", box=SIMPLE_HEAD)
    for name in ("trial", *tasks.values(), "mean", *_cost_column(front[0].test), "method"):
        table.add_column(escape(name), justify="right", no_wrap=True)
    for one in front:
        means = [f"{100 * one.test.tasks[task]:.1f}" for task in tasks]
        mean = _half_width(one.test.mean, one.test.ci95)
        method = str(one.recipe["merge_method"])
        table.add_row(str(one.trial), *means, mean, *_cost(one.test), method)
    console.print(table)
    console.print(f"mergesearch export {escape(str(run))} OUT --trial N saves one of them.")


def _cost_column(score: Score) -> list[str]:
    """The name of what a model writes for an item, where it writes."""
    return [] if score.tokens is None else ["tokens"]


def _cost(score: Score) -> list[str]:
    return [] if score.tokens is None else [f"{score.tokens:.1f}"]


def _interval(mean: float, ci95: tuple[float, float], sign: str = "") -> str:
    return f"{100 * mean:{sign}.1f} [{100 * ci95[0]:{sign}.1f}, {100 * ci95[1]:{sign}.1f}]"


def _half_width(mean: float, ci95: tuple[float, float], sign: str = "") -> str:
    return f"{100 * mean:{sign}.1f} ± {50 * (ci95[1] - ci95[0]):.1f}"
