"""Tables of scores and samples for a terminal or a pipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from objectives.base import printable
from search.running.events import ScoreReady
from search.showing.markup import shown
from search.showing.score_table import ScoreTable
from search.storing.result import Result, Score
from search.storing.samples import Sample
from search.wording import bracketed, duration, percent, plus_minus, printable_lines

PANEL_WIDTH: Final = 28  # columns of one model's response, at least


def print_score(console: Console, found: ScoreReady) -> None:
    """Print one model's score on one split."""
    score = found.score
    title = f"{shown(found.model)} on {len(found.items)} {found.split} items, in %"
    table = Table(title=title, title_justify="left")
    for name in (*score.tasks, "mean [95 %]", *_tokens_column(score)):
        table.add_column(shown(name), justify="right", no_wrap=True)
    table.add_row(*map(percent, score.tasks.values()), bracketed(score.interval), *_tokens(score))
    console.print(table)


def print_sample(console: Console, sample: Sample) -> None:
    """Print a prompt, its target and each model's response: side by side in a terminal."""
    about = [("prompt", sample.prompt)]
    if sample.right is not None:
        about.append(("target", sample.right))
    responses = [(each.title, each.text or "") for each in sample.responses]
    if console.is_terminal:
        console.rule(shown(sample.title), align="left")
        for name, text in about:
            console.print(Text.assemble((f"{name}  ", "dim"), printable_lines(text)))
        console.print(_side_by_side(responses, console.width))
        return
    blocks = [
        f"{printable(name)}:\n{indent(printable_lines(text), '    ')}"
        for name, text in about + responses
    ]
    console.print("\n".join(["", printable(sample.title), *blocks]), markup=False, highlight=False)


def _side_by_side(texts: Sequence[tuple[str, str]], width: int) -> Columns:
    """Lay named texts out in panels, as many abreast as fit a width."""
    abreast = max(1, min(len(texts), width // PANEL_WIDTH))
    return Columns(
        Panel(
            Text(printable_lines(text)),
            title=shown(name),
            title_align="left",
            width=width // abreast - 1,
        )
        for name, text in texts
    )


def print_result(console: Console, result: Result, run: Path) -> None:
    """Print the score tables, the verdict in a sentence, and where the files are."""
    scores = ScoreTable.of_result(result)
    _print_scores(console, scores)
    if result.floors_text:
        console.print(shown(result.floors_text), highlight=False)
    for edge in result.edges:
        console.print(shown(edge.text), highlight=False)
    if tokens := [f"{row.name} {row.test.tokens:.1f}" for row in scores.rows if row.test.tokens]:
        console.print(f"Mean tokens per item: {shown(', '.join(tokens))}.", highlight=False)
    if result.front:
        _print_front(console, result, scores.tasks, run)
    _print_verdict(console, result, scores.best_donor(result.difference_to_best_donor).name)
    console.print(
        f"{shown(str(run))}: recipe.yaml, result.json, report.html, checkpoint/", highlight=False
    )


def _print_scores(console: Console, scores: ScoreTable) -> None:
    table = Table(title="on the test items, in % (95 % intervals)", box=SIMPLE_HEAD)
    table.add_column("")
    for name in (*scores.tasks.values(), "mean", "winner's lead"):
        table.add_column(shown(name), justify="right", no_wrap=True)
    for row in scores.rows:
        means = [percent(row.test.tasks[task]) for task in scores.tasks]
        lead = plus_minus(row.lead.interval, "+") if row.lead else ""
        style = "" if row.lead else "bold"
        table.add_row(shown(row.name), *means, plus_minus(row.test.interval), lead, style=style)
    console.print(table)


def _print_verdict(console: Console, result: Result, best_donor: str) -> None:
    lead = result.difference_to_best_donor
    console.print(
        f"[bold]{result.verdict_text}[/]: its lead over {shown(best_donor)}, the best donor on "
        f"the search items, is {bracketed(lead.interval, '+')} points.",
        highlight=False,
    )
    if result.untuned:
        console.print(shown(result.untuned.text), highlight=False)
    if lead.items_to_decide is not None:
        needed = f"About {lead.items_to_decide} test items would be needed to show"
        console.print(f"{needed} a lead of this size.")
    select = "" if result.select_score is None else f", {percent(result.select_score)} on select"
    console.print(
        f"Winner: estimate {percent(result.search_score)} and posterior mean "
        f"{percent(result.posterior_mean)} on search{select}, "
        f"{percent(result.winner.test.mean)} on test: only the last is unbiased.",
        highlight=False,
    )
    if result.times_tested > 1:
        console.print(f"The test items have been used for {result.times_tested} winners so far.")
    console.print(
        f"{shown(result.winner.recipe['merge_method'])} of trial {result.winner.trial} · "
        f"{result.trials} trials · {result.item_evaluations} item evaluations · "
        f"{duration(result.seconds.total)}",
        highlight=False,
    )


def _print_front(console: Console, result: Result, tasks: Mapping[str, str], run: Path) -> None:
    first = result.front[0].test
    table = Table(title="the Pareto front over the tasks, on test, in %", box=SIMPLE_HEAD)
    for name in ("trial", *tasks.values(), "mean", *_tokens_column(first), "method"):
        table.add_column(shown(name), justify="right", no_wrap=True)
    for one in result.front:
        means = [percent(one.test.tasks[task]) for task in tasks]
        method = shown(str(one.recipe["merge_method"]))
        mean = plus_minus(one.test.interval)
        table.add_row(str(one.trial), *means, mean, *_tokens(one.test), method)
    console.print(table)
    console.print(f"mergesearch export {shown(str(run))} OUT --trial N saves one of them.")


def _tokens_column(score: Score) -> list[str]:
    return [] if score.tokens is None else ["tokens"]


def _tokens(score: Score) -> list[str]:
    return [] if score.tokens is None else [f"{score.tokens:.1f}"]
