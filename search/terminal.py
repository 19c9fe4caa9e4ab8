"""What the user sees while a run goes on, and the table at its end.

One live line in a terminal; plain lines, one for every trial, where there is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from objectives.base import printable
from search.result import Difference, Result, Score, Winner


class Progress:
    """Reports a run as it goes.

    Args:
        console: Where to; a live bar if it is a terminal, else a line for every trial.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Bar | None = None
        self._blocks = self._done = self._total = 0
        self._best: FrozenTrial | None = None
        self._since = time.perf_counter()
        self._fresh = 0  # trials of this session: what the time left is reckoned from
        self.after_trial: Callable[[], None] = lambda: None

    def start(self, total: int, finished: Sequence[FrozenTrial]) -> None:
        """Begin, or go on after these finished trials."""
        self._total, self._done = total, len(finished)
        for trial in finished:
            self._consider(trial)
        self._since = time.perf_counter()
        if finished:
            self.console.print(f"resumed: {len(finished)} of {total} trials are there already")
        if self.console.is_terminal:
            self._bar = Bar(
                TextColumn("trial"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=self.console,
            )
            self._bar.start()
            self._bar.add_task("", total=total, completed=self._done)

    def block(self) -> None:
        """A block of items was answered."""
        self._blocks += 1
        self._refresh()

    def trial(self, trial: FrozenTrial) -> None:
        """A trial was told."""
        self._done += 1
        self._fresh += 1
        better = self._consider(trial)
        self._refresh()
        if self._bar is None or better or trial.state == TrialState.FAIL:
            self._print_trial(trial, better)
        self.after_trial()

    def stage(self, what: str) -> None:
        """The search is over and something else begins."""
        self.stop()
        self.console.print(what)

    def note(self, text: str) -> None:
        """Something the user should know."""
        print_notes(self.console, [text])

    def stop(self) -> None:
        """Take the live line away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _consider(self, trial: FrozenTrial) -> bool:
        better = trial.state == TrialState.COMPLETE and (
            self._best is None or (trial.value or 0.0) > (self._best.value or 0.0)
        )
        if better:
            self._best = trial
        return better

    def _refresh(self) -> None:
        if self._bar is not None:
            best = f"best {_value(self._best)}" if self._best else "first items"
            text = f"{best} · {self._blocks} blocks asked · {self._left()}"
            self._bar.update(self._bar.task_ids[0], completed=self._done, description=text)

    def _left(self) -> str:
        if not self._fresh:
            return "reckoning the time left"
        pace = (time.perf_counter() - self._since) / self._fresh
        return f"{_duration(pace * (self._total - self._done))} left"

    def _print_trial(self, trial: FrozenTrial, better: bool) -> None:
        what = trial.user_attrs.get("start") or _short_point(trial)
        line = f"trial {self._done}/{self._total}  {_value(trial)}  {what}"
        if trial.state == TrialState.FAIL:
            line += f"  failed: {printable(str(trial.user_attrs.get('error')))}"
        else:
            line += f"  {trial.user_attrs['items']} items"
        if better:
            line += "  <- best so far"
        self.console.print(escape(f"{line}  ({self._left()})"), highlight=False)


def _value(trial: FrozenTrial | None) -> str:
    return "  -   " if trial is None or trial.value is None else f"{100 * trial.value:5.1f} %"


def _short_point(trial: FrozenTrial) -> str:
    numbers = {name: value for name, value in trial.params.items() if name != "method"}
    return " ".join(
        [str(trial.params.get("method")), *(f"{n}={v:.2f}" for n, v in numbers.items())]
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def print_notes(console: Console, notes: Iterable[str]) -> None:
    """Say what was understood otherwise than the user may expect."""
    for note in notes:
        console.print(f"[yellow]note:[/] {escape(printable(note))}", highlight=False)


def print_score(console: Console, model: str, split: str, score: Score, items: int) -> None:
    """One model's score on one split."""
    table = Table(title=f"{model} on {items} {split} items, in %", title_justify="left")
    for name in (*score.tasks, "mean [95 %]", *_cost_column(score)):
        table.add_column(escape(name), justify="right", no_wrap=True)
    means = [f"{100 * mean:.1f}" for mean in score.tasks.values()]
    table.add_row(*means, _interval(score.mean, score.ci95), *_cost(score))
    console.print(table)


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
    _print_costs(console, result, names)
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
        f"{_duration(result.seconds.total)}",
        highlight=False,
    )
    console.print(
        f"{escape(str(run))}: recipe.yaml, result.json, report.html, checkpoint/", highlight=False
    )


def _print_costs(console: Console, result: Result, names: Mapping[str, str]) -> None:
    """What each model writes, where they write."""
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


def short_names(names: Iterable[str], separator: str) -> dict[str, str]:
    """The last part of each name where that tells them apart."""
    short = {name: name.rsplit(separator, 1)[-1] for name in names}
    return short if len(set(short.values())) == len(short) else {name: name for name in short}
