"""Tabulate scores of a run's models with intervals by task, and items gained and lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from merge_engine.recipe.recipe import Recipe
from objectives.base import without_settings
from objectives.scores import Interval, paired_bootstrap, score_interval
from search.proposing.starts import UNIFORM
from search.racing.item_scores import ItemScores
from search.showing.facts import RunFacts
from search.showing.score_table import ScoreRow, ScoreTable
from search.storing.result import Result, Winner
from search.storing.trials import TrialRecord
from search.wording import OWN_TEMPLATE, shortened

RESAMPLES: Final = 2000  # for the interval of a task's lead
PROMPT_LETTERS: Final = 240  # of an item gained or lost

TaskScores = Mapping[str, Sequence[float]]  # scores of a recipe on the items of each task


class Cell(NamedTuple):
    """A score, and the lead over it of the winner, or of the best trial so far."""

    score: Interval
    lead: Interval | None = None


class Row(NamedTuple):
    """A model's scores."""

    name: str  # of the model
    title: str  # its full name
    note: str  # shown below the name
    # One for the mean and one for each task; None: no items of it were evaluated.
    cells: Sequence[Cell | None]
    tokens: float | None = None  # mean number of tokens generated for an item
    marked: bool = False  # it is the winner, a trial of the front, or the best trial so far


class Change(NamedTuple):
    """An item with different scores before (the best donor's) and after (the winner's)."""

    task: str
    number: int
    prompt: str
    before: float
    after: float


def result_rows(facts: RunFacts, result: Result, winner: TaskScores) -> list[Row]:
    """Tabulate base, donors, uniform average, best untuned recipe and winner on test items."""
    models = {"base": facts.spec.base_model, "uniform": UNIFORM}
    untuned = result.untuned and Recipe.model_validate(result.untuned.recipe)
    rows = []
    for row in ScoreTable.of_result(result).rows:
        if row.kind == "winner":
            rows.append(_marked_row(row.name, row.model, result.winner, winner))
        elif row.kind == "untuned" and untuned:
            scores = facts.test_scores(untuned.key)
            rows.append(_compared_row(row, row.model, scores, winner, note=row.model))
        else:
            model = models.get(row.kind, row.model)
            key = facts.donor_key(model, own_template=row.own_template)
            scores = facts.test_scores(key)
            rows.append(_compared_row(row, model, scores, winner))
    return rows


def front_rows(facts: RunFacts, front: Sequence[Winner]) -> list[Row]:
    """Tabulate trials of the Pareto front on the test items."""
    rows = []
    for one in front:
        recipe = Recipe.model_validate(one.recipe)
        scores = facts.test_scores(recipe.key)
        rows.append(_marked_row(f"trial {one.trial}", recipe.merge_method, one, scores))
    return rows


def _marked_row(name: str, note: str, one: Winner, scores: TaskScores) -> Row:
    cells = [Cell(one.test.interval), *(_cell(_of_task(*of_task)) for of_task in scores.items())]
    return Row(name, note, note, cells, one.test.tokens, marked=True)


def _compared_row(
    row: ScoreRow, model: str, scores: TaskScores, winner: TaskScores, note: str = ""
) -> Row:
    cells = [Cell(row.test.interval, row.lead.interval if row.lead else None)]
    for task, values in scores.items():
        cells.append(_cell(_of_task(task, values), _of_task(task, winner[task])))
    if row.own_template:
        name = row.name.removesuffix(f" {OWN_TEMPLATE}")
        return Row(f"{name}, own", model, OWN_TEMPLATE, cells, row.test.tokens)
    return Row(row.name, model, note, cells, row.test.tokens)


def _of_task(task: str, values: Sequence[float]) -> ItemScores:
    return ItemScores(tuple(values), (task,) * len(values), {task: 1.0})


def _cell(scores: ItemScores, leader: ItemScores | None = None) -> Cell:
    """Estimate a mean, and the lead over it of another recipe on the same items."""
    score = score_interval(scores.values, scores.tasks, scores.weights)
    if leader is None:
        return Cell(score)
    lead = paired_bootstrap(
        leader.values, scores.values, scores.tasks, scores.weights, resamples=RESAMPLES
    )
    return Cell(score, lead)


def search_rows(facts: RunFacts, best: TrialRecord) -> list[Row]:
    """Tabulate the baselines and the best trial so far on the search items they share."""
    own = facts.scores(best.recipe, "search")
    rows = []
    for model, key in facts.baselines.items():
        values = facts.scores(key, "search")[: len(own)]
        cells = _search_cells(facts, values, own)
        rows.append(Row(facts.names[model], model, f"{len(values)} items", cells))
    cells = _search_cells(facts, own)
    title, note = f"trial {best.number}", f"{len(own)} items"
    rows.append(Row("best so far", title, note, cells, marked=True))
    return rows


def _search_cells(
    facts: RunFacts, values: Sequence[float], leader: Sequence[float] | None = None
) -> list[Cell | None]:
    """Estimate the mean and each task's mean of n search items, and a leader's leads."""
    tasks = [item.task for item in facts.items["search"]][: len(values)]
    cells: list[Cell | None] = []
    for weights in (facts.weights, *({task: 1.0} for task in facts.weights)):
        indices = [index for index, task in enumerate(tasks) if task in weights]
        of_items = tuple(tasks[index] for index in indices)
        scores, *others = [
            ItemScores(tuple(some[index] for index in indices), of_items, weights)
            for some in (values, leader)
            if some is not None
        ]
        cells.append(_cell(scores, *others) if {*of_items} == {*weights} else None)
    return cells


def item_changes(facts: RunFacts, before: str, after: str) -> list[Change]:
    """List test items that two recipes, given by key, score differently on, by the difference."""
    scores = [facts.scores(recipe, "test") for recipe in (before, after)]
    changes = [
        Change(
            item.task, item.doc_id, shortened(without_settings(item.prompt), PROMPT_LETTERS), *both
        )
        for item, *both in zip(facts.items["test"], *scores, strict=True)
        if both[0] != both[1]
    ]
    return sorted(changes, key=lambda one: -abs(one.after - one.before))


def count_changes(before: TaskScores, after: TaskScores) -> dict[str, tuple[int, int, int]]:
    """Count the items of each task whose score rose, fell, and is equal."""
    found = {}
    for task, values in after.items():
        signs = np.sign(np.subtract(values, before[task]))
        found[task] = (int((signs > 0).sum()), int((signs < 0).sum()), int((signs == 0).sum()))
    return found
